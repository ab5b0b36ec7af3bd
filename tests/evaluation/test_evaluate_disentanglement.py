"""Evaluating a β-VAE: scores, traversals, what does not apply to it; and the pieces behind."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers import assert_one_line_error, run
from PIL import Image

import evaluate
from data.sets.shapes3d_rendered import Shapes3DRendered
from lib.DisentanglementVAE import DisentanglementVAE
from lib.DisentanglementVAE.metrics import MetricError, beta_vae, factor_vae
from lib.evaluation.disentanglement import FewerLevels, disentanglement_scores
from lib.synthesis import encode, interpolate, reconstruct, sample_images, traverse

LEVELS = ["--levels", 2, 2, 2, 2, 4, 2]


class Counted:
    """Three factors of 4, 3 and 5 levels; an image's first three pixels are its levels."""

    factor_sizes = (4, 3, 5)

    def images(self, factors: np.ndarray) -> torch.Tensor:
        images = torch.zeros(len(factors), 3, 64, 64, dtype=torch.uint8)
        images[:, 0, 0, :3] = torch.as_tensor(factors).to(torch.uint8)
        return images


@pytest.fixture(scope="module")
def evaluated(beta_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    tasks = [
        "--elbo",
        "--limit",
        16,
        "--disentanglement",
        *LEVELS,
        "--latents",
        "--traversal",
        "--images",
        3,
        4,
    ]
    tasks += [
        "--interpolation",
        "--reconstruction",
        "--sampling",
        "--count",
        4,
        "--frames",
        3,
        "--report",
    ]
    tasks += ["--likelihood", "--importance_samples", 4]
    done = run(
        "evaluate.py",
        "--checkpoint",
        beta_run / "checkpoints/beta/last.ckpt",
        *tasks,
        "--output_dir",
        folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads((folder / "figs/beta/results.json").read_text())


def test_numbers_are_kept(evaluated):
    _, done, results = evaluated
    elbo, scores = results["elbo"], results["disentanglement"]
    assert len(elbo["rate_per_dimension"]) == 3 and sum(
        elbo["rate_per_dimension"]
    ) == pytest.approx(elbo["rate"])
    assert elbo["nats"] == pytest.approx(elbo["bits_per_dim"] * 64 * 64 * 3 * math.log(2))
    assert f"{elbo['nats']:.1f} nats (16 images)" in done.stdout
    assert scores["levels"] == [2, 2, 2, 2, 4, 2] and scores["images"] == 128
    assert list(scores["scores"]) == ["beta_vae", "factor_vae", "mig", "sap"], "dci takes minutes"
    for name, values in scores["scores"].items():
        assert 0 <= values["score"] <= 1 and f"{name}: {values['score']:.4f}" in done.stdout
    assert results["likelihood"]["bits_per_dim"] <= elbo["bits_per_dim"] + 0.01
    assert results["latents"]["rate_per_dimension"] == elbo["rate_per_dimension"]


def test_pictures_are_as_large_as_what_they_show(evaluated):
    folder, _, results = evaluated
    pictures = {p["file"] for result in results.values() for p in result.get("pictures", ())}
    assert {
        "traversal_3.png",
        "traversal_4.png",
        "interpolation_3_4.png",
        "latents.png",
    } <= pictures
    with Image.open(folder / "figs/beta/traversal_3.png") as picture:
        assert picture.width > 4 * 64 and picture.height > 3 * 64, (
            "3 dimensions; the image and 3 frames"
        )
    page = (folder / "figs/beta/report.html").read_text()
    for text in ("Latent traversals", "FactorVAE", "Rate of each latent dimension", "Figure 7"):
        assert text in page


def test_results_are_reproducible(evaluated, beta_run, tmp_path):
    _, _, results = evaluated
    checkpoint = beta_run / "checkpoints/beta/last.ckpt"
    again = [
        "--disentanglement",
        *LEVELS,
        "--metrics",
        "factor_vae",
        "factor_vae",
        "--output_dir",
        tmp_path,
    ]
    assert run("evaluate.py", "--checkpoint", checkpoint, *again).returncode == 0
    scores = json.loads((tmp_path / "figs/beta/results.json").read_text())["disentanglement"][
        "scores"
    ]
    assert scores == {"factor_vae": results["disentanglement"]["scores"]["factor_vae"]}


WRONG = [
    (
        ["--neighborhood"],
        "--neighborhood keeps some layers of a model with several; this one has one",
    ),
    (
        ["--disentanglement", "--levels", 1, 2, 2, 2, 2, 2],
        "--levels must be 6 numbers from 2 to 10 10 10 8 4 15; got 1",
    ),
    (["--disentanglement", "--levels", 2, 2], "--levels must be 6 numbers"),
    (["--disentanglement", "--levels", 2, 2, 2, 2, 5, 2], "--levels must be 6 numbers"),
    (["--disentanglement", "--metrics", "fid"], "argument --metrics: invalid choice: 'fid'"),
    (["--interpolation", "--layers", 2], "--layers must be 1 ... 1"),
    (["--traversal", "--images", 10_000], "--images must be below 10000"),
    (["--traversal", "--frames", 1], "--frames must be at least 2"),
]


@pytest.mark.parametrize(
    ("flags", "message"), WRONG, ids=[" ".join(map(str, flags)) for flags, _ in WRONG]
)
def test_what_cannot_be_is_one_line(flags, message, beta_run, tmp_path, capfd):
    checkpoint = beta_run / "checkpoints/beta/last.ckpt"
    common = ["--checkpoint", checkpoint, "--elbo", "--limit", 1, "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*map(str, common), *map(str, flags)])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("evaluate.py: error: ") and message in line
    assert not list(tmp_path.iterdir()), "nothing is computed before the flags are right"


@pytest.mark.parametrize("task", ["disentanglement", "traversal"])
def test_a_density_vae_has_no_such_representation(task, finished, images):
    done = run(
        "evaluate.py", "--model", "tiny", f"--{task}", "--root", images, "--output_dir", finished
    )
    assert_one_line_error(
        done, f"--{task} is for models of --task disentanglement; this one is of density_estimation"
    )


def test_fewer_levels_are_spread_from_the_first_to_the_last():
    fewer = FewerLevels(Counted(), [2, 3, 3])
    factors = np.stack(np.meshgrid(range(2), range(3), range(3), indexing="ij"), axis=-1).reshape(
        -1, 3
    )
    expected = [[(0, 3)[a], b, (0, 2, 4)[c]] for a, b, c in factors]
    assert fewer.images(factors)[:, 0, 0, :3].tolist() == expected
    scenes = Shapes3DRendered()
    everything = FewerLevels(scenes, scenes.factor_sizes)
    some = np.random.default_rng(0).integers(scenes.factor_sizes, size=(5, 6))
    assert torch.equal(everything.images(some), scenes.images(some))


class Levels(torch.nn.Module):
    """A model whose representation is the levels of `Counted`, or nothing."""

    device, dtype = torch.device("cpu"), torch.float32

    class observation:  # noqa: N801 - an attribute of models
        encode = staticmethod(lambda images: images.float())

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def represent(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x[:, 0, 0, :3]


def test_scores_are_those_of_the_representation():
    seen = []
    given = dict(seed=3, progress=seen.append)
    result = disentanglement_scores(Levels(1.0), Counted(), ["beta_vae", "factor_vae"], **given)
    assert sum(seen) == result["images"] == 60 and result["remarks"] == []
    codes = np.stack(np.unravel_index(range(60), (4, 3, 5)), axis=1).astype(float)
    assert result["scores"]["beta_vae"] == beta_vae(codes, Counted(), seed=3)
    assert result["scores"]["factor_vae"] == factor_vae(codes, Counted(), seed=3)
    assert result["scores"]["factor_vae"]["score"] > 0.95
    constant = disentanglement_scores(Levels(0.0), Counted(), ["factor_vae", "mig"], **given)
    assert [constant["scores"][name]["score"] for name in ("factor_vae", "mig")] == [0, 0]
    assert [remark.split(":")[0] for remark in constant["remarks"]] == ["factor_vae", "mig"]


def test_data_without_factors_have_no_score():
    with pytest.raises(
        MetricError, match="list has no factors of variation; a metric needs a data set with"
    ):
        disentanglement_scores(Levels(1.0), [], ["mig"], seed=0, progress=len)
    with pytest.raises(MetricError, match="list has no factors of variation"):
        FewerLevels([], [2, 2])


@pytest.fixture(scope="module")
def model() -> DisentanglementVAE:
    torch.manual_seed(0)
    model = DisentanglementVAE(z_size=3).eval()
    for linear in model.decoder[:3:2]:
        torch.nn.init.normal_(linear.weight, std=0.3)  # so that images depend on z
    return model


def test_a_traversal_changes_one_dimension(model):
    image = Shapes3DRendered()[123_456].unsqueeze(0)
    frames = traverse(model, image, values=5, batch=4, span=1.5)
    assert frames.shape == (15, 3, 64, 64) and frames.dtype == torch.uint8
    with torch.no_grad():
        z = model.represent(model.observation.encode(image))
        for dimension in range(3):
            for number, value in enumerate((-1.5, -0.75, 0.0, 0.75, 1.5)):
                changed = z.clone()
                changed[0, dimension] = value
                decoded = model.observation.to_uint8(
                    model.observation.most_probable(model.decode([changed]))
                )
                assert (decoded[0].int() - frames[5 * dimension + number].int()).abs().max() <= 1
    assert not torch.equal(frames[0], frames[4])
    with pytest.raises(ValueError, match="values must be at least 2, got 1"):
        traverse(model, image, values=1, batch=4)


def test_an_interpolation_goes_from_one_image_to_the_other(model):
    scenes = Shapes3DRendered()
    images = torch.stack([scenes[5], scenes[400_000]])
    noise = dict(seed=0, batch=3)
    (z,) = encode(model, images, [0, 1], **noise)
    frames = interpolate(model, [z[:1]], [z[1:]], layers=1, temperature=1.0, frames=5, **noise)
    ends = reconstruct(model, images, **noise)
    for frame, end in zip(frames[[0, -1]], ends, strict=True):
        assert (frame.int() - end.int()).abs().max() <= 1
    assert sample_images(model, 4, 1.0, **noise).shape == (4, 3, 64, 64)
