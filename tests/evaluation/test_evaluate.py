"""evaluate.py as a user runs it: numbers, pictures, and every way to be told what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDEN, run
from PIL import Image

import evaluate
from data.get_dataset import get_dataset
from lib.checkpoint import write_checkpoint
from lib.config import ConfigError
from lib.evaluation.elbo import Elbo
from lib.evaluation.registry import evaluations
from lib.evaluation.results import add_result, read_results, results_folder
from lib.pictures import save_image

EVERYTHING = (
    "--elbo --likelihood --importance_samples 6 --latents --reconstruction --sampling "
    "--interpolation --neighborhood --overfitting --report --limit 5 --batch 4 --seed 3 --count "
    "4 --temperatures 0.5 1 --images 2 7 --layers 1 2 --frames 3 --neighbors 2"
).split()
PICTURES = {
    "latents": ["latents.png"],
    "reconstruction": ["reconstructions.png"],
    "sampling": ["samples_t0.50.png", "samples_t1.00.png"],
    "interpolation": ["interpolation_2_7.png"],
    "neighborhood": ["neighborhood_2.png", "neighborhood_7.png"],
    "overfitting": ["nearest_samples_t0.50.png", "nearest_samples_t1.00.png"],
}


def here(*arguments: object) -> None:
    """evaluate.py in this process, which spares the time that importing takes."""
    evaluate.main([str(argument) for argument in arguments])


def refused_here(capfd, *arguments: object) -> str:
    """The one line with which evaluate.py refuses."""
    with pytest.raises(SystemExit) as stop:
        here(*arguments)
    assert stop.value.code == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("evaluate.py: error: ")
    return last


@pytest.fixture(scope="module")
def evaluated(finished):
    """Everything that there is to evaluate, on a model of a few steps: the folder of results and
    the printed text."""
    done = run("evaluate.py", "--model", "tiny", "--output_dir", finished, *EVERYTHING)
    assert done.returncode == 0, done.stderr
    return finished / "figs/tiny", done.stdout


def test_numbers_are_printed_and_kept(evaluated):
    folder, printed = evaluated
    results = json.loads((folder / "results.json").read_text())
    expected = [name for name, one in evaluations().items() if not one.only_disentanglement]
    assert list(results) == expected, "in the order in which a report shows them"
    elbo, likelihood = results["elbo"], results["likelihood"]
    assert elbo["images"] == likelihood["images"] == 5
    assert likelihood["samples"] == 6 and likelihood["computed"] == 5
    assert likelihood["bits_per_dim"] < elbo["bits_per_dim"]
    assert (
        f"-ELBO: {elbo['bits_per_dim']:.4f} +- {elbo['standard_error']:.4f} bits/dim (5 images)"
        in printed
    )
    assert f"-log p(x): {likelihood['bits_per_dim']:.4f} +-" in printed
    assert results["latents"]["rate_per_layer"] == elbo["rate_per_layer"]
    assert sum(results["latents"]["share_per_layer"]) == pytest.approx(1)
    assert (
        results["overfitting"]["searched"] == 32 and results["overfitting"]["mirrored_too"] is False
    )
    assert [len(of_query) for of_query in results["overfitting"]["neighbours"]] == [2] * 8
    (fingerprint,) = {result["weights"] for result in results.values()}
    assert len(fingerprint) == 12
    for result in results.values():
        assert (result["step"], result["seed"], result["dataset"], result["device"]) == (
            6,
            3,
            "ImageNet32",
            "cpu",
        )
        assert result["command"].startswith("evaluate.py --model tiny --output_dir ")


def test_every_picture_is_there_and_named(evaluated):
    folder, printed = evaluated
    results = json.loads((folder / "results.json").read_text())
    for task, names in PICTURES.items():
        assert [picture["file"] for picture in results[task]["pictures"]] == names
        for name in names:
            assert f"{task}: {folder / name}" in printed
            Image.open(folder / name).load()
    for temperature in ("0.50", "1.00"):
        singles = sorted((folder / f"samples_t{temperature}").iterdir())
        assert [Image.open(path).size for path in singles] == [(32, 32)] * 4


def test_the_same_command_draws_the_same_pictures_to_the_byte(evaluated, finished, tmp_path):
    folder, _ = evaluated
    (tmp_path / "checkpoints").symlink_to(finished / "checkpoints")
    done = run("evaluate.py", "--model", "tiny", "--output_dir", tmp_path, *EVERYTHING)
    assert done.returncode == 0, done.stderr
    for name in [name for names in PICTURES.values() for name in names]:
        assert (tmp_path / "figs/tiny" / name).read_bytes() == (folder / name).read_bytes(), name
    first, second = (
        json.loads((f / "results.json").read_text()) for f in (folder, tmp_path / "figs/tiny")
    )
    for task in first:
        for key in first[task].keys() - {"command", "date", "seconds"}:
            assert first[task][key] == second[task][key], (task, key)


def test_the_report_holds_numbers_and_pictures(evaluated):
    folder, printed = evaluated
    page = (folder / "report.html").read_text()
    assert f"report: {folder / 'report.html'}" in printed
    results = json.loads((folder / "results.json").read_text())
    for task in ("elbo", "likelihood"):
        assert f"{results[task]['bits_per_dim']:.4f}" in page
    assert page.count("data:image/png;base64,") == sum(map(len, PICTURES.values()))
    assert (
        "sdn_num_dirs" in page
        and results["elbo"]["torch"] in page
        and results["elbo"]["weights"] in page
    )


def other_weights(finished, path):
    """A checkpoint of the same run with other weights, under another path."""
    checkpoint = torch.load(finished / "checkpoints/tiny/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["average.module.h"] += 0.125
    path.parent.mkdir(parents=True)
    write_checkpoint(checkpoint, path)
    return path


def test_two_checkpoints_of_one_name_have_a_folder_each(finished, tmp_path, capfd):
    first = tmp_path / "a/run/best.ckpt"
    first.parent.mkdir(parents=True)
    shutil.copy(finished / "checkpoints/tiny/best.ckpt", first)
    second = other_weights(finished, tmp_path / "b/run/best.ckpt")
    options = ["--output_dir", tmp_path, "--sampling", "--count", 1, "--temperatures", 1]
    here("--checkpoint", first, *options)
    folder = tmp_path / "figs/run"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    here("--checkpoint", second, *options, "--report")
    (other,) = (path for path in (tmp_path / "figs").iterdir() if path != folder)
    weights = json.loads((other / "results.json").read_text())["sampling"]["weights"]
    assert other.name == f"run-{weights}"
    assert f"{folder} holds another checkpoint's results: using {other}" in capfd.readouterr().err
    assert (other / "report.html").is_file() and (other / "samples_t1.00/0000.png").is_file()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    here("--checkpoint", first, *options)
    assert len(list((tmp_path / "figs").iterdir())) == 2


def test_folders_of_earlier_versions_are_known_by_their_results(evaluated, finished, tmp_path):
    folder, _ = evaluated
    (tmp_path / "figs/tiny").mkdir(parents=True)
    shutil.copy(folder / "results.json", tmp_path / "figs/tiny")
    second = other_weights(finished, tmp_path / "tiny/best.ckpt")
    here("--checkpoint", second, "--output_dir", tmp_path, "--elbo", "--limit", 1)
    assert len(list((tmp_path / "figs").iterdir())) == 2
    assert (tmp_path / "figs/tiny/results.json").read_bytes() == (
        folder / "results.json"
    ).read_bytes()


def test_a_report_needs_results(finished, tmp_path, capfd):
    best = finished / "checkpoints/tiny/best.ckpt"
    refusal = refused_here(capfd, "--checkpoint", best, "--output_dir", tmp_path, "--report")
    assert "--report: " in refusal and "holds no results of these weights yet" in refusal
    assert not list(tmp_path.iterdir())


def test_what_a_killed_command_left_half_written_goes(finished, tmp_path):
    """After a day; not what other evaluations or a training may be writing at the same time."""
    left = ["results.json.99.partial", "samples_t1.00/0000.png.99.partial"]
    kept = "samples_0000012.png.99.partial"
    yesterday = time.time() - 25 * 3600
    for name in (*left, kept):
        path = tmp_path / "figs/tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if name in left:
            os.utime(path, (yesterday, yesterday))
    best = finished / "checkpoints/tiny/best.ckpt"
    here("--checkpoint", best, "--output_dir", tmp_path, "--elbo", "--limit", 1)
    partial = {path.name for path in (tmp_path / "figs").rglob("*.partial")}
    assert partial == {kept}


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", ".", "a/../../x"])
def test_names_that_lead_outside_are_refused(name, finished, tmp_path, capfd):
    (tmp_path / "x").mkdir()
    shutil.copy(finished / "checkpoints/tiny/best.ckpt", tmp_path / "x/best.ckpt")
    folder = tmp_path / "out/deep"
    refusal = refused_here(capfd, "--model", name, "--output_dir", folder, "--sampling")
    assert "a model's name must be that of a folder inside figs/" in refusal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_the_batch_changes_no_number_and_other_results_stay(evaluated, finished, tmp_path):
    folder, _ = evaluated
    first = json.loads((folder / "results.json").read_text())
    (tmp_path / "figs").mkdir()
    shutil.copytree(folder, tmp_path / "figs/tiny")
    best = finished / "checkpoints/tiny/best.ckpt"
    options = ["--output_dir", tmp_path, "--limit", 5, "--seed", 3, "--batch", 2]
    here("--checkpoint", best, *options, "--elbo")
    second = json.loads((tmp_path / "figs/tiny/results.json").read_text())
    assert second["elbo"]["bits_per_dim"] == pytest.approx(first["elbo"]["bits_per_dim"], rel=1e-5)
    assert second["likelihood"] == first["likelihood"]


def test_likelihood_goes_on_with_more_images_and_in_two_processes(evaluated, finished, tmp_path):
    folder, _ = evaluated
    first = json.loads((folder / "results.json").read_text())["likelihood"]
    (tmp_path / "figs").mkdir()
    shutil.copytree(folder, tmp_path / "figs/tiny")
    (tmp_path / "checkpoints").symlink_to(finished / "checkpoints")
    command = [
        "--model",
        "tiny",
        "--output_dir",
        tmp_path,
        "--likelihood",
        "--importance_samples",
        6,
        "--seed",
        3,
    ]

    def result(*options) -> dict:
        here(*command, *options)
        return json.loads((tmp_path / "figs/tiny/results.json").read_text())["likelihood"]

    same = result("--limit", 5)
    assert same["computed"] == 0 and same["bits_per_dim"] == first["bits_per_dim"]
    all_images = result("--processes", 2)
    assert (all_images["computed"], all_images["images"]) == (6, 11), "those after the first five"
    for ledger in (tmp_path / "figs/tiny").glob("likelihood_*.csv"):
        ledger.unlink()
    alone = result("--chunk", all_images["chunk"])
    assert alone["computed"] == 11
    assert alone["bits_per_dim"] == pytest.approx(all_images["bits_per_dim"], rel=1e-6)


def test_commands_at_the_same_time_keep_each_others_results(tmp_path):
    """A result is added to what the file holds then, not to what it held when the command began."""
    path = tmp_path / "results.json"
    add_result(path, "elbo", {"images": 1})
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda number: add_result(path, f"task{number}", {"images": number}), range(40)
            )
        )
    results = json.loads(path.read_text())
    assert results == {"elbo": {"images": 1}} | {
        f"task{number}": {"images": number} for number in range(40)
    }
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_samples_of_an_earlier_command_do_not_stay(finished, tmp_path):
    best = finished / "checkpoints/tiny/best.ckpt"
    for count in (3, 1):
        here(
            "--checkpoint",
            best,
            "--output_dir",
            tmp_path,
            "--sampling",
            "--count",
            count,
            "--temperatures",
            0.701,
            1,
        )
    for temperature in ("0.701", "1.00"):
        assert [
            path.name for path in (tmp_path / f"figs/tiny/samples_t{temperature}").iterdir()
        ] == ["0000.png"]


def test_what_cannot_be_is_found_before_anything_is_computed(
    finished, tmp_path, capfd, monkeypatch
):
    best = finished / "checkpoints/tiny/best.ckpt"
    monkeypatch.setattr(Elbo, "compute", lambda *_: pytest.fail("computed"))
    for flags in (["--overfitting", "--queries", "absent.png"], ["--neighborhood", "--images", 99]):
        refused_here(capfd, "--checkpoint", best, "--output_dir", tmp_path, "--elbo", *flags)


def test_given_pictures_are_searched_for(finished, images, tmp_path, capfd):
    training = get_dataset("ImageNet32", images, "train")
    copy = save_image(training[17], tmp_path / "copy.png")
    (tmp_path / "checkpoints").symlink_to(finished / "checkpoints")
    command = [
        "--model",
        "tiny",
        "--output_dir",
        tmp_path,
        "--root",
        images,
        "--overfitting",
        "--queries",
    ]
    here(*command, copy)
    ((nearest, *_),) = json.loads((tmp_path / "figs/tiny/results.json").read_text())["overfitting"][
        "neighbours"
    ]
    assert nearest == {"index": 17, "mse": 0.0, "mirrored": False}
    os.mkfifo(tmp_path / "pipe.png")
    refusal = refused_here(capfd, *command, tmp_path / "pipe.png")
    assert "pipe.png cannot be read as a picture: it is not a file" in refusal
    large = save_image(
        training[17].repeat_interleave(2, 1).repeat_interleave(2, 2), tmp_path / "2x.png"
    )
    here(*command, large)
    results = json.loads((tmp_path / "figs/tiny/results.json").read_text())
    assert results["overfitting"]["neighbours"][0][0]["index"] == 17


def test_the_authors_celeba_checkpoint_just_works(tmp_path):
    """`checkpoints/CelebAHQ256.ckpt` in the authors' format, here a small one, is detected and
    evaluated."""
    lmdb = pytest.importorskip("lmdb")
    checkpoint = torch.load(GOLDEN / "tiny_5bit.ckpt", weights_only=True)
    # SDN where the golden model has it: at half the image's scale.
    checkpoint["hyper_parameters"] |= dict(dataset="CelebAHQ256", sdn_max_scale=128)
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint, tmp_path / "checkpoints/CelebAHQ256.ckpt")
    (tmp_path / "data/CelebAHQ256").mkdir(parents=True)
    environment = lmdb.open(str(tmp_path / "data/CelebAHQ256/validation.lmdb"), map_size=2**24)
    with environment, environment.begin(write=True) as transaction:
        for index in range(2):
            pixels = torch.full((256, 256, 3), 60 * (index + 1), dtype=torch.uint8)
            transaction.put(str(index).encode(), pixels.numpy().tobytes())
    options = [
        "--output_dir",
        tmp_path,
        "--root",
        tmp_path / "data",
        "--count",
        1,
        "--temperatures",
        1,
    ]
    here("--model", "CelebAHQ256", "--elbo", "--sampling", *options)
    results = json.loads((tmp_path / "figs/CelebAHQ256/results.json").read_text())
    assert results["elbo"]["images"] == 2 and results["elbo"]["bits_per_dim"] > 0
    assert Image.open(tmp_path / "figs/CelebAHQ256/samples_t1.00/0000.png").size == (256, 256)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --model --checkpoint is required"),
        (["--model", "a", "--checkpoint", "b"], "not allowed with argument"),
        (["--model", "a"], "nothing to do: ask for --elbo, --likelihood, --disentanglement"),
        (["--model", "a", "--elbo", "--batch", "0"], "--batch must be at least 1; got 0"),
        (["--model", "a", "--elbo", "--limit", "0"], "--limit must be at least 1; got 0"),
        (
            ["--model", "a", "--sampling", "--temperatures", "-1"],
            "--temperatures must be 0 or more; got -1.0",
        ),
        (
            ["--model", "a", "--sampling", "--temperatures", "nan"],
            "--temperatures must be a finite number; got nan",
        ),
        (["--model", "a", "--likelihood", "--chunk", "0"], "--chunk must be at least 1; got 0"),
        (
            ["--model", "a", "--likelihood", "--processes", "0"],
            "--processes must be at least 1; got 0",
        ),
        (
            ["--model", "a", "--interpolation", "--frames", "1"],
            "--frames must be at least 2; got 1",
        ),
        (
            ["--model", "a", "--interpolation", "--images", "1"],
            "--interpolation takes --images in pairs; got 1",
        ),
        (
            ["--model", "a", "--neighborhood", "--images", "-2"],
            "--images must be 0 or more; got -2",
        ),
        (
            ["--model", "a", "--elbo", "--device", "tpu9"],
            "--device must be auto, cpu, cuda, cuda:N or mps; got tpu9",
        ),
        (
            ["--model", "a", "--elbo", "--device", "mps"],
            "--device mps: this machine has no GPU of Apple's",
        ),
        (["--model", "a", "--elbo", "--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--model", "absent", "--elbo"], "--model absent: none of"),
        (["--checkpoint", "absent.ckpt", "--elbo"], "no checkpoint at absent.ckpt"),
        (["--model", "a", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, *(["--output_dir", str(tmp_path)] if flags else [])])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("evaluate.py: error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_missing_data_are_one_line(finished, tmp_path, capfd):
    best = str(finished / "checkpoints/tiny/best.ckpt")
    refusal = refused_here(
        capfd, "--checkpoint", best, "--elbo", "--root", tmp_path, "--output_dir", tmp_path
    )
    assert "bash data/ImageNet32/get_imagenet_data.sh" in refusal


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--interpolation", "--layers", "1", "3"],
            "--layers must be 1 ... 2 (the model's depth); got 3",
        ),
        (
            ["--neighborhood", "--images", "4", "11"],
            "--images must be below 11, the number of validation images",
        ),
        (
            ["--overfitting", "--neighbors", "33"],
            "--neighbors 33: ImageNet32 has 32 training images",
        ),
        (
            ["--overfitting", "--queries", "absent.png"],
            "--queries: absent.png cannot be read as a picture",
        ),
    ],
)
def test_flags_that_do_not_fit_the_model_or_data_are_one_line(
    flags, message, finished, tmp_path, capfd
):
    best = str(finished / "checkpoints/tiny/best.ckpt")
    count = ["--count", "1", "--temperatures", "1"]
    assert message in refused_here(
        capfd, "--checkpoint", best, *flags, *count, "--output_dir", tmp_path
    )
    assert not (tmp_path / "figs/tiny/results.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "results.json is damaged"),
        ("[]", "holds no results"),
        ('{"elbo": 3}', "holds no results"),
        ('{"elbo": {"rate": NaN}}', "NaN is no number"),
        ("[" * 100_000, "results.json is damaged"),
    ],
    ids=["cut", "list", "number", "nan", "deep"],
)
def test_damaged_results_are_not_overwritten(content, message, finished, tmp_path, capfd):
    (tmp_path / "figs/tiny").mkdir(parents=True)
    (tmp_path / "figs/tiny/results.json").write_text(content)
    best = finished / "checkpoints/tiny/best.ckpt"
    assert message in refused_here(
        capfd, "--checkpoint", best, "--sampling", "--output_dir", tmp_path
    )
    assert (tmp_path / "figs/tiny/results.json").read_text() == content


def kept_by(tmp_path, compute) -> None:
    """Carries out an evaluation that computes so."""
    entry = SimpleNamespace(name="toy", compute=compute, lines=lambda result, context: ["toy: 7"])
    evaluate.evaluate([entry], SimpleNamespace(folder=tmp_path), {"seed": 0})


@pytest.mark.parametrize("damage", ["text", "folder", "pipe"])
def test_a_result_is_kept_though_those_before_it_were_damaged_meanwhile(tmp_path, capfd, damage):
    def compute(context):
        path = tmp_path / "results.json"
        {"text": lambda: path.write_text("{"), "folder": path.mkdir}.get(
            damage, lambda: os.mkfifo(path)
        )()
        return {"images": 1}

    kept_by(tmp_path, compute)
    assert read_results(tmp_path / "results.json") == {"toy": {"images": 1, "seed": 0}}
    printed = capfd.readouterr()
    assert "toy: 7" in printed.out and (tmp_path / "results.json.damaged1").exists()
    assert "was damaged; it is now" in printed.err


def test_a_result_that_cannot_be_kept_is_printed(tmp_path, capfd, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*results\.json'"):
        kept_by(tmp_path, lambda context: {"images": 1})
    assert "toy: 7" in capfd.readouterr().out


def test_a_result_that_is_not_finite_is_one_line(tmp_path, capfd):
    with pytest.raises(ConfigError, match="--toy: the result holds numbers that are not finite"):
        kept_by(tmp_path, lambda context: {"scores": [{"x": float("nan")}]})
    assert "toy: 7" in capfd.readouterr().out and not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "folder"])
def test_an_owner_that_is_no_file_is_one_line(tmp_path, make):
    (tmp_path / "a").mkdir()
    make(tmp_path / "a/.weights")
    with pytest.raises(ConfigError, match=r"\.weights is not a file: move it away"):
        results_folder(tmp_path, "a", "0" * 12)


def test_folders_that_cannot_be_written_are_one_line(finished, tmp_path, capfd):
    (tmp_path / "figs").write_text("a file")
    best = finished / "checkpoints/tiny/best.ckpt"
    for task in ("--elbo", "--sampling", "--likelihood"):
        options = ["--output_dir", tmp_path, "--limit", 1, "--count", 1, "--importance_samples", 1]
        assert "Not a directory" in refused_here(capfd, "--checkpoint", best, task, *options)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused(value, finished, tmp_path, capfd):
    checkpoint = torch.load(finished / "checkpoints/tiny/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["average.module.h"].view(-1)[1] = float(value)
    write_checkpoint(checkpoint, tmp_path / "diverged.ckpt")
    for task in ("--elbo", "--likelihood", "--sampling"):
        command = ["--checkpoint", tmp_path / "diverged.ckpt", "--output_dir", tmp_path]
        refusal = refused_here(capfd, *command, task)
        assert "its weights h are not finite: did training diverge?" in refusal
    assert not (tmp_path / "figs").exists()


class NotPlain:
    pass


def test_files_that_are_no_checkpoint_are_one_line(finished, tmp_path, capfd):
    whole = (finished / "checkpoints/tiny/best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}, "hyper_parameters": NotPlain()}, tmp_path / "unsafe.ckpt")
    torch.save({"state_dict": {}, "global_step": 0}, tmp_path / "other.ckpt")
    checkpoint = torch.load(finished / "checkpoints/tiny/best.ckpt", weights_only=True)
    del checkpoint["state_dict"]["average.module.h"]
    write_checkpoint(checkpoint, tmp_path / "lacking.ckpt")
    expected = {
        "cut": "is not a checkpoint, or is cut off",
        "text": "is not a checkpoint, or is cut off",
        "empty": "is not a checkpoint, or is cut off",
        "unsafe": "only tensors and plain values are loaded",
        "other": "is not a checkpoint of this project: it lacks hyper_parameters",
        "lacking": 'Missing key(s) in state_dict: "h"',
    }
    for name, message in expected.items():
        with pytest.raises(SystemExit) as stop:
            evaluate.main(
                [
                    "--checkpoint",
                    str(tmp_path / f"{name}.ckpt"),
                    "--elbo",
                    "--output_dir",
                    str(tmp_path),
                ]
            )
        assert stop.value.code == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert (
            line.startswith("evaluate.py: error: ") and f"{name}.ckpt" in line and message in line
        )
    assert not (tmp_path / "figs").exists()
