"""The registry: a new evaluation is one file; and what single evaluations find on small data."""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY, SMALL_SDN

import evaluate
import lib.evaluation
from lib.config import ConfigError
from lib.DensityVAE import DensityVAE
from lib.evaluation import registry
from lib.evaluation.options import make_parser
from lib.evaluation.registry import Context, Flag, evaluations
from lib.synthesis import reconstruct

TOY = """
from .registry import Evaluation, Flag, register


@register
class Brightness(Evaluation):
    name = "brightness"
    help = "how bright the validation images are"
    flags = (Flag("gain", "factor of the brightness", type=float, default=1.0, least=0, most=9),)
    needs = ("validation",)
    title = "Brightness of the data"
    paper = "nowhere"
    explanation = "The mean level of the validation images."

    def compute(self, context):
        images = [context.validation[index] for index in range(context.limit)]
        mean = sum(image.double().mean().item() for image in images) / len(images)
        return {"brightness": context.flags.gain * mean}

    def lines(self, result, context):
        return [f"brightness: {result['brightness']:.2f}"]
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """One file more in the folder of evaluations."""
    evaluations()  # those that stay
    (tmp_path / "more").mkdir()
    (tmp_path / "more/brightness.py").write_text(TOY)
    path = [*lib.evaluation.__path__, str(tmp_path / "more")]
    monkeypatch.setattr(lib.evaluation, "__path__", path)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    yield
    sys.modules.pop("lib.evaluation.brightness", None)
    vars(lib.evaluation).pop("brightness", None)


def test_a_new_evaluation_is_one_file(toy, finished, tmp_path, capfd):
    best = str(finished / "checkpoints/tiny/best.ckpt")
    command = ["--checkpoint", best, "--output_dir", str(tmp_path), "--brightness", "--report"]
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    told = " ".join(capfd.readouterr().out.split())
    assert "--brightness how bright the validation images are" in told
    assert "--gain GAIN --brightness: factor of the brightness (default: 1.0)" in told

    with pytest.raises(SystemExit):
        evaluate.main([*command, "--gain", "-1"])
    assert "--gain must be 0 or more; got -1.0" in capfd.readouterr().err
    evaluate.main([*command, "--gain", "2", "--limit", "3"])
    folder = tmp_path / "figs/tiny"
    result = json.loads((folder / "results.json").read_text())["brightness"]
    assert 0 < result["brightness"] < 510 and result["weights"]
    assert f"brightness: {result['brightness']:.2f}\n" in capfd.readouterr().out
    page = (folder / "report.html").read_text()
    for text in ("Brightness of the data", "In the paper: nowhere", f"{result['brightness']:.6g}"):
        assert text in page


def test_evaluations_are_found_in_order_and_have_flags_of_one_name_in_common():
    names = (
        "elbo likelihood disentanglement latents reconstruction sampling interpolation traversal "
        "neighborhood overfitting"
    )
    assert list(evaluations()) == names.split()
    flags = [flag for evaluation in evaluations().values() for flag in evaluation.flags]
    assert len({flag.name for flag in flags}) == len(set(flags))
    make_parser("").parse_args(["--model", "x"])


def test_the_documented_table_has_each_evaluation():
    page = (REPOSITORY / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    assert rows == [
        f"| `--{name}` | {evaluation.help} | {evaluation.paper or '–'} |"
        for name, evaluation in evaluations().items()
    ]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (Flag("n", "", least=1), 0, "--n must be at least 1; got 0"),
        (Flag("n", "", least=0), [3, -2], "--n must be 0 or more; got 3 -2"),
        (Flag("n", "", least=1), 10**9 + 1, "--n must be at most 1000000000; got 1000000001"),
        (Flag("n", "", type=float, least=0, most=2), [float("nan")], "--n must be a finite"),
    ],
)
def test_values_outside_the_range_of_a_flag_are_refused(flag, value, message):
    with pytest.raises(ConfigError, match=message):
        flag.check(argparse.Namespace(n=value))


def test_what_is_given_twice_counts_once():
    flags = argparse.Namespace(n=[3, 1, 3])
    Flag("n", "", least=0, unique=True).check(flags)
    assert flags.n == [3, 1]


@pytest.fixture
def noise_images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (20, 3, 8, 12), dtype=torch.uint8, generator=generator)


def context_of(nbits: int, images: torch.Tensor, folder, **flags) -> Context:
    torch.manual_seed(0)
    model = DensityVAE((8, 12), **SMALL_SDN | dict(nbits=nbits)).eval()
    config = SimpleNamespace(nbits=nbits, dataset="random")
    return Context(
        SimpleNamespace(model=model, config=config),
        argparse.Namespace(**dict(seed=0, batch=4, images=[0, 1]) | flags),
        folder,
        open_split=lambda split: images,
        in_batches=lambda data, limit, batch: [
            (data[:13], torch.arange(13)),
            (data[13:], torch.arange(13, 20)),
        ],
        reopen=None,
        mirrored=True,
    )


@pytest.mark.parametrize("nbits", [3, 5, 8])
def test_the_error_of_a_reconstruction_is_in_the_models_bits(
    nbits, noise_images, tmp_path, monkeypatch
):
    """A perfect reconstruction has none, however few bits the model sees."""
    context = context_of(nbits, noise_images, tmp_path, count=6)
    observation = context.model.observation
    seen = observation.to_uint8(observation.encode(noise_images[:6]))
    quantized = 2.0 ** (8 - nbits)
    monkeypatch.setattr("lib.evaluation.reconstruction.reconstruct", lambda *_, **__: seen)
    result = evaluations()["reconstruction"].compute(context)
    assert result["mse"] == 0 and result["nbits"] == nbits
    expected = (noise_images[:6].double() - seen.double()).square().mean().item()
    assert result["mse_8_bits"] == pytest.approx(expected)
    assert (result["mse_8_bits"] > quantized) == (nbits < 8)

    monkeypatch.undo()
    drawn = reconstruct(context.model, noise_images[:6], indices=range(6), seed=0, batch=4)
    found = evaluations()["reconstruction"].compute(context)["mse"]
    assert found == pytest.approx((seen.double() - drawn.double()).square().mean().item())


@pytest.mark.parametrize("nbits", [8, 5])
def test_nearest_training_images_of_copies_are_found(nbits, noise_images, tmp_path):
    """Queries that are training images, one of them flipped, are caught; in 5 bits as well."""
    context = context_of(nbits, noise_images, tmp_path, queries=["given"], neighbors=2)
    observation = context.model.observation
    given = observation.to_uint8(observation.encode(noise_images[[3, 4, 11]]))
    assert torch.equal(given, noise_images[[3, 4, 11]]) == (nbits == 8)
    given[2] = given[2].flip(-1)
    context.kept["queries"] = given
    result = evaluations()["overfitting"].compute(context)
    nearest = [of_query[0] for of_query in result["neighbours"]]
    assert [(n["index"], n["mse"], n["mirrored"]) for n in nearest] == [
        (3, 0, False),
        (4, 0, False),
        (11, 0, True),
    ]
    assert all(of_query[1]["mse"] > 0 for of_query in result["neighbours"])
    assert result["searched"] == 20 and result["nearest_mse"] == 0
    (picture,) = result["pictures"]
    assert picture["file"] == "nearest_queries.png" and (tmp_path / picture["file"]).is_file()
