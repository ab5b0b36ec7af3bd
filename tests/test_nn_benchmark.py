"""The benchmark of the layer: that it runs, and that it refuses to time a wrong layer."""

import json

import pytest

from benchmarks import sdn_layer
from lib import nn as sdn

TINY = [
    "--channels",
    "4",
    "--batch",
    "2",
    "--directions",
    "1",
    "2",
    "--repeats",
    "2",
    "--slow_repeats",
    "1",
]


def test_table_and_file(tmp_path, capsys):
    output = tmp_path / "result.json"
    sdn_layer.main([*TINY, "--scales", "4", "5", "--no_memory", "--output", str(output)])
    result = json.loads(output.read_text())
    names = ["conv3", "conv5"] + [
        f"sdn{n}/{b}" for n in (1, 2) for b in ("reference", "torch", "yardstick")
    ]
    assert [(row["scale"], row["layer"]) for row in result["rows"]] == [
        (s, n) for s in (4, 5) for n in names
    ]
    for row in result["rows"]:
        assert 0 < row["forward_ms"] < row["step_ms"]
        assert row["rounds"] == (1 if row["layer"].endswith(("reference", "yardstick")) else 2)
        assert (row["step_over_yardstick"] is None) == row["layer"].startswith("conv")
        assert row["step_over_conv3"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(result["rows"])


def test_memory_of_a_fresh_process(tmp_path):
    output = tmp_path / "result.json"
    arguments = [
        "--channels",
        "32",
        "--batch",
        "8",
        "--scales",
        "32",
        "--directions",
        "1",
        "--repeats",
        "1",
    ]
    sdn_layer.main([*arguments, "--backends", "torch", "--output", str(output)])
    peaks = {row["layer"]: row["peak_mib"] for row in json.loads(output.read_text())["rows"]}
    if peaks["conv3"] is None:
        pytest.skip("the peak of the resident set cannot be read here")
    assert peaks["sdn1/torch"] > 4  # gates alone; a feature map is 1 MiB


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_refuses_a_wrong_layer(monkeypatch, tmp_path, wrong):
    correct = sdn.correct_lines

    def broken(lines, *parameters, backend, **flags):
        corrected = correct(lines, *parameters, backend=backend, **flags)
        if backend == "reference":
            return corrected
        return corrected * 1.001 if wrong == "output" else 2 * corrected - corrected.detach()

    monkeypatch.setattr(sdn, "correct_lines", broken)
    with pytest.raises(SystemExit) as refusal:
        sdn_layer.main([*TINY, "--scales", "4", "--output", str(tmp_path / "result.json")])
    assert "sdn1/torch is not timed" in str(refusal.value.code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--batch", "2", "3", "--scales", "4"], ["--repeats", "0"]], ids=str
)
def test_wrong_flags(arguments):
    with pytest.raises(SystemExit) as refusal:
        sdn_layer.main(arguments)
    assert refusal.value.code == 2
