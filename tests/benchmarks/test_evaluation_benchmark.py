"""The benchmark of evaluation: that it runs, and that it refuses to time what computes something
else."""

import json

import pytest

from benchmarks import evaluation

TINY = "--count 2 --samples 4 --chunk 2 --training_images 20 4 --rounds 1 --device cpu".split()


def test_rows_and_file(tmp_path, capsys):
    output = tmp_path / "result.json"
    evaluation.main([*TINY, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * (2 + 3) + 2 * 3
    baselines = [row["contender"] for row in rows if row["times_faster"] == 1]
    assert baselines == 2 * ["one at a time", "full passes, one at a time"] + 2 * ["differences"]
    assert all(row["rate"] > 0 and row["seconds"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


@pytest.mark.parametrize("wrong", ["sample_images", "keyed_noise", "nearest_images"])
def test_refuses_what_differs(monkeypatch, wrong):
    correct = getattr(evaluation, wrong)

    def broken(*arguments, **options):
        if wrong == "sample_images":
            return correct(*arguments, **options | dict(seed=options["batch"]))
        if wrong == "keyed_noise":
            return correct(arguments[0], 1, *arguments[2:])
        found = correct(*arguments, **options)
        found.indices = found.indices + 1
        return found

    monkeypatch.setattr(evaluation, wrong, broken)
    with pytest.raises(SystemExit) as refusal:
        evaluation.main(TINY)
    assert "is not timed: it differs from" in str(refusal.value.code)


def test_wrong_flags():
    with pytest.raises(SystemExit) as refusal:
        evaluation.main(["--rounds", "0"])
    assert refusal.value.code == 2
