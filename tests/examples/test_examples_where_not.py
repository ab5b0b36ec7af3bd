"""The data of examples/where_not.py and what it promises."""

import pytest
import torch

from examples import where_not


def test_scratches_are_where_the_photograph_was_changed_and_splits_share_no_pixel():
    x, truth, _ = where_not.make_scratches(8, 32, 0)
    clean = {True: where_not._regions(training=True), False: where_not._regions(training=False)}
    for picture, scratched in zip(x / 2 + 0.5, truth > 0.5, strict=True):
        keep = ~scratched[0]
        windows = (w for r in clean[True] for w in _matching(r, picture[0], keep))
        assert any(True for _ in windows)
    assert 0.01 < truth.mean() < 0.1
    shared = zip(clean[True], clean[False], strict=True)
    assert all(a.shape[1] >= 3 * b.shape[1] - 3 for a, b in shared)


def _matching(region, picture, keep):
    """Windows of a region that equal a picture where it is kept; candidates by one pixel first."""
    row, column = keep.nonzero()[0].tolist()
    size = len(picture)
    inner = region[row : row + len(region) - size + 1, column : column + region.shape[1] - size + 1]
    for top, left in ((inner - picture[row, column]).abs() < 1e-6).nonzero().tolist():
        window = region[top : top + size, left : left + size]
        if torch.allclose(window[keep], picture[keep], atol=1e-6):
            yield window


def test_blobs_in_noise_have_the_same_size_on_larger_maps():
    """The number of crossings a pixel is about the same."""
    crossings = []
    for size in (32, 96):
        x, truth, _ = where_not.make_noise(30, size, 1)
        crossings.append((truth.diff(dim=3).abs().sum() / truth.numel()).item())
        assert (x - truth).std().item() == pytest.approx(1, abs=0.05)
    assert crossings[0] == pytest.approx(crossings[1], rel=0.35)


def test_lead_is_of_the_better_one():
    scores = {"SDN": {32: [0.9, 0.8]}, "convolutions": {32: [0.8]}, "U-Net": {32: [0.9]}}
    (lead,) = where_not.lead_of_convolutions("noise", scores).values()
    assert lead == pytest.approx(0.05)
    assert where_not.lead_of_convolutions("noise", {"SDN": {32: [0.9]}}) == {}


def test_quick_run_writes_a_picture_for_each_task(tmp_path, capsys):
    flags = ["--quick", "--arms", "convolutions", "U-Net", "--picture", str(tmp_path / "a.png")]
    assert where_not.main(flags) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_noise.png", "a_scratches.png"]
    assert capsys.readouterr().out.count("| U-Net | 1 |") == 2
