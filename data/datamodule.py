"""Loaders for training and validation. Images travel as uint8 and are scaled on the device."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lib.processes import end_with_parent
from lib.training.processes import Watchdog
from lib.training.resume import Position
from lib.training.signals import EXIT_STATUS
from lib.utils import mixed_seed

from .errors import DataError
from .get_dataset import SPLITS, dataset_spec, get_dataset

PADDING = -1
LOADER_TIMEOUT = 600  # seconds without a batch: a loader that hangs is a fault, not a wait
FLIP = 1  # hashed with seed and key, so that mirroring is independent of other augmentation


class IndexedImages(Dataset):
    """A data set addressed by keys, `pass * len(dataset) + index`, whose items are (uint8 [C, H,
    W], key).

    Augmentation is a pure function of (seed, key), so it depends on neither workers nor ranks nor
    on what was loaded before. The key -1 gives some image: it only fills a batch and must not
    count.

    Arguments:
        dataset: The images. If it has a method `draw(index, generator)`, that is its own
            augmentation; if it has `batch(indices)`, that gives the images of a list of indices at
            once, which is faster than one by one.
        augment: Whether to augment at all.
        flip: Whether augmentation mirrors images left to right with probability 1/2.
        seed: The seed of the augmentation.
    """

    def __init__(self, dataset: Dataset, *, augment: bool, flip: bool, seed: int):
        self.dataset, self.flip, self.seed = dataset, flip, seed
        self.augment = augment and (flip or hasattr(dataset, "draw"))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> tuple[Tensor, int]:
        images, _ = self.__getitems__([key])
        return images[0], key

    def __getitems__(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        """The items of several keys as one batch; torch's loader asks for this where it exists."""
        indices = [0 if key == PADDING else key % len(self.dataset) for key in keys]
        if self.augment and hasattr(self.dataset, "draw"):
            seeds = [mixed_seed(self.seed, key) for key in keys]
            drawn = (torch.Generator().manual_seed(seed) for seed in seeds)
            images = torch.stack(
                [self.dataset.draw(index, g) for index, g in zip(indices, drawn, strict=True)]
            )
        elif hasattr(self.dataset, "batch"):
            images = self.dataset.batch(indices)
        else:
            images = torch.stack([self.dataset[index] for index in indices])
        if self.augment and self.flip:
            mirrored = torch.tensor(
                [key != PADDING and mixed_seed(self.seed, key, FLIP) % 2 == 1 for key in keys]
            )
            images[mirrored] = images[mirrored].flip(-1)
        return images, torch.tensor(keys)


class BatchLoader(DataLoader):
    """A loader of the batches of `IndexedImages`, which are batches already.

    Worker processes send them as arrays, whose bytes go through the workers' pipe. Tensors would
    each be put into a shared memory file, whose making, passing on and mapping takes longer than to
    copy a batch of small images.
    """

    def __init__(self, dataset: Dataset, batch_size: int, **options: Any):
        super().__init__(dataset, batch_size, collate_fn=_as_arrays, **options)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = super().__iter__()
        # torch's own time limit only covers the first byte of a batch: a worker that stops in the
        # middle of one would stop the whole run.
        with (
            Watchdog(self.timeout * 1.1, f"the loader gave no batch for {self.timeout:g} s")
            if self.timeout
            else nullcontext() as watchdog
        ):
            while True:
                with watchdog.waiting() if watchdog else nullcontext():
                    batch = next(batches, None)
                if batch is None:
                    return
                images, keys = map(torch.as_tensor, batch)
                yield (
                    (images.pin_memory(), keys.pin_memory())
                    if torch.cuda.is_available()
                    else (images, keys)
                )


def _as_arrays(batch: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return batch[0].numpy(), batch[1].numpy()


def follow_the_main_process(worker: int) -> None:
    """Makes a loader worker live as long as the process that started it, and no longer.

    Signals are ignored: one that is sent to a whole job reaches the workers, too, but they are
    needed until the checkpoint is written. A killed process's workers end with it: torch's own look
    only while they wait for work, not while they send a batch that nobody takes.
    """
    for signum in EXIT_STATUS:
        signal.signal(signum, signal.SIG_IGN)
    end_with_parent()


class EpochSampler(Sampler[int]):
    """Yields a rank's share of an epoch's keys.

    Shuffled (training): the next `length` entries of an endless row of permutations of the data
    set, each of which depends on (seed, its number), what goes beyond a multiple of the number of
    ranks left out. In order (validation): the first `length` images, filled up with -1, so that all
    ranks have equally many and every image counts once.

    Arguments:
        size: Length of the data set.
        length: Images of an epoch; 0: the data set's.
        seed: Of the permutations.
        rank, world_size: This process and how many there are.
        shuffle: Whether for training.
        start: The epoch that a run goes on in, and its images (of all ranks) that are done and left
            out.
    """

    def __init__(
        self,
        size: int,
        *,
        length: int = 0,
        seed: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        start: tuple[int, int] = (0, 0),
    ):
        self.size, self.length, self.seed, self.shuffle = size, length or size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.start = start
        self.epoch = start[0]

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return (
            self.length // self.world_size if self.shuffle else -(-self.length // self.world_size)
        )

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            keys = self._shuffled(self.epoch * self.length, (self.epoch + 1) * self.length)
        else:
            keys = [*range(self.length), *[PADDING] * (len(self) * self.world_size - self.length)]
        done = self.start[1] if self.epoch == self.start[0] else 0
        return iter(keys[done + self.rank : len(self) * self.world_size : self.world_size])

    def _shuffled(self, start: int, stop: int) -> list[int]:
        """Entries `start` to `stop` of the row of permutations."""
        keys = []
        for number in range(start // self.size, -(-stop // self.size)):
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, number))
            first = number * self.size
            permutation = torch.randperm(self.size, generator=generator) + first
            keys += permutation[max(0, start - first) : stop - first].tolist()
        return keys


