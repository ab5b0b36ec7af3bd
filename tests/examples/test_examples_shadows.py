"""The shadows of examples/shadows.py against rays that are marched one by one."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from examples import shadows


def test_a_tower_throws_a_shadow_as_long_as_it_is_high_over_the_slope():
    heights = torch.zeros(1, 5, 30)
    heights[0, 2, 3] = 4.1
    shadow = shadows.cast_shadows(heights, torch.tensor([0.2]), torch.tensor([0.0]))
    assert shadow[0].nonzero().tolist() == [[2, column] for column in range(4, 24)]


@pytest.mark.parametrize("photographs", [False, True])
def test_sun_stands_where_the_planes_say(photographs):
    """Each position's ray is followed in the direction that the inputs name."""
    size = 24
    x, y, weight = shadows.make_shadows(6, size, 3, photographs)
    assert weight.all()
    for (height, slope, column_wise, row_wise), truth in zip(x.double().numpy(), y, strict=True):
        height, slope = height * shadows.RELIEF, slope[0, 0] / 3
        step = np.array([row_wise[0, 0], column_wise[0, 0]])
        assert np.hypot(*step) == pytest.approx(1, abs=1e-6)
        step /= abs(step).max()
        places = np.stack(np.mgrid[:size, :size]).astype(float)
        expected = np.zeros((size, size), bool)
        for count in range(1, size):
            at = places + count * step[:, None, None]
            on_map = ((at >= -1e-6) & (at <= size - 1 + 1e-6)).all(0)
            ground = map_coordinates(height, at, order=1, mode="nearest")
            rise = slope * count * np.hypot(*step)
            expected |= on_map & (ground - rise > height)
        agree = expected == (truth[0] > 0.5).numpy()
        assert agree[2:-2, 2:-2].mean() > 0.995  # rays along the very border are cut differently
    assert 0.05 < y.mean() < 0.95


def test_suns_are_all_around_and_seeds_differ():
    x, *_ = shadows.make_shadows(200, 16, 0)
    quadrants = {(c > 0, r > 0) for c, r in x[:, 2:, 0, 0].tolist()}
    assert len(quadrants) == 4
    again, other = (shadows.make_shadows(200, 16, seed)[0] for seed in (0, 1))
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_quick_run(capsys):
    assert shadows.main(["--quick", "--arms", "SDN", "dilated"]) == 0
    assert "| dilated | 1 |" in capsys.readouterr().out
