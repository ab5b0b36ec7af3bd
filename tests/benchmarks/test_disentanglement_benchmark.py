"""The benchmark of the disentanglement experiments: what it writes, and that nothing wrong is
timed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import disentanglement
from data import scenes
from data.convert import shapes3d

h5py = pytest.importorskip("h5py")
pytest.importorskip("sklearn")

SCENES = 480
LABELS = scenes.all_labels()[:SCENES]
TINY = (
    "--batches 3 --batch 16 --workers 0 --features 4 --steps 1 --points 150 --trees 1 --rounds 1 "
    "--device cpu"
).split()


@pytest.fixture
def few_scenes(monkeypatch):
    """3D-Shapes ends after 480 scenes, those of the first hues."""
    monkeypatch.setattr(scenes, "SCENES", SCENES)
    monkeypatch.setattr(scenes, "all_labels", lambda: LABELS)


@pytest.fixture
def nothing_is_timed(monkeypatch):
    def refuse(*_):
        raise AssertionError("timed before the checks")

    monkeypatch.setattr(disentanglement, "take_turns", refuse)
    monkeypatch.setattr(disentanglement.common, "seconds", refuse)


@pytest.mark.usefixtures("few_scenes")
def test_the_files(tmp_path, capsys):
    root, out = tmp_path / "root", tmp_path / "out/result.json"
    disentanglement.main([*TINY, "--root", str(root), "--output", str(out)])
    result = json.loads(out.read_text())
    with h5py.File(root / "3DShapes/3dshapes.h5") as file:
        assert file["images"].compression == "gzip" and file["images"].shape == (SCENES, 64, 64, 3)
        assert np.array_equal(file["labels"], LABELS)
    read = {"read": "3dshapes.uncompressed.h5", "source": "3dshapes.h5", "compression": "gzip"}
    assert result["file"] == read

    loaders = [(row["dataset"], row["workers"], row["target"]) for row in result["loaders"]]
    assert loaders == [("Shapes3DRendered", 0, 20_000), ("3DShapes", 0, 5_000)]
    assert all(row["images/s"] > 0 for row in result["loaders"])
    cnn, sdn = result["training"]
    assert (cnn["decoder"], cnn["times CNN's seconds"], sdn["decoder"]) == ("CNN", 1, "SDN")
    assert sdn["times CNN's seconds"] == pytest.approx(cnn["iterations/s"] / sdn["iterations/s"])
    assert result["encoder"]["batch"] == 512 and result["encoder"]["images/s"] > 0
    assert [row["metric"] for row in result["metrics"]] == [
        "beta_vae",
        "factor_vae",
        "mig",
        "dci",
        "sap",
    ]
    assert all(row["seconds"] > 0 and 0 <= row["score"] <= 1 for row in result["metrics"])
    assert result["metrics"][3]["sizes"] == {"trees": 1, "train": 150, "test": 75}
    assert {"date", "command", "machine", "versions", "threads"} <= set(result)
    assert result["command"].startswith("python -m benchmarks.disentanglement --batches 3")
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("| 3DShapes |", "| SDN |", "| dci |"))


def test_what_is_left_out_is_said(tmp_path, capsys):
    out = tmp_path / "result.json"
    left_out = ["--skip_hdf5", "--skip_dci", "--workers", "2"]
    disentanglement.main([*TINY, *left_out, "--output", str(out)])
    result = json.loads(out.read_text())
    assert result["file"] is None and [row["workers"] for row in result["loaders"]] == [2]
    (dci,) = [row for row in result["metrics"] if row["metric"] == "dci"]
    assert dci["seconds"] is None and "| dci |  |  |" in capsys.readouterr().out


@pytest.mark.usefixtures("few_scenes", "nothing_is_timed")
@pytest.mark.parametrize("wrong", ["order", "labels", "file"])
def test_refuses_loaders_that_give_something_else(tmp_path, monkeypatch, wrong):
    arguments = [*TINY, "--root", str(tmp_path), "--output", str(tmp_path / "out")]
    if wrong == "order":
        correct = disentanglement.Shapes3DRendered._images
        monkeypatch.setattr(
            disentanglement.Shapes3DRendered, "_images", lambda *given: correct(*given).flip(0)
        )
        message = "Shapes3DRendered is not timed: a batch differs from"
    elif wrong == "labels":
        correct = scenes.Scenes.labels
        monkeypatch.setattr(
            scenes.Scenes, "labels", lambda self, indices: correct(self, indices).flip(1)
        )
        message = "Shapes3DRendered is not timed: a batch differs from the scenes' labels"
    else:
        disentanglement.prepare_file(tmp_path)
        shapes3d.convert(path := tmp_path / "3DShapes/3dshapes.h5")
        with h5py.File(shapes3d.existing_copy(path), "r+") as file:
            file["images"][:] = file["images"][:][::-1]
        message = "3DShapes is not timed: a batch differs from the file's images"
    with pytest.raises(SystemExit) as refusal:
        disentanglement.main(arguments)
    assert message in str(refusal.value.code)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_timed")
@pytest.mark.parametrize("wrong", ["loss", "gradient", "beta_vae", "factor_vae"])
def test_refuses_wrong_training_and_metrics(tmp_path, monkeypatch, wrong):
    if wrong in disentanglement.METRICS:
        monkeypatch.setitem(disentanglement.METRICS, wrong, lambda *_, **__: {"score": 0.9})
        message = f"metrics are not timed: {wrong} of a perfect code is 0.900"
    else:
        correct = disentanglement.objective

        def broken(output, **options):
            value = correct(output, **options)
            if value.dtype == torch.float64:
                return value
            return (
                1.001 * value
                if wrong == "loss"
                else value.detach() + 1.001 * (value - value.detach())
            )

        monkeypatch.setattr(disentanglement, "objective", broken)
        message = f"training is not timed: the {wrong}"
    with pytest.raises(SystemExit) as refusal:
        disentanglement.main([*TINY, "--skip_hdf5", "--output", str(tmp_path / "out")])
    assert message in str(refusal.value.code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--rounds 0", "--workers -1", "--points 0", "--nonsense 1"])
def test_wrong_flags(flags):
    with pytest.raises(SystemExit) as refusal:
        disentanglement.main(flags.split())
    assert refusal.value.code == 2
