"""The data of examples/enclosed.py against an independent flood fill."""

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


def test_outlines_are_seeded_and_seeds_differ():
    first, again, other = (enclosed.make_outlines(4, 32, seed, damaged=True) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])


def test_damage_leaves_the_truth_as_it_is():
    x, _, weight = enclosed.make_outlines(1, 32, 5)
    damaged, _, damaged_weight = enclosed.make_outlines(1, 32, 5, damaged=True)
    assert torch.equal(weight, damaged_weight)
    assert ((damaged > 0.5) != (x > 0.5)).any()


def test_quick_run_writes_table_and_picture(tmp_path, capsys):
    path = tmp_path / "answers.png"
    assert enclosed.main(["--quick", "--picture", str(path)]) == 0
    assert "| SDN | 1 |" in capsys.readouterr().out
    assert Image.open(path).size == (5 * 260, 2 * 260)
