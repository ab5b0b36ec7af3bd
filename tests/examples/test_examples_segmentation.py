"""The reliefs of examples/segmentation.py and its converted network."""

import torch

from examples import segmentation
from lib import ResSDNLayer


def test_raised_parts_are_bright_at_the_top_left_and_dark_at_the_bottom_right():
    x, truth, _ = segmentation.make_reliefs(20, 64, 0)
    before = torch.nn.functional.pad(truth, (1, 0, 1, 0))[..., :-1, :-1]
    assert (
        x[(truth == 1) & (before == 0)].mean() > 0.2 > -0.2 > x[(truth == 0) & (before == 1)].mean()
    )
    assert abs(x[(truth == 1) & (before == 1)].mean()) < 0.1


def test_converted_network_starts_as_the_untouched_one():
    torch.manual_seed(0)
    untouched = segmentation.ARMS["U-Net"]().eval()
    torch.manual_seed(0)
    converted = segmentation.ARMS["U-Net, converted"]().eval()
    names = [n for n, m in converted.named_modules() if isinstance(m, ResSDNLayer)]
    assert names == ["down.3.0", "down.3.3"]
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(converted(x), untouched(x), atol=1e-5, rtol=1e-4)


def test_quick_run(capsys):
    assert segmentation.main(["--quick"]) == 0
    assert "| U-Net, converted | 1 |" in capsys.readouterr().out
