"""The registry and Photos32."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPOSITORY

from data.errors import DataError
from data.get_dataset import DATASETS, get_dataset
from data.sets import photos32
from data.sets.photos32 import Photos32, photographs

STRIPES = """
import torch
from torch.utils.data import Dataset

from ..registry import DatasetSpec, register


class Stripes(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        rows = torch.arange(4, dtype=torch.uint8) // (index + 1)
        return rows.view(1, 4, 1).expand(3, 4, 4).clone()


register(DatasetSpec("Stripes", (3, 4, 4), False, "nothing to get", lambda root, split: Stripes()))
"""


@pytest.fixture(scope="module")
def photos():
    return {split: Photos32(split) for split in ("train", "validation")}


def test_photos32_has_uint8_patches(photos):
    assert (len(photos["train"]), len(photos["validation"])) == (8192, 1024)
    for dataset in photos.values():
        for index in (0, len(dataset) - 1):
            assert dataset[index].dtype == torch.uint8 and dataset[index].shape == (3, 32, 32)
        assert dataset[0].float().std() > 0
        assert not torch.equal(dataset[0], dataset[1])


def test_photos32_splits_share_no_column_of_a_photograph(monkeypatch):
    """In photographs that are coloured by column, every pixel tells where it comes from."""
    widths = (500, 255 * 4, 333)
    paintings = []
    for width in widths:
        columns = np.arange(width)
        rows = np.stack([columns % 256, columns // 256, np.zeros_like(columns)], -1).astype(
            np.uint8
        )  # [W, 3]
        paintings.append(photos32.Image.fromarray(np.repeat(rows[None], 200, 0)))
    monkeypatch.setattr(photos32, "REDUCTIONS", (1,))
    for painting, width in zip(paintings, widths, strict=True):
        monkeypatch.setattr(photos32, "photographs", lambda painting=painting: [painting])
        seen = {}
        for split in ("train", "validation"):
            dataset = Photos32(split)
            draws = torch.stack([dataset[i] for i in range(1024)]).long()
            seen[split] = set((draws[:, 0] + 256 * draws[:, 1]).unique().tolist())
        assert max(seen["train"]) < min(seen["validation"])
        border = round(width * 0.75)
        assert min(seen["train"]) < 8 and max(seen["train"]) > border - 8, (
            "the whole region is used"
        )
        assert min(seen["validation"]) < border + 8 and max(seen["validation"]) > width - 8


def test_photos32_scales_each_region_by_itself(monkeypatch):
    """Black left of the border, white right of it: antialiasing must not mix them."""
    painting = np.zeros((200, 400, 3), np.uint8)
    painting[:, 300:] = 255
    monkeypatch.setattr(photos32, "photographs", lambda: [photos32.Image.fromarray(painting)])
    train, validation = Photos32("train"), Photos32("validation")
    assert max(train[i].max() for i in range(500)) == 0
    assert min(validation[i].min() for i in range(1024)) == 255


def test_photos32_validation_is_the_same_in_every_instance(photos):
    again = Photos32("validation")
    assert all(torch.equal(again[i], photos["validation"][i]) for i in range(1024))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(again.draw(7, generator), again[7])


def test_photos32_draws_depend_on_the_generator_only(photos):
    train = photos["train"]

    def draw(index, seed):
        return train.draw(index, torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    first = [draw(index, seed) for index, seed in ((3, 1), (3, 2), (4, 3))]
    torch.manual_seed(1)
    train[17]
    assert all(
        torch.equal(a, b) for a, b in zip(first, [draw(0, 1), draw(9, 2), draw(4, 3)], strict=True)
    )
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_photos32_draws_are_nearly_all_different(photos):
    generator = torch.Generator().manual_seed(0)
    draws = [photos["train"].draw(0, generator) for _ in range(500)]
    assert len({bytes(draw.numpy().tobytes()) for draw in draws}) > 450


def test_the_photographs_are_colour_pictures():
    pictures = photographs()
    assert len(pictures) == 7
    for picture in pictures:
        assert picture.mode == "RGB" and min(picture.size) >= 128
        red, green, blue = np.asarray(picture).transpose(2, 0, 1).astype(float)
        assert abs(red - green).max() > 10 and abs(green - blue).max() > 10


def test_an_unknown_data_set_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError) as raised:
        get_dataset("cifar10", tmp_path)
    assert all(name in str(raised.value) for name in ("'cifar10'", *DATASETS))


def test_an_unknown_split_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match="unknown split 'test'; there are train, validation"):
        get_dataset("CIFAR10", tmp_path, "test")


def test_the_registry_knows_shapes_and_flips():
    known = {name: (spec.shape, spec.flip) for name, spec in DATASETS.items()}
    assert known["CIFAR10"] == ((3, 32, 32), True)
    assert known["ImageNet32"] == ((3, 32, 32), False)
    assert known["CelebAHQ256"] == ((3, 256, 256), True)
    assert known["Photos32"] == ((3, 32, 32), False)  # its draws flip already
    assert all(name == spec.name for name, spec in DATASETS.items())


@pytest.mark.parametrize(
    "name, script",
    [
        ("ImageNet32", "data/ImageNet32/get_imagenet_data.sh"),
        ("CelebAHQ256", "data/CelebAHQ256/get_celeb_data.sh"),
    ],
)
def test_missing_data_name_a_command_that_puts_them_there(tmp_path, monkeypatch, name, script):
    with pytest.raises(DataError) as raised:
        get_dataset(name, tmp_path)
    assert str(raised.value).endswith(f"; get it with: SDN_DATA_ROOT={tmp_path} bash {script}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"; get it with: bash {script}$"):
        get_dataset(name)


def test_an_unfinished_conversion_counts_as_missing(tmp_path):
    partial = tmp_path / "ImageNet32" / "train.lmdb.partial"
    partial.mkdir(parents=True)
    (partial / "data.mdb").write_bytes(b"half")
    with pytest.raises(
        DataError, match=r"there is no .*train\.lmdb; get it with: .*get_imagenet_data\.sh"
    ):
        get_dataset("ImageNet32", tmp_path)


def test_a_new_data_set_is_one_file(tmp_path):
    """A module in `data/sets/` is enough for the programs to know it."""
    copy = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "data", copy / "data", ignore=shutil.ignore_patterns("*.lmdb"))
    (copy / "lib").symlink_to(REPOSITORY / "lib")
    (copy / "data/sets/stripes.py").write_text(STRIPES)
    program = "from data.get_dataset import *; print(get_dataset('Stripes')[1][0, :, 0].tolist())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[0, 0, 1, 1]\n"
    command = [sys.executable, "-m", "data.histogram", "Stripes", "--nbits", "1"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Stripes, 1 bits: histogram of each colour: ")