class ImageDataModule(pl.LightningDataModule):
    """Batches (uint8 images [B, C, H, W], int64 keys [B]; in validation, indices) of a registered
    data set.

    Arguments:
        name: The name of the data set, as in `get_dataset`.
        root: Folder that holds the data sets.
        batch, batch_val: Batch sizes of each process.
        num_workers: Number of loader processes of each process.
        seed: The seed of the order and of augmentation.
        epoch_images, val_images: Number of images of a training epoch and of a validation; 0 means
            all of them.

    Raises:
        DataError: if the data are missing or damaged, or too few for one batch on every process.
    """

    def __init__(
        self,
        name: str,
        root: str,
        batch: int,
        batch_val: int,
        num_workers: int,
        seed: int,
        *,
        epoch_images: int = 0,
        val_images: int = 0,
    ):
        super().__init__()
        self.name, self.root, self.seed = name, root, seed
        self.batch, self.batch_val, self.num_workers = batch, batch_val, num_workers
        self.epoch_images, self.val_images = epoch_images, val_images
        self._opened: dict[str, Dataset] = {}

    def prepare_data(self) -> None:
        """Opens both splits, downloading CIFAR10 if need be; raises DataError for what is
        missing."""
        for split in SPLITS:
            self._open(split)

    def setup(self, stage: str | None = None) -> None:
        if stage != "validate":
            flip = dataset_spec(self.name, self.root).flip
            self.train = IndexedImages(self._open("train"), augment=True, flip=flip, seed=self.seed)
        self.validation = IndexedImages(
            self._open("validation"), augment=False, flip=False, seed=self.seed
        )

    def check_batch(self, processes: int) -> None:
        """Raises DataError if the training images do not fill one batch on each of the
        processes."""
        images = self.epoch_images or len(self._open("train"))
        if images < self.batch * processes:
            has = "--epoch_images gives an epoch" if self.epoch_images else f"{self.name} has"
            raise DataError(
                f"{has} {images} training images, fewer than one batch of {self.batch} on each of "
                f"{processes} processes: use a batch of at most {images // processes}"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Training batches of each process."""
        return (self.epoch_images or len(self._open("train"))) // self._world_size // self.batch

    def train_dataloader(self) -> DataLoader:
        self.check_batch(self._world_size)
        # A resumed run begins inside an epoch.
        epoch = self.trainer.current_epoch if self.trainer else 0
        module = self.trainer.lightning_module if self.trainer else None
        position = getattr(module, "position", Position(epoch))
        global_batch = self.batch * self._world_size
        start = (position.epoch, position.batches(global_batch) * global_batch)
        return self._loader(self.train, self.batch, self.epoch_images, shuffle=True, start=start)

    def val_dataloader(self) -> DataLoader:
        length = min(self.val_images, len(self.validation))
        return self._loader(self.validation, self.batch_val, length, shuffle=False)

    def _loader(self, dataset: IndexedImages, batch: int, length: int, **order: Any) -> DataLoader:
        ranks = dict(
            rank=self.trainer.global_rank if self.trainer else 0, world_size=self._world_size
        )
        sampler = EpochSampler(len(dataset), length=length, seed=self.seed, **order, **ranks)
        return BatchLoader(
            dataset,
            batch_size=batch,
            sampler=sampler,
            drop_last=order["shuffle"],
            num_workers=self.num_workers,
            timeout=LOADER_TIMEOUT if self.num_workers else 0,
            worker_init_fn=follow_the_main_process,
            persistent_workers=self.num_workers > 0,
        )

    def _open(self, split: str) -> Dataset:
        if split not in self._opened:
            self._opened[split] = get_dataset(self.name, self.root, split)
        return self._opened[split]

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1
