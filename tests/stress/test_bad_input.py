"""A sample of the bad input that tests/stress/bad_input.py generates, and that it finds faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress.bad_input import MAKERS, Case, Ending, case_of, outcomes, verdict

pytest.importorskip("skimage")


@pytest.mark.slow
def test_a_sample_ends_as_promised():
    for outcome in outcomes(range(12), seed=0):
        assert outcome.fault is None, f"case {outcome.number}: {outcome.fault} {outcome.text}"


def test_a_case_is_the_same_every_time():
    cases = [case_of(0, number) for number in range(40)]
    again = [case_of(0, number) for number in range(40)]
    assert [case.arguments for case in cases] == [case.arguments for case in again]
    assert len({case.kind for case in cases}) > len(MAKERS)


ONE_LINE = "train.py: error: no\n"


@pytest.mark.parametrize(
    ("status", "err", "change", "fault"),
    [
        (0, "", None, None),
        (2, ONE_LINE, None, None),
        (None, "", None, "it did not end"),
        (1, ONE_LINE, None, "status 1"),
        (2, "Traceback (most recent call last)\n" + ONE_LINE, None, "status 2"),
        (2, "", None, "status 2 with 0 lines"),
        (2, ONE_LINE + ONE_LINE, None, "status 2 with 2 lines"),
        (0, ONE_LINE, None, "status 0 with an error"),
        (2, ONE_LINE, lambda folder: (folder / "file").write_text("x"), "file changed"),
        (2, ONE_LINE, lambda folder: (folder / "file").unlink(), "file changed"),
        (2, ONE_LINE, lambda folder: (folder / "more").touch(), "more is new"),
        (0, "", lambda folder: (folder / "more.partial").touch(), "more.partial is new"),
        (0, "", lambda folder: (folder / "more").touch(), None),
        (0, "", lambda folder: (folder / "pwned").touch(), "a shell saw it"),
    ],
)
def test_what_is_not_as_promised_is_found(tmp_path: Path, status, err, change, fault):
    (tmp_path / "file").write_text("mine")
    before = {"file": b"mine"}
    if change:
        change(tmp_path)
    found = verdict(Case("", "train.py", []), Ending(status, err, 0.0), before, tmp_path)
    assert found is None if fault is None else fault in found
