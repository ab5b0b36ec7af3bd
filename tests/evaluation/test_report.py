"""The report page: complete, escaped, self-contained, replaced as a whole; and how a browser shows
it."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser

import pytest
from helpers import REPOSITORY
from PIL import Image

from lib.evaluation.registry import evaluations
from lib.evaluation.report import ReportError, write_report

COLOURS = {
    "sampling": (200, 30, 120),
    "interpolation": (30, 160, 60),
    "neighborhood": (40, 80, 220),
}
WHERE = dict(
    checkpoint="best.ckpt", weights="3f9a12bc77de", step=12345, dataset="Photos32", seed=7, batch=32
)
WHERE |= {"device": "cpu", "torch": "2.15.0", "python": "3.11.7", "date": "2026-11-22"}
WHERE |= {"command": "evaluate.py --model tiny --elbo"}
CONFIG = {
    "depth": 3,
    "ds_list": [0, 2],
    "lrate": 0.0021,
    "lrate_decay": 1e-05,
    "amp": True,
    "precision": None,
}


def picture(folder, name, colour, size=(64, 48)) -> dict[str, str]:
    Image.new("RGB", size, colour).save(folder / name)
    return {"file": name, "caption": f"picture {name}"}


def all_results(folder) -> dict[str, dict]:
    """An entry of each task that is known, and of one that is not."""
    pictures = {
        task: [picture(folder, f"{task}.png", COLOURS.get(task, (90, 90, 90)))]
        for task in evaluations()
    }
    pictures["sampling"].append(picture(folder, "wide.png", COLOURS["sampling"], (2000, 300)))
    mses = [[412.34, 500.0], [20.06, 1234.56]]
    entries = {
        "elbo": {
            "bits_per_dim": 4.81747,
            "standard_error": 0.08102,
            "nats": 10257.64,
            "distortion": 4.69808,
            "rate": 0.11939,
            "rate_per_layer": [0.01994, 0.0, 0.09945],
            "images": 50000,
        },
        "likelihood": {
            "bits_per_dim": 4.76529,
            "standard_error": 0.08224,
            "images": 64,
            "samples": 1024,
            "computed": 63,
            "chunk": 33,
            "seconds": 18.43,
        },
        "sampling": {"temperatures": [0.65, 1.0], "count": 66, "output": "most_probable"},
        "interpolation": {
            "images": [17, 40],
            "layers": [2, 1],
            "temperatures": [0.95],
            "frames": 9,
        },
        "disentanglement": {
            "scores": {
                "beta_vae": {"score": 0.98765, "train_accuracy": 0.99},
                "dci": {"score": 0.5},
            },
            "levels": [5, 5, 4],
            "seconds_per_metric": {"encoding": 6.52, "beta_vae": 0.7},
        },
        "neighborhood": {"images": [41], "layers": [3], "temperatures": [0.55]},
        "traversal": {"images": [6], "frames": 11, "rate_per_dimension": [0.02, 0.06]},
        "reconstruction": {"images": 35, "nbits": 5, "mse": 123.46, "mse_8_bits": 130.04},
        "overfitting": {
            "searched": 8192,
            "neighbours": [
                [
                    {"index": 1000 + 10 * q + k, "mse": mse, "mirrored": k == 1}
                    for k, mse in enumerate(row)
                ]
                for q, row in enumerate(mses)
            ],
        },
        "latents": {
            "rate_per_layer": [0.03, 0.01],
            "share_per_layer": [0.75, 0.25],
            "scale_per_layer": [[4, 4], [8, 9]],
        },
    }
    known = {task: entry | WHERE | {"pictures": pictures[task]} for task, entry in entries.items()}
    known["elbo"] = {key: value for key, value in known["elbo"].items() if key != "pictures"}
    later = {
        "gain": 1.234567891,
        "kinds": ["a", "b"],
        "nested": {"p": [1, 2]},
        "done": True,
        "reason": None,
    }
    return known | {
        "later_task": later | WHERE | {"date": "2027-01-02", "command": "evaluate.py --later_task"}
    }


class Page(HTMLParser):
    """The page's elements, their texts, and the rows of its tables; fails where elements do not
    nest."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = defaultdict(list)
        self.rows: list[list[str]] = []
        assert page.startswith("<!doctype html>\n")
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes)), attributes
        self.elements.append((tag, dict(attributes)))
        self.texts[tag].append("")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)
        if tag in ("td", "th"):
            self.rows[-1].append(self.texts[tag][-1])

    def handle_data(self, text):
        for tag in set(self.open):
            self.texts[tag][-1] += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(folder, **changes) -> Page:
    results = changes.pop("results") if "results" in changes else all_results(folder)
    path = write_report(
        folder / "report.html", **{"title": "tiny", "results": results, "config": CONFIG} | changes
    )
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_every_number_is_in_a_table(tmp_path):
    page = report(tmp_path)
    assert page.texts["title"] == page.texts["h1"] == ["tiny"]
    rows = [
        ["−ELBO", "4.8175 ± 0.0810", "50,000", "–"],
        ["−log p(x)", "4.7653 ± 0.0822", "64", "1,024"],
        ["distortion, bits/dim", "4.6981"],
        ["rate, bits/dim", "0.1194"],
        ["1 (topmost)", "0.0199", "16.7%", ""],
        ["2", "0.0000", "0.0%", ""],
        ["3", "0.0994", "83.3%", ""],
        ["images computed by this command", "63"],
        ["samples computed at a time", "33"],
        ["time", "18.4 s"],
        ["temperatures", "0.65, 1"],
        ["samples at each temperature", "66"],
        ["pixels", "most probable"],
        ["images", "17, 40"],
        ["top layers", "2, 1"],
        ["images in a row", "9"],
        ["BetaVAE", "0.9877 train accuracy 0.99"],
        ["DCI", "0.5000"],
        ["levels of each factor", "5, 5, 4"],
        ["seconds", "encoding 6.52, beta vae 0.7"],
        ["nats for each image", "10257.6"],
        ["z1", "0.0600", "75.0%", ""],
        ["mean squared error to the images in the model's bits, levels 0 to 255", "123.5"],
        ["mean squared error to the 8-bit originals, levels 0 to 255", "130.0"],
        ["training images searched", "8,192"],
        ["1", "1000 412.3", "1001 500.0, mirrored"],
        ["2", "1010 20.1", "1011 1234.6, mirrored"],
        ["1 (topmost)", "4×4", "0.0300", "75.0%", ""],
        ["2", "8×9", "0.0100", "25.0%", ""],
        ["gain", "1.23457"],
        ["kinds", "a, b"],
        ["nested", '{"p": [1, 2]}'],
        ["done", "yes"],
        ["reason", "–"],
    ]
    assert [row for row in rows if row not in page.rows] == []
    assert sum(row == ["standard error over images", "0.0810"] for row in page.rows) == 1


