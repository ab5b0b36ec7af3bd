"""Photos32: what its random draws are made of."""

import numpy as np
import torch
from PIL import Image

from data.sets import photos32
from data.sets.photos32 import REDUCTIONS, Photos32


def test_every_photograph_scale_and_flip_occurs(monkeypatch):
    """Regions of one grey level with a bright left half tell from where a patch comes."""
    levels = [Image.new("RGB", (600, 400), (30 * (i + 1),) * 3) for i in range(7)]
    monkeypatch.setattr(photos32, "photographs", lambda: levels)
    images, counts = Photos32("train"), torch.zeros(8)
    for i in range(700):
        counts[int(images[i][0, 0, 0]) // 30] += 1
    assert counts[0] == 0 and counts[1:].min() > 60 and counts[1:].max() < 140

    gradient = np.zeros((400, 640, 3), np.uint8)
    gradient[:] = (np.arange(640) % 640 / 640 * 255).astype(np.uint8)[None, :, None]
    monkeypatch.setattr(photos32, "photographs", lambda: [Image.fromarray(gradient)])
    images = Photos32("train")
    rises = [images[i].float().mean((0, 1)).diff().mean().item() for i in range(400)]
    step = 255 / 640
    for reduction in REDUCTIONS:
        for sign in (1, -1):
            near = sum(abs(rise / step - sign * reduction) < 0.3 for rise in rises)
            assert 20 < near < 90, (reduction, sign, near)
