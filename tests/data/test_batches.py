"""Batches of `IndexedImages`: the same as its items."""

import pytest
import torch
from test_datamodule import NoisyPictures, Pictures
from torch.utils.data import Subset, default_collate

from data.datamodule import PADDING, BatchLoader, ImageDataModule, IndexedImages
from data.sets.shapes3d_rendered import Shapes3DRendered


class BatchedPictures(Pictures):
    """Gives batches, and counts them."""

    batches = 0

    def batch(self, indices):
        self.batches += 1
        return self.pictures[torch.tensor(indices)]


class BatchedNoisyPictures(NoisyPictures, BatchedPictures):
    pass


@pytest.mark.parametrize("kind", [Pictures, NoisyPictures, BatchedPictures, BatchedNoisyPictures])
@pytest.mark.parametrize(
    "augment, flip", [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize("keys", [[3, 12, 57, 3, PADDING, 0, PADDING], [7], [PADDING]])
def test_batches_are_the_items(kind, augment, flip, keys):
    pictures = kind(10)
    images = IndexedImages(pictures, augment=augment, flip=flip, seed=7)
    batch, indices = images.__getitems__(keys)
    at_once = kind is BatchedPictures or (kind is BatchedNoisyPictures and not augment)
    assert getattr(pictures, "batches", 0) == at_once
    expected, expected_indices = default_collate([images[key] for key in keys])
    assert torch.equal(batch, expected) and torch.equal(indices, expected_indices)
    assert batch.dtype == torch.uint8 and indices.dtype == torch.int64 and batch.is_contiguous()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_batches_of_scenes(split):
    scenes = Shapes3DRendered(split)
    indices = [5, len(scenes) - 1, 0, 5]
    assert torch.equal(scenes.batch(indices), torch.stack([scenes[index] for index in indices]))
    assert scenes.batch([]).shape == (0, 3, 64, 64)
    for wrong in (-1, len(scenes)):
        with pytest.raises(IndexError, match=f"no image {wrong}"):
            scenes.batch([0, wrong])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_scenes(workers):
    data = ImageDataModule("Shapes3DRendered", "data", 64, 64, workers, seed=3, val_images=100)
    data.prepare_data()
    data.setup()
    images, indices = next(iter(data.train_dataloader()))
    assert images.shape == (64, 3, 64, 64) and images.is_contiguous()
    assert torch.equal(
        images, torch.stack([data.train.dataset[index] for index in indices.tolist()])
    )
    validation = list(data.val_dataloader())
    assert [len(part) for _, part in validation] == [64, 36]
    assert torch.equal(torch.cat([part for _, part in validation]), torch.arange(100))
    (last, _) = validation[1]
    assert torch.equal(last[-1], data.validation.dataset[99])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_a_subset(workers):
    """As evaluate.py reads."""
    images = IndexedImages(BatchedPictures(10), augment=False, flip=False, seed=0)
    batches = list(BatchLoader(Subset(images, range(7)), 4, num_workers=workers))
    for part, indices in batches:
        assert part.dtype == torch.uint8 and indices.dtype == torch.int64
        part += 1  # nobody else's memory
        part -= 1
    assert torch.equal(torch.cat([indices for _, indices in batches]), torch.arange(7))
    assert torch.equal(torch.cat([part for part, _ in batches]), images.dataset.pictures[:7])