def test_configuration_versions_and_commands(tmp_path):
    page = report(tmp_path)
    settings = {
        "depth": "3",
        "ds_list": "0, 2",
        "lrate": "0.0021",
        "lrate_decay": "1e-05",
        "amp": "yes",
    }
    settings["precision"] = "–"
    assert [row for row in map(list, settings.items()) if row not in page.rows] == []
    versions = {
        "data set": "Photos32",
        "checkpoint": "best.ckpt",
        "optimizer steps": "12,345",
        "PyTorch": "2.15.0",
    }
    versions |= {
        "weights' fingerprint": "3f9a12bc77de",
        "seed": "7",
        "batch size": "32",
        "Python": "3.11.7",
    }
    assert [row for row in map(list, versions.items()) if row not in page.rows] == []
    assert ["Negative ELBO", "2026-11-22"] in page.rows and [
        "Later task",
        "2027-01-02",
    ] in page.rows
    assert page.texts["code"] == ["evaluate.py --model tiny --elbo", "evaluate.py --later_task"]


def test_pictures_are_in_the_page(tmp_path):
    page = report(tmp_path)
    pictures = [p for entry in all_results(tmp_path).values() for p in entry.get("pictures", ())]
    images = page.all("img")
    assert len(images) == len(pictures) == len(evaluations())
    for image, stored in zip(images, pictures, strict=True):
        kind, content = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True) == (tmp_path / stored["file"]).read_bytes()
        assert stored["caption"] in image["alt"] and stored["caption"] in page.texts["figcaption"]
        wide = stored["file"] == "wide.png"
        assert (image["width"], image["height"]) == (("2000", "300") if wide else ("320", "240"))
        assert (image.get("class") == "enlarged") == (not wide)


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not any(
        part in text for part in ("http:", "https:", "url(", "@import", "<script", "file:")
    )
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    (policy,) = [
        m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    anchors = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    targets = [link["href"] for link in page.all("a")]
    assert len(set(anchors)) == len(anchors)
    assert (
        {"#elbo", "#later-task", "#configuration"}
        < set(targets)
        <= {f"#{anchor}" for anchor in anchors}
    )


def test_all_texts_are_escaped(tmp_path):
    mean = "<script>alert('&amp;\"')</script>"
    stored = picture(tmp_path, "p.png", (1, 2, 3)) | {"caption": mean}
    results = {
        "sampling": {
            "count": 1,
            "output": mean,
            "command": mean,
            "device": mean,
            "pictures": [stored],
        }
    }
    results |= {
        mean: {mean: mean, "list": [mean, {mean: mean}]},
        "versions": {"x": 1},
        "VERSIONS": {"x": 2},
    }
    page = report(tmp_path, title=mean, results=results, config={mean: mean})
    assert page.all("script") == []
    for tag in ("title", "h1", "figcaption", "code", "td", "th"):
        assert mean in page.texts[tag], tag
    assert page.all("img")[0]["alt"] == f"Samples: {mean}"
    anchors = [attributes["id"] for attributes in page.all("section")]
    assert len(set(anchors)) == len(anchors) == 4 + 3


def test_an_empty_and_a_single_result(tmp_path):
    page = report(tmp_path, results={}, config={})
    assert page.rows == [] and page.all("img") == []
    single = {"bits_per_dim": 3.0, "standard_error": None, "rate_per_layer": [0.0], "images": 1}
    page = report(tmp_path, results={"elbo": single})
    assert ["−ELBO", "3.0000", "1", "–"] in page.rows
    assert ["standard error over images", "–"] in page.rows
    assert ["1 (topmost)", "0.0000", "0.0%", ""] in page.rows


def test_a_missing_or_damaged_picture(tmp_path):
    results = all_results(tmp_path)
    report(tmp_path)
    old = (tmp_path / "report.html").read_bytes()
    whole = (tmp_path / "interpolation.png").read_bytes()
    for content in (whole[:-1], b"GIF89a", b""):
        (tmp_path / "interpolation.png").write_bytes(content)
        with pytest.raises(ReportError, match=r"interpolation\.png is no PNG, or is cut off"):
            report(tmp_path, results=results)
    (tmp_path / "interpolation.png").unlink()
    with pytest.raises(
        ReportError, match=r"interpolation\.png is missing; .*--interpolation makes it again"
    ) as raised:
        report(tmp_path, results=results)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "report.html").read_bytes() == old


