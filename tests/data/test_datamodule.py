"""Order, augmentation and batches: functions of seed, epoch and index alone, over workers and
ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from data.datamodule import PADDING, EpochSampler, ImageDataModule, IndexedImages
from data.errors import DataError
from data.get_dataset import DATASETS
from lib.utils import mixed_seed


class Pictures(torch.utils.data.Dataset):
    """`count` different pictures that are nowhere symmetric."""

    def __init__(self, count: int):
        rng = np.random.default_rng(0)
        self.pictures = torch.from_numpy(rng.integers(0, 256, (count, 3, 4, 6), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pictures[index]


class NoisyPictures(Pictures):
    """Pictures with an augmentation of their own."""

    def draw(self, index: int, generator: torch.Generator) -> torch.Tensor:
        return self[index] ^ torch.randint(
            0, 256, self[index].shape, dtype=torch.uint8, generator=generator
        )


def module(
    name: str = "Photos32", *, batch: int = 64, workers: int = 0, seed: int = 3, root="data"
) -> ImageDataModule:
    data = ImageDataModule(name, str(root), batch, batch_val=100, num_workers=workers, seed=seed)
    data.prepare_data()
    data.setup()
    return data


def flipped(image: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether an image is the mirror image of the original; it must be that or the original
    itself."""
    mirror = original.numpy()[:, :, ::-1]
    assert np.array_equal(image, original) or np.array_equal(image, mirror)
    return np.array_equal(image, mirror)


def test_mixed_seeds_differ_and_depend_on_both_numbers():
    seeds = {mixed_seed(seed, number) for seed in range(50) for number in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    ones = np.mean([bin(seed).count("1") for seed in seeds])
    assert abs(ones - 31.5) < 0.5, "near numbers give unrelated bits"


@pytest.mark.parametrize("pictures", [Pictures(10), NoisyPictures(10)])
def test_augmentation_is_a_function_of_seed_and_key(pictures):
    images = IndexedImages(pictures, augment=True, flip=True, seed=7)
    keys = range(200)
    torch.manual_seed(0)
    first = [images[key] for key in keys]
    torch.manual_seed(1)
    other = IndexedImages(pictures, augment=True, flip=True, seed=7)
    again = {key: other[key] for key in reversed(keys)}
    for key, (image, given) in zip(keys, first, strict=True):
        assert given == key == again[key][1]
        assert torch.equal(image, again[key][0])
    elsewhere = IndexedImages(pictures, augment=True, flip=True, seed=8)
    assert any(not torch.equal(elsewhere[key][0], first[key][0]) for key in keys)
    assert any(not torch.equal(first[key][0], first[key + 10][0]) for key in range(10)), (
        "epochs differ"
    )


def test_flips_are_exact_mirror_images_about_half_the_time():
    pictures = Pictures(10)
    images = IndexedImages(pictures, augment=True, flip=True, seed=0)
    flips = np.array([flipped(images[key][0], pictures[key % 10]) for key in range(4000)])
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / 4000**0.5
    together = (flips[:-10] == flips[10:]).mean()  # an image in two epochs in a row
    assert abs(together - 0.5) < 4 * 0.5 / 3990**0.5


@pytest.mark.parametrize("augment, flip", [(True, False), (False, True), (False, False)])
def test_images_stay_as_they_are_without_augmentation(augment, flip):
    pictures = Pictures(10)
    images = IndexedImages(pictures, augment=augment, flip=flip, seed=0)
    assert all(torch.equal(images[key][0], pictures[key % 10]) for key in range(100))


def test_validation_leaves_a_data_sets_own_augmentation_out():
    pictures = NoisyPictures(10)
    plain, noisy = (
        IndexedImages(pictures, augment=augment, flip=False, seed=0) for augment in (False, True)
    )
    assert all(torch.equal(plain[key][0], pictures[key]) for key in range(10))
    assert all(not torch.equal(noisy[key][0], pictures[key]) for key in range(10))


def test_padding_is_an_image_that_does_not_count():
    images = IndexedImages(Pictures(10), augment=True, flip=True, seed=0)
    image, index = images[PADDING]
    assert index == -1 and image.shape == (3, 4, 6) and image.dtype == torch.uint8


@pytest.mark.parametrize("size, world_size", [(12, 1), (12, 4), (13, 4), (15, 4), (3, 2), (3, 5)])
def test_ranks_share_an_epoch(size, world_size):
    def epoch_of(number):
        shares = []
        for rank in range(world_size):
            sampler = EpochSampler(size, seed=5, rank=rank, world_size=world_size, shuffle=True)
            sampler.set_epoch(number)
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler) == size // world_size
        return shares

    alone = EpochSampler(size, seed=5, rank=0, world_size=1, shuffle=True)
    for number in (0, 3):
        alone.set_epoch(number)
        order, shares = list(alone), epoch_of(number)
        assert sorted(order) == list(range(number * size, (number + 1) * size)), (
            "keys of this epoch, each once"
        )
        together = [key for row in zip(*shares, strict=True) for key in row]
        assert together == order[: len(together)], "the ranks deal one permutation among them"


