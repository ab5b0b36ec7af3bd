"""The data of examples/enclosed.py against an independent flood fill."""

import json

import pytest
import torch
from PIL import Image

from examples import enclosed


def even_odd(outline: torch.Tensor) -> torch.Tensor:
    """Pixels that a flood from the border through everything but outlines does not reach."""
    size = outline.shape[-1]
    reached, front = set(), [(0, 0)]
    while front:
        row, column = front.pop()
        inside_map = 0 <= row < size and 0 <= column < size
        if not inside_map or (row, column) in reached or outline[row, column] > 0:
            continue
        reached.add((row, column))
        front += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    closed = torch.ones(size, size)
    for row, column in reached:
        closed[row, column] = 0
    return closed


@pytest.mark.parametrize("size", [32, 64])
def test_flood_from_the_border_reaches_only_outside(size):
    for x, y, weight in zip(*enclosed.make_outlines(8, size, 3), strict=True):
        assert (y[0] <= even_odd(x[0])).all()
        assert torch.equal(weight, 1 - x)
        assert (x <= y).all()


@pytest.mark.parametrize("size", [32, 64, 96])
def test_flood_fill_solves_clean_outlines_exactly(size):
    x, y, weight = enclosed.make_outlines(30, size, 4)
    assert ((enclosed.flood_fill(x, closing=0) > 0) == (y > 0))[weight > 0].all()


def test_flood_fill_closes_gaps_and_counts_nested_outlines():
    x = torch.zeros(1, 1, 40, 40)
    for start, stop in ((4, 36), (10, 30), (16, 24)):  # outlines of three nested squares
        x[..., start:stop, start:stop] = 1
        x[..., start + 1 : stop - 1, start + 1 : stop - 1] = 0
    places = [(0, 0), (7, 20), (13, 20), (20, 20)]
    expected = [False, True, False, True]
    found = enclosed.flood_fill(x, closing=0)[0, 0] > 0
    assert [found[place].item() for place in places] == expected
    x[..., 4, 10:12] = 0  # a gap
    leaking, closed = (enclosed.flood_fill(x, closing)[0, 0] > 0 for closing in (0, 1))
    assert [leaking[place].item() for place in places] != expected
    assert [closed[place].item() for place in places] == expected


def test_outlines_are_seeded_and_seeds_differ():
    first, again, other = (enclosed.make_outlines(4, 32, seed, damaged=True) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])


def test_damage_leaves_the_truth_as_it_is():
    x, _, weight = enclosed.make_outlines(1, 32, 5)
    damaged, _, damaged_weight = enclosed.make_outlines(1, 32, 5, damaged=True)
    assert torch.equal(weight, damaged_weight)
    assert ((damaged > 0.5) != (x > 0.5)).any()


def test_flood_fill_instead_of_networks(tmp_path):
    results = tmp_path / "results.jsonl"
    flags = ["--quick", "--damaged", "--flood_fill", "--results", str(results)]
    assert enclosed.main(flags) == 0
    (run,) = map(json.loads, results.read_text().splitlines())
    assert run["arm"] == "flood fill" and list(run["iou"]) == ["32", "64"]
    assert run["closing"] > 0 and 0 < run["iou"]["32"] < 1


def test_quick_run_writes_table_and_picture(tmp_path, capsys):
    path = tmp_path / "answers.png"
    assert enclosed.main(["--quick", "--picture", str(path)]) == 0
    assert "| SDN | 1 |" in capsys.readouterr().out
    assert Image.open(path).size == (5 * 260, 2 * 260)
