"""The benchmarks of the layer and of a GPU: that they run, and that they refuse to time a layer or
a backend that is wrong."""

import json
import os
import subprocess
import sys

import pytest
from helpers import REPOSITORY

from benchmarks import gpu_check, layer
from lib import nn as sdn
from lib.sweeps import lines_backend, selection

TINY = ["--channels", "4", "--batch", "2", "--directions", "1", "2", "--repeats", "2"]


def test_table_and_file(tmp_path, capsys):
    output = tmp_path / "result.json"
    flags = [*TINY, "--slow_repeats", "1", "--backends", "reference", "torch", "yardstick"]
    layer.main([*flags, "--scales", "4", "5", "--no_memory", "--output", str(output)])
    result = json.loads(output.read_text())
    backends = ("reference", "torch", "yardstick")
    names = ["conv3", "conv5"] + [f"sdn{n}/{b}" for n in (1, 2) for b in backends]
    found = [(row["scale"], row["layer"]) for row in result["rows"]]
    assert found == [(scale, name) for scale in (4, 5) for name in names]
    for row in result["rows"]:
        assert row["forward_ms"] > 0 and row["step_ms"] > 0
        assert row["rounds"] == (1 if row["layer"].endswith(("reference", "yardstick")) else 2)
        assert (row["step_over_yardstick"] is None) == row["layer"].startswith("conv")
        assert row["step_over_conv3"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 2 + len(result["rows"])


def test_parameters_are_those_of_table_5(tmp_path):
    """At 200 channels; the paper says that two directions have as many as a 5x5 convolution."""
    counts = {name: layer.expected_parameters(name, 200) for name in ("conv3", "conv5", "sdn2")}
    assert counts == {"conv3": 360_200, "conv5": 1_000_200, "sdn2": 1_042_800}
    for name in ("conv3", "conv5", "sdn1/auto", "sdn2/auto", "sdn4/auto"):
        number = sum(each.numel() for each in layer.build(name, 200).parameters())
        assert number == layer.expected_parameters(name, 200)


def test_memory(tmp_path):
    output = tmp_path / "result.json"
    flags = ["--channels", "32", "--batch", "8", "--scales", "32", "--directions", "1"]
    flags += ["--repeats", "1", "--backends", "torch", "yardstick"]
    layer.main([*flags, "--output", str(output)])
    rows = {row["layer"]: row for row in json.loads(output.read_text())["rows"]}
    torch_mib, loop_mib = (rows[f"sdn1/{name}"]["peak_mib"] for name in ("torch", "yardstick"))
    assert min(torch_mib, loop_mib) > 4  # gates alone; a feature map is 1 MiB
    assert rows["sdn1/torch"]["memory_over_yardstick"] == torch_mib / loop_mib
    assert rows["conv3"]["memory_over_yardstick"] is None


@pytest.mark.parametrize("wrong", ["output", "gradient", "parameters"])
def test_refuses_a_wrong_layer(monkeypatch, tmp_path, wrong):
    correct = sdn.correct_lines

    def broken(lines, *parameters, backend, **flags):
        corrected = correct(lines, *parameters, backend=backend, **flags)
        if backend == "reference" or wrong == "parameters":
            return corrected
        return corrected * 1.001 if wrong == "output" else 2 * corrected - corrected.detach()

    monkeypatch.setattr(sdn, "correct_lines", broken)
    if wrong == "parameters":
        monkeypatch.setattr(layer, "expected_parameters", lambda name, channels: 1)
    with pytest.raises(SystemExit) as refusal:
        layer.main([*TINY, "--scales", "4", "--output", str(tmp_path / "result.json")])
    expected = "its equations have 1" if wrong == "parameters" else "sdn1/auto is not timed"
    assert expected in str(refusal.value.code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--repeats", "0"], ["--replay"], ["--scales", "0"]], ids=str
)
def test_wrong_flags(arguments):
    with pytest.raises(SystemExit) as refusal:
        layer.main(arguments)
    assert refusal.value.code == 2


def test_gpu_check_on_a_cpu(tmp_path):
    output = tmp_path / "gpu_check.json"
    gpu_check.main(["--device", "cpu", "--output", str(output)])
    result = json.loads(output.read_text())
    assert {row["backend"] for row in result["check"]} == {"lines", "torch"}
    assert not any(row["wrong"] for row in result["check"])
    assert {row["contender"] for row in result["race"]} == {"conv3", "lines", "torch"}


def test_gpu_check_times_nothing_if_a_backend_is_wrong(tmp_path, monkeypatch):
    sweep = lines_backend.sweep
    monkeypatch.setattr(lines_backend, "sweep", lambda *a, **k: sweep(*a, **k).roll(1, 2))
    assert "lines" in selection.CANDIDATES
    output = tmp_path / "gpu_check.json"
    with pytest.raises(SystemExit, match="nothing is timed"):
        gpu_check.main(["--device", "cpu", "--output", str(output)])
    result = json.loads(output.read_text())
    assert "race" not in result
    assert {row["backend"] for row in result["check"] if row["wrong"]} == {"lines"}


@pytest.mark.slow
def test_the_script_of_a_gpu_is_ready(tmp_path):
    command = ["bash", "benchmarks/gpu_check.sh", str(tmp_path / "results"), "--cpu"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"log.txt", "gpu_check.json", "layer.json", "train_step.json"}