def test_epochs_and_seeds_give_other_orders():
    orders = set()
    for seed in (1, 2):
        sampler = EpochSampler(50, seed=seed, rank=0, world_size=1, shuffle=True)
        for epoch in (0, 1, 2):
            sampler.set_epoch(epoch)
            assert list(sampler) == list(sampler)
            orders.add(tuple(key % 50 for key in sampler))
    assert len(orders) == 6


@pytest.mark.parametrize("length, world_size", [(4, 1), (5, 1), (7, 2), (13, 1), (25, 1)])
def test_epochs_of_another_length_go_through_the_same_permutations(length, world_size):
    """Shorter or longer than the data set of 10: nothing comes twice before everything has come
    once."""
    samplers = [
        EpochSampler(10, length=length, seed=5, rank=rank, world_size=world_size, shuffle=True)
        for rank in range(world_size)
    ]
    keys = []
    for epoch in range(6):
        for sampler in samplers:
            sampler.set_epoch(epoch)
            assert len(list(sampler)) == len(sampler) == length // world_size
        share = length // world_size * world_size
        rows = [key for row in zip(*samplers, strict=True) for key in row]
        keys += [*rows, *[None] * (length - share)]
    whole = EpochSampler(10, seed=5, rank=0, world_size=1, shuffle=True)
    expected = []
    for epoch in range(-(-6 * length // 10)):
        whole.set_epoch(epoch)
        expected += list(whole)
    assert all(key in (None, other) for key, other in zip(keys, expected, strict=False))
    assert len(keys) == 6 * length


def test_validation_of_the_first_images():
    shares = [
        EpochSampler(10, length=5, seed=0, rank=rank, world_size=2, shuffle=False)
        for rank in (0, 1)
    ]
    assert [list(share) for share in shares] == [[0, 2, 4], [1, 3, PADDING]]


@pytest.mark.usefixtures("few_photos")
def test_epoch_and_validation_can_be_shortened():
    data = ImageDataModule(
        "Photos32", "data", 20, 64, num_workers=0, seed=3, epoch_images=70, val_images=40
    )
    data.prepare_data()
    data.setup()
    assert [len(indices) for _, indices in data.train_dataloader()] == [20, 20, 20]
    assert [indices.tolist() for _, indices in data.val_dataloader()] == [list(range(40))]
    data.val_images = 10_000
    assert sum(len(indices) for _, indices in data.val_dataloader()) == 130, "there are no more"
    data.epoch_images = 19
    with pytest.raises(
        DataError,
        match="--epoch_images gives an epoch 19 training images, fewer than one batch of 20",
    ):
        data.train_dataloader()


@pytest.mark.parametrize("size, world_size", [(12, 1), (12, 4), (13, 4), (15, 4), (3, 2), (3, 5)])
def test_validation_counts_each_index_once_over_the_ranks(size, world_size):
    shares = []
    for rank in range(world_size):
        sampler = EpochSampler(size, seed=5, rank=rank, world_size=world_size, shuffle=False)
        sampler.set_epoch(4)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == -(-size // world_size), (
            "equally many on each rank"
        )
    keys = sum(shares, [])
    assert sorted(key for key in keys if key != PADDING) == list(range(size))
    assert keys.count(PADDING) == -size % world_size
    if world_size == 1:
        assert shares == [list(range(size))]


@pytest.fixture
def few_photos(monkeypatch):
    monkeypatch.setattr("data.sets.photos32.TRAIN_LENGTH", 150)
    monkeypatch.setattr("data.sets.photos32.VALIDATION_LENGTH", 130)


@pytest.mark.usefixtures("few_photos")
def test_workers_give_the_same_batches():
    alone, helped = module(workers=0), module(workers=2)
    for loader, helped_loader, sizes in (
        (alone.train_dataloader(), helped.train_dataloader(), [64, 64]),
        (alone.val_dataloader(), helped.val_dataloader(), [100, 30]),
    ):
        for epoch in (0, 1):
            for each in (loader, helped_loader):
                each.sampler.set_epoch(epoch)
            batches, helped_batches = list(loader), list(helped_loader)
            assert [len(indices) for _, indices in batches] == sizes
            for (images, indices), (its_images, its_indices) in zip(
                batches, helped_batches, strict=True
            ):
                assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
                assert indices.dtype == torch.int64
                assert torch.equal(images, its_images) and torch.equal(indices, its_indices)


@pytest.mark.usefixtures("few_photos")
def test_training_flips_where_the_registry_says_so_and_validation_never(monkeypatch):
    from dataclasses import replace

    for flip in (True, False):
        spec = replace(DATASETS["Photos32"], flip=flip)
        monkeypatch.setitem(DATASETS, "Photos32", spec)
        data = module()
        assert (data.train.augment, data.train.flip) == (True, flip)
        assert (data.validation.augment, data.validation.flip) == (False, False)


@pytest.mark.usefixtures("few_photos")
def test_too_few_images_for_a_batch():
    assert len(list(module(batch=150).train_dataloader())) == 1
    with pytest.raises(
        DataError, match="has 150 training images, fewer than one batch of 151.* at most 150"
    ):
        module(batch=151).train_dataloader()


@pytest.mark.usefixtures("few_photos")
def test_too_few_images_for_a_batch_on_every_process():
    data = module(batch=80)
    data.trainer = SimpleNamespace(
        world_size=2, global_rank=1, current_epoch=0, lightning_module=None
    )
    with pytest.raises(
        DataError, match="one batch of 80 on each of 2 processes: use a batch of at most 75"
    ):
        data.train_dataloader()
    data.batch = 75
    first = [indices for _, indices in data.train_dataloader()]
    data.trainer.global_rank = 0
    second = [indices for _, indices in data.train_dataloader()]
    assert sorted(torch.cat(first + second).tolist()) == list(range(150))


def test_missing_data_are_said_before_training(tmp_path):
    data = ImageDataModule("CelebAHQ256", str(tmp_path), 1, 1, num_workers=0, seed=0)
    with pytest.raises(DataError, match=r"get_celeb_data\.sh"):
        data.prepare_data()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("done", [0, 6, 12, 24])
def test_a_run_goes_on_inside_an_epoch(world_size, done):
    """What ranks see from there is what they would have seen; the next epoch is whole."""
    for rank in range(world_size):
        ranks = dict(seed=5, rank=rank, world_size=world_size, shuffle=True)
        whole, rest = EpochSampler(25, **ranks), EpochSampler(25, **ranks, start=(2, done))
        whole.set_epoch(2)
        assert list(rest) == list(whole)[done // world_size :] and len(rest) == len(whole)
        for sampler in (whole, rest):
            sampler.set_epoch(3)
        assert list(rest) == list(whole)


class Recorder(pl.LightningModule):
    """Keeps what each batch of each epoch held."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, dict[int, list[int]]] = {"train": {}, "validation": {}}

    def _record(self, split: str, indices: torch.Tensor) -> None:
        self.seen[split].setdefault(self.current_epoch, []).extend(indices.tolist())

    def training_step(self, batch, _):
        self._record("train", batch[1])
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch, _):
        self._record("validation", batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("few_photos")
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_tells_the_sampler_its_epoch(tmp_path, workers):
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(
        recorder,
        datamodule=ImageDataModule("Photos32", "data", 50, 64, num_workers=workers, seed=3),
    )
    expected = EpochSampler(150, seed=3, rank=0, world_size=1, shuffle=True)
    for epoch in range(3):
        expected.set_epoch(epoch)
        assert recorder.seen["train"][epoch] == list(expected)
        assert recorder.seen["validation"][epoch] == list(range(130))
    assert recorder.seen["train"][0] != recorder.seen["train"][1] != recorder.seen["train"][2]