@pytest.mark.parametrize("kind", ["above", "absolute", "link", "loop", "pipe"])
def test_pictures_outside_the_folder_and_pipes_are_not_read(kind, tmp_path):
    folder = tmp_path / "figs"
    folder.mkdir()
    outside = picture(tmp_path, "secret.png", (1, 2, 3))["file"]
    name = {"above": f"../{outside}", "absolute": str(tmp_path / outside)}.get(kind, "here.png")
    if kind == "link":
        (folder / name).symlink_to(tmp_path / outside)
    if kind == "loop":
        (folder / name).symlink_to(name)
    if kind == "pipe":
        os.mkfifo(folder / name)
    message = {"pipe": "here.png is not a file", "loop": "picture .*here.png"}.get(
        kind, "name a picture outside"
    )
    with pytest.raises(ReportError, match=message):
        report(folder, results={"sampling": {"pictures": [{"file": name, "caption": ""}]}})
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"bits_per_dim": "three"},
        {"pictures": 3},
        {"rate_per_layer": [None]},
        {"seconds": []},
        {"command": {"a": []}},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_values_of_the_wrong_kind_are_one_line(entry, tmp_path):
    with pytest.raises(ReportError, match=r"results\.json holds values of the wrong kind \(.*\)"):
        report(tmp_path, results={"elbo": entry})


