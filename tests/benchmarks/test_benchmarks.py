"""The benchmarks of training steps and loaders: that they run, and that they refuse what is
wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch

from benchmarks import common, train_step
from lib import nn as sdn

SOME = ["--contenders", "auto", "checkpointed", "yardstick", "cnn"]


def result_of(benchmark, tmp_path, *arguments: str) -> dict:
    """The file of a quick run, which must say where and how it came about."""
    output = tmp_path / "results/file.json"
    benchmark.main(["--quick", *arguments, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["machine"]["cores"] == os.cpu_count() and result["versions"]["torch"] == str(
        torch.__version__
    )
    assert result["command"].startswith(f"python -m {benchmark.__name__} --quick")
    return result


def test_training_steps(tmp_path, capsys):
    result = result_of(train_step, tmp_path, "--device", "cpu", "--steps", "30", *SOME)
    assert [row["contender"] for row in result["rows"]] == SOME[1:]
    before, after = result["training"]["bits_per_dim"]
    assert after < before
    assert "30 steps in" in capsys.readouterr().out


def test_training_steps_of_the_beta_vae(tmp_path):
    flags = ["--device", "cpu", "--model", "shapes3d", "--contenders", "torch", "cnn"]
    sdn_row, cnn_row = result_of(train_step, tmp_path, *flags)["rows"]
    assert sdn_row["step_ms"] == pytest.approx(sdn_row["over_cnn"] * cnn_row["step_ms"])


@pytest.mark.parametrize("model", ["cifar", "shapes3d"])
@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_wrong_sweeps_are_not_timed(monkeypatch, tmp_path, wrong, model):
    correct = sdn.correct_lines

    def broken(lines, *parameters, backend, **flags):
        corrected = correct(lines, *parameters, backend=backend, **flags)
        if backend == "reference":
            return corrected
        return corrected * 1.01 if wrong == "output" else 2 * corrected - corrected.detach()

    monkeypatch.setattr(sdn, "correct_lines", broken)
    with pytest.raises(SystemExit, match="auto is not timed"):
        flags = ["--device", "cpu", "--model", model, "--contenders", "auto"]
        result_of(train_step, tmp_path, *flags)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_learn_ends_the_benchmark(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.optim.Adamax, "step", lambda self: None)
    torch.manual_seed(0)
    with pytest.raises(SystemExit, match="auto does not learn"):
        options = ["--device", "cpu", "--steps", "1", "--contenders", "auto"]
        result_of(train_step, tmp_path, *options)


def test_loaders(tmp_path, monkeypatch):
    pytest.importorskip("lmdb")
    pytest.importorskip("pytorch_lightning")
    from benchmarks import loader
    from data.sets.shapes3d_rendered import Shapes3DRendered

    result = result_of(loader, tmp_path, "--workers", "0")
    made = ["CIFAR10", "ImageNet32", "CelebAHQ256", "Shapes3DRendered"]
    assert [row["dataset"] for row in result["rows"]] == made
    assert all(row["images_per_s"] > 0 for row in result["rows"])

    original = loader.write_lmdb
    monkeypatch.setattr(loader, "write_lmdb", lambda folder, images: original(folder, images // 2))
    with pytest.raises(SystemExit, match="ImageNet32 is not timed"):
        loader.main(["--quick", "--workers", "0", "--datasets", "ImageNet32"])
    correct = Shapes3DRendered._images
    monkeypatch.setattr(Shapes3DRendered, "_images", lambda *given: correct(*given).flip(0))
    with pytest.raises(SystemExit, match="Shapes3DRendered is not timed"):
        loader.main(["--quick", "--workers", "0", "--datasets", "Shapes3DRendered"])


def test_a_loader_without_its_file_is_one_line(tmp_path, capsys):
    pytest.importorskip("lmdb")
    from benchmarks import loader

    with pytest.raises(SystemExit) as refusal:
        loader.main(["--quick", "--datasets", "3DShapes", "--root", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert refusal.value.code == 2 and "get_3dshapes_data.sh" in line


def test_peak_memory_of_a_call():
    def run() -> torch.Tensor:
        large = torch.ones(2**24)  # 64 MiB
        small = large[: 2**20] * 2
        del large
        return small * 2

    assert common.peak_memory(run, "cpu") == pytest.approx(68, abs=0.1)


def test_times_are_of_turns():
    calls = []
    times = common.take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "cpu"
    )
    assert calls == ["a", "b"] * 3
    assert [len(taken) for taken in times.values()] == [2, 2]


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--model", "shapes3d"]], ids=str)
def test_wrong_flags(flags):
    with pytest.raises(SystemExit) as refusal:
        train_step.main(flags)
    assert refusal.value.code == 2
