"""The benchmarks of tables, training steps, loaders and kernels: that they run, and that they
refuse what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY, run

from benchmarks import common, kernel_check, table5_parameters, table6_runtime, train_step
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


def test_parameters_of_the_specification(tmp_path):
    assert len(result_of(table5_parameters, tmp_path)["rows"]) == 5
    table5_parameters.main(["--output", str(tmp_path / "full.json")])
    rows = json.loads((tmp_path / "full.json").read_text())["rows"]
    counts = [row["parameters"] for row in rows]
    assert counts == [360_200, 1_000_200, 561_600, 1_042_800, 2_005_200]  # SPEC, cost model


def test_parameters_that_are_wrong_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(table5_parameters, "expected", lambda name, channels: 1)
    with pytest.raises(SystemExit, match="conv3 has 584 parameters, its equations have 1"):
        result_of(table5_parameters, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_table_6(tmp_path):
    rows = result_of(table6_runtime, tmp_path, "--device", "cpu", "--no_memory")["rows"]
    names = ["conv3", "conv5", "sdn1/auto", "sdn2/auto", "sdn4/auto"]
    assert [(row["scale"], row["layer"]) for row in rows] == [
        (scale, name) for scale in (4, 5) for name in names
    ]
    for row in rows:
        assert (
            min(row["forward_ms"], row["backward_ms"]) > 0
            and min(row["forward_std"], row["backward_std"]) >= 0
        )
        assert (row["forward_over_conv3"] == 1) == (row["layer"] == "conv3")


def test_training_steps(tmp_path, capsys):
    result = result_of(train_step, tmp_path, "--device", "cpu", "--steps", "30", *SOME)
    assert [row["contender"] for row in result["rows"]] == SOME[1:]
    before, after = result["training"]["bits_per_dim"]
    assert after < before
    assert "30 steps in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "benchmark, arguments", [(train_step, SOME), (table6_runtime, ["--no_memory"])]
)
@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_wrong_sweeps_are_not_timed(monkeypatch, tmp_path, benchmark, arguments, wrong):
    correct = sdn.correct_lines

    def broken(lines, *parameters, backend, **flags):
        corrected = correct(lines, *parameters, backend=backend, **flags)
        if backend == "reference":
            return corrected
        return corrected * 1.01 if wrong == "output" else 2 * corrected - corrected.detach()

    monkeypatch.setattr(sdn, "correct_lines", broken)
    with pytest.raises(SystemExit, match="auto is not timed"):
        result_of(benchmark, tmp_path, "--device", "cpu", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_learn_ends_the_benchmark(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.optim.Adamax, "step", lambda self: None)
    torch.manual_seed(0)
    with pytest.raises(SystemExit, match="auto does not learn"):
        options = ["--device", "cpu", "--steps", "1", "--contenders", "auto"]
        result_of(train_step, tmp_path, *options)


def test_kernels_are_checked(monkeypatch, tmp_path, capsys):
    result = result_of(kernel_check, tmp_path, "--device", "cpu")
    assert result["failures"] == [] and result["cases"] >= 60
    assert "agree with the reference" in capsys.readouterr().out

    original = sdn._sweep_backward_torch

    def broken(*arguments):
        grad_lines, *others = original(*arguments)
        return torch.empty_like(grad_lines), *others

    monkeypatch.setattr(sdn, "_sweep_backward_torch", broken)
    with pytest.raises(SystemExit):
        kernel_check.main(["--quick", "--device", "cpu"])
    assert "grad lines differs between two runs" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    "benchmark, arguments",
    [
        (table5_parameters, ["--channels", "0"]),
        (table6_runtime, ["--repeats", "1"]),
        (train_step, ["--rounds", "0"]),
        (kernel_check, ["--nothing"]),
    ],
)
def test_wrong_flags(benchmark, arguments):
    with pytest.raises(SystemExit) as refusal:
        benchmark.main(arguments)
    assert refusal.value.code == 2


@pytest.mark.slow
def test_memory_of_the_recipes_is_that_of_a_real_step(tmp_path):
    """The program itself compares; here that it does. In a process of its own: it sets Triton's
    interpreter."""
    output = tmp_path / "memory.json"
    done = run("-m benchmarks.recipe_memory", "--quick", "--output", output)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())["verified"]
    assert (
        found["computed_mib"] == pytest.approx(found["allocated_mib"], rel=0.1)
        and found["computed_mib"] > 10
    )


def test_memory_of_a_layer_is_that_of_a_real_step(tmp_path):
    pytest.importorskip("triton")
    output = tmp_path / "memory.json"
    choice = ("--scales", 16, "--directions", 2, "--precisions", "bfloat16")
    done = run("-m benchmarks.layer_memory", *choice, "--output", output)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    for found in result["verified"]:
        assert (
            found["computed_mib"] == pytest.approx(found["allocated_mib"], rel=0.1)
            and found["computed_mib"] > 10
        )
    (row,) = result["rows"]
    # 12.5 MiB a feature map: seven are kept, a sweep's buffers take eight more; the yardstick keeps
    # ten for each sweep.
    assert (
        12.5 * 14 < row["triton_mib"] < 12.5 * 17
        and row["torch_mib"] > 12.5 * 20 < row["yardstick_mib"]
    )
    done = run("-m benchmarks.layer_memory", "--batch", 0)
    assert done.returncode == 2 and done.stderr.endswith("error: all numbers must be at least 1\n")


@pytest.mark.slow
def test_the_check_of_a_gpu_is_ready(tmp_path):
    """The path for a CPU, which takes the same steps at sizes of seconds."""
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", "benchmarks/gpu_check.sh", str(tmp_path / "results"), "--cpu"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " 0 failed" in done.stdout and (
        tmp_path / "results/log.txt"
    ).read_text().strip().endswith("results")
    assert len(list((tmp_path / "results").glob("*.json"))) >= 6
