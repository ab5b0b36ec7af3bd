"""The benchmarks of training steps and loaders: that they run, and that they refuse what is
wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY

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


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_wrong_sweeps_are_not_timed(monkeypatch, tmp_path, wrong):
    correct = sdn.correct_lines

    def broken(lines, *parameters, backend, **flags):
        corrected = correct(lines, *parameters, backend=backend, **flags)
        if backend == "reference":
            return corrected
        return corrected * 1.01 if wrong == "output" else 2 * corrected - corrected.detach()

    monkeypatch.setattr(sdn, "correct_lines", broken)
    with pytest.raises(SystemExit, match="auto is not timed"):
        result_of(train_step, tmp_path, "--device", "cpu", *SOME)
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

    result = result_of(loader, tmp_path, "--workers", "0")
    assert [row["dataset"] for row in result["rows"]] == ["CIFAR10", "ImageNet32", "CelebAHQ256"]
    assert all(row["images_per_s"] > 0 for row in result["rows"])

    original = loader.write_lmdb
    monkeypatch.setattr(loader, "write_lmdb", lambda folder, images: original(folder, images // 2))
    with pytest.raises(SystemExit, match="ImageNet32 is not timed"):
        loader.main(["--quick", "--workers", "0", "--datasets", "ImageNet32"])


def test_peak_memory_of_a_call():
    program = """
import torch
from benchmarks.common import peak_memory
print(peak_memory(lambda: torch.ones(2**24), "cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "None":
        pytest.skip("the peak of the resident set cannot be read here")
    assert 60 < float(done.stdout) < 80  # MiB


def test_times_are_of_turns():
    calls = []
    times = common.take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "cpu"
    )
    assert calls == ["a", "b"] * 3
    assert [len(taken) for taken in times.values()] == [2, 2]


def test_wrong_flags():
    with pytest.raises(SystemExit) as refusal:
        train_step.main(["--rounds", "0"])
    assert refusal.value.code == 2
