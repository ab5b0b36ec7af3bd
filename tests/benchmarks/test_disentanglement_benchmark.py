"""The benchmark of scores of disentanglement: what it writes, and that nothing wrong is timed."""

from __future__ import annotations

import json

import pytest

from benchmarks import disentanglement

pytest.importorskip("sklearn")

TINY = ["--quick", "--rounds", "1", "--device", "cpu"]


def test_the_file(tmp_path, capsys):
    out = tmp_path / "out/result.json"
    disentanglement.main([*TINY, "--output", str(out)])
    result = json.loads(out.read_text())
    assert result["encoder"]["batch"] == 512 and result["encoder"]["images/s"] > 0
    metrics = {row["metric"]: row for row in result["metrics"]}
    assert list(metrics) == ["beta_vae", "factor_vae", "mig", "dci", "sap"]
    assert all(row["seconds"] > 0 and 0 <= row["score"] <= 1 for row in metrics.values())
    assert metrics["dci"]["sizes"] == {"trees": 1, "train": 150, "test": 75}
    assert {"date", "command", "machine", "versions", "threads"} <= set(result)
    assert result["command"].startswith("python -m benchmarks.disentanglement --quick")
    assert "| dci |" in capsys.readouterr().out


def test_what_is_left_out_is_said(tmp_path, capsys):
    out = tmp_path / "result.json"
    disentanglement.main([*TINY, "--skip_dci", "--output", str(out)])
    (dci,) = [row for row in json.loads(out.read_text())["metrics"] if row["metric"] == "dci"]
    assert dci["seconds"] is None and "| dci |  |  |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["beta_vae", "factor_vae"])
def test_refuses_wrong_metrics(tmp_path, monkeypatch, wrong):
    def refuse(*_):
        raise AssertionError("timed before the checks")

    monkeypatch.setattr(disentanglement.common, "seconds", refuse)
    monkeypatch.setitem(disentanglement.METRICS, wrong, lambda *_, **__: {"score": 0.9})
    with pytest.raises(SystemExit, match=f"not timed: {wrong} of a perfect code is 0.900"):
        disentanglement.main([*TINY, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--rounds 0", "--nonsense 1"])
def test_wrong_flags(flags):
    with pytest.raises(SystemExit) as refusal:
        disentanglement.main(flags.split())
    assert refusal.value.code == 2