def test_an_interrupted_write_leaves_the_old_page(tmp_path, monkeypatch):
    report(tmp_path)
    old, names = (tmp_path / "report.html").read_bytes(), sorted(os.listdir(tmp_path))

    def interrupted(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        report(tmp_path, title="new")
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == names
    assert report(tmp_path, title="new").texts["h1"] == ["new"]
    with pytest.raises(ReportError, match="cannot write .*under.html"):
        write_report(tmp_path / "report.html/under.html", title="", results={}, config={})


def test_an_installed_copy_has_its_template(tmp_path):
    (tmp_path / "sdn").symlink_to(REPOSITORY / "lib")
    code = (
        "from sdn.evaluation.report import write_report; "
        "write_report('x/r.html', title='', results={}, config={})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x/r.html").is_file()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    programs = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, programs)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(programs)} is installed")
    with playwright.sync_playwright() as started:
        offline = ["--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND"]
        browser = started.chromium.launch(executable_path=program, args=offline)
        yield browser
        browser.close()


def opened(browser, path, **options):
    """A page that shows a file; what it asked for, what of that failed, what the console says."""
    page = browser.new_page(**options)
    asked, failed, said = [], [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    return page, asked, failed, said


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.slow
def test_a_browser_shows_the_page(tmp_path, browser):
    command = (
        "evaluate.py --model tiny --likelihood " + "--importance_samples 1024 " * 20 + "x" * 300
    )
    results = all_results(tmp_path)
    results["likelihood"]["command"] = command
    results["overfitting"]["neighbours"] = [row * 9 for row in results["overfitting"]["neighbours"]]
    report(
        tmp_path,
        title="An experiment with_a_long_name_" + "x" * 100,
        results=results,
    )
    for name, width, height, scheme in (
        ("desktop", 1280, 800, "light"),
        ("phone", 400, 800, "dark"),
    ):
        size = {"width": width, "height": height}
        page, asked, failed, said = opened(
            browser,
            tmp_path / "report.html",
            viewport=size,
            color_scheme=scheme,
            is_mobile=width < 600,
        )
        schemes = {url.split(":")[0] for url in asked}
        assert "file" in schemes <= {"file", "data"}
        assert failed == said == []
        assert page.evaluate("document.documentElement.clientWidth") == width
        assert page.evaluate(OVERFLOW) <= 0
        assert page.evaluate(
            "[...document.images].every(image => image.complete && image.naturalWidth)"
        )
        text = " ".join(page.inner_text("body").split())
        assert "4.8175 ± 0.0810" in text and command in text
        assert "ds_list" not in text, "the configuration is folded"
        page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        page = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert page.width == width and page.height > 3 * height
        backgrounds = [sum(page.getpixel((2, y))) / 3 for y in range(0, page.height, 50)]
        assert min(backgrounds) > 240 if scheme == "light" else max(backgrounds) < 60
        column = min(width, 72 * 16) - 2 * 20
        counts = {colour: count for count, colour in page.getcolors(page.width * page.height)}
        for task, colour in COLOURS.items():
            area = 320 * 240 + (column * round(column * 300 / 2000) if task == "sampling" else 0)
            assert counts[colour] == pytest.approx(area, rel=0.02), task

    control = tmp_path / "control.html"
    wide = "<meta name=viewport content='width=device-width'><body style='width: 500px'>"
    control.write_text(wide + "<img src='http://example.invalid/x.png'>")
    size = {"width": 400, "height": 800}
    page, asked, failed, _ = opened(browser, control, viewport=size, is_mobile=True)
    assert page.evaluate(OVERFLOW) > 0
    assert "http://example.invalid/x.png" in asked and failed
