"""Pictures of which one quarter tells the others."""

from __future__ import annotations

import pytest
import torch

from data.get_dataset import get_dataset
from experiments import kaleidoscope


def test_each_quarter_mirrors_the_others(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("lmdb")
    kaleidoscope.make(tmp_path, {"train": 3, "validation": 2})
    kaleidoscope.make(tmp_path, {"train": 5, "validation": 5})  # it is there: nothing happens
    for split, size in (("train", 3), ("validation", 2)):
        pictures = get_dataset("kaleidoscope", tmp_path, split)
        assert len(pictures) == size
        for picture in pictures:
            assert picture.shape == (3, 64, 64) and picture.float().std() > 0
            for axis in (1, 2):
                assert torch.equal(picture, picture.flip(axis))
