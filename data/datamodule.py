"""Loaders for training and validation. Images travel as uint8 and are scaled on the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lib.utils import mixed_seed

from .errors import DataError
from .get_dataset import DATASETS, SPLITS, get_dataset

PADDING = -1


class IndexedImages(Dataset):
    """A data set addressed by keys, `epoch * len(dataset) + index`, whose items are (uint8 [3, H, W], index).

    Augmentation is a pure function of (seed, key), so it depends on neither workers nor ranks nor on what was loaded
    before. The key -1 gives some image with index -1: it only fills a batch and must not count.

    Arguments:
        dataset: Images; its `draw(index, generator)`, if it has one, is its own augmentation.
        augment: Whether to augment at all.
        flip: Whether augmentation flips images left to right with probability 1/2.
        seed: Of the augmentation.
    """

    def __init__(self, dataset: Dataset, *, augment: bool, flip: bool, seed: int):
        self.dataset, self.augment, self.flip, self.seed = dataset, augment, flip, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        if key == PADDING:
            return self.dataset[0], PADDING
        index = key % len(self.dataset)
        if not self.augment:
            return self.dataset[index], index
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, key))
        image = self.dataset.draw(index, generator) if hasattr(self.dataset, "draw") else self.dataset[index]
        if self.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        return image, index


class EpochSampler(Sampler[int]):
    """Yields a rank's share of an epoch's keys.

    Shuffled (training): a permutation that depends on (seed, epoch), what goes beyond a multiple of the number of ranks
    left out. In order (validation): filled up with -1, so that all ranks have equally many and every image counts once.

    Arguments:
        size: Length of the data set.
        seed: Of the permutations.
        rank, world_size: This process and how many there are.
        shuffle: Whether for training.
    """

    def __init__(self, size: int, *, seed: int, rank: int, world_size: int, shuffle: bool):
        self.size, self.seed, self.rank, self.world_size, self.shuffle = size, seed, rank, world_size, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.world_size if self.shuffle else -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            keys = (torch.randperm(self.size, generator=generator) + self.epoch * self.size).tolist()
        else:
            keys = [*range(self.size), *[PADDING] * (len(self) * self.world_size - self.size)]
        return iter(keys[self.rank : len(self) * self.world_size : self.world_size])


class ImageDataModule(pl.LightningDataModule):
    """Batches (uint8 images [B, 3, H, W], int64 indices [B]) of a registered data set.

    Arguments:
        name: A name of `DATASETS`.
        root: Folder that holds the data sets.
        batch, batch_val: Batch sizes of each process.
        num_workers: Loader processes of each process.
        seed: Of order and augmentation.

    Raises:
        DataError: if the data are missing or damaged, or too few for one batch on every process.
    """

    def __init__(self, name: str, root: str, batch: int, batch_val: int, num_workers: int, seed: int):
        super().__init__()
        self.name, self.root, self.seed = name, root, seed
        self.batch, self.batch_val, self.num_workers = batch, batch_val, num_workers

        self._opened: dict[str, Dataset] = {}

    def prepare_data(self) -> None:
        """Opens both splits, downloading CIFAR10 if need be; raises DataError for what is missing."""
        for split in SPLITS:
            self._open(split)

    def setup(self, stage: str | None = None) -> None:
        if stage != "validate":
            flip = DATASETS[self.name].flip
            self.train = IndexedImages(self._open("train"), augment=True, flip=flip, seed=self.seed)
        self.validation = IndexedImages(self._open("validation"), augment=False, flip=False, seed=self.seed)

    def check_batch(self, processes: int) -> None:
        """Raises DataError if the training images do not fill one batch on each of the processes."""
        images = len(self._open("train"))
        if images < self.batch * processes:
            raise DataError(
                f"{self.name} has {images} training images, fewer than one batch of {self.batch} on each of "
                f"{processes} processes: use a batch of at most {images // processes}"
            )

    def train_dataloader(self) -> DataLoader:
        self.check_batch(self._world_size)
        return self._loader(self.train, self.batch, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation, self.batch_val, shuffle=False)

    def _loader(self, dataset: IndexedImages, batch: int, *, shuffle: bool) -> DataLoader:
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = EpochSampler(len(dataset), seed=self.seed, rank=rank, world_size=self._world_size, shuffle=shuffle)
        if self.trainer and shuffle:
            # Loader workers read ahead before Lightning calls set_epoch for the first time in a resumed run.
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return DataLoader(
            dataset,
            batch_size=batch,
            sampler=sampler,
            drop_last=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _open(self, split: str) -> Dataset:
        if split not in self._opened:
            self._opened[split] = get_dataset(self.name, self.root, split)
        return self._opened[split]

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1
