"""LmdbImages: right images in every kind of worker, and a clear word about every kind of damage."""

import os
import pickle
import sys
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data import lmdb_datasets
from data.errors import DataError
from data.lmdb_datasets import LmdbImages

SHAPE = (3, 4, 6)
IMAGES = np.random.default_rng(0).integers(0, 256, (25, 4, 6, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)


@pytest.fixture
def folder(tmp_path, formats):
    formats.write_lmdb(
        tmp_path / "train.lmdb", {i: image.tobytes() for i, image in enumerate(IMAGES)}
    )
    return tmp_path / "train.lmdb"


def test_images_come_in_the_order_of_their_numbers(folder):
    images = list(LmdbImages(folder, SHAPE, "get it"))
    assert len(images) == 25
    assert all(image.dtype == torch.uint8 for image in images)
    assert torch.equal(torch.stack(images), EXPECTED)


def test_an_item_is_a_copy(folder):
    images = LmdbImages(folder, SHAPE, "get it")
    images[3].zero_()
    assert torch.equal(images[3], EXPECTED[3])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_the_parent_has_read_before(folder, method):
    images, other = LmdbImages(folder, SHAPE, "get it"), LmdbImages(folder, SHAPE, "get it")
    assert torch.equal(images[3], other[3])
    loader = DataLoader(
        images, 5, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), EXPECTED)
        assert torch.equal(images[4], EXPECTED[4])  # and the parent goes on


def test_a_bare_fork_leaves_both_processes_able_to_read(folder):
    images = LmdbImages(folder, SHAPE, "get it")
    assert torch.equal(images[0], EXPECTED[0])
    child = os.fork()
    if child == 0:
        inherited = bool(lmdb_datasets._environments)
        os._exit(1 if inherited else 0 if torch.equal(images[1], EXPECTED[1]) else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(images[2], EXPECTED[2])


def test_forks_while_threads_read(folder):
    images, stop = LmdbImages(folder, SHAPE, "get it"), threading.Event()
    failures = []

    def read():
        while not stop.is_set():
            for index in range(25):
                if not torch.equal(images[index], EXPECTED[index]):
                    failures.append(index)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            os._exit(
                0
                if bytes(images[1].numpy().tobytes()) == bytes(EXPECTED[1].numpy().tobytes())
                else 1
            )
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_files_that_were_replaced_are_read_anew(folder, formats):
    before = LmdbImages(folder, SHAPE, "get it")
    assert torch.equal(before[0], EXPECTED[0])
    folder.rename(folder.with_name("old.lmdb"))
    formats.write_lmdb(folder, {0: bytes(72)})
    after = LmdbImages(folder, SHAPE, "get it")
    assert len(after) == 1 and after[0].count_nonzero() == 0


def test_pickling_after_reading(folder):
    images = LmdbImages(folder, SHAPE, "get it")
    assert torch.equal(images[7], EXPECTED[7])
    copy = pickle.loads(pickle.dumps(images))
    assert (
        len(copy) == 25
        and torch.equal(copy[7], EXPECTED[7])
        and torch.equal(images[8], EXPECTED[8])
    )


def test_a_missing_folder_names_the_command(tmp_path):
    with pytest.raises(
        DataError, match=r"there is no .*nothing\.lmdb; get it with: bash get_it\.sh"
    ):
        LmdbImages(tmp_path / "nothing.lmdb", SHAPE, "bash get_it.sh")


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match="pip install lmdb"):
        LmdbImages(folder, SHAPE, "get it")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
def test_a_cut_off_file_is_an_error_not_a_crash(folder, keep):
    file = folder / "data.mdb"
    whole = file.read_bytes()
    file.write_bytes(
        whole[: keep if isinstance(keep, int) else int(keep * len(whole)) // 4096 * 4096]
    )
    with pytest.raises(
        DataError, match=r"train\.lmdb is damaged .*; make it again with: bash get_it\.sh"
    ):
        LmdbImages(folder, SHAPE, "bash get_it.sh")


def test_garbage_is_an_error(folder):
    (folder / "data.mdb").write_bytes(np.random.default_rng(1).bytes(50_000))
    with pytest.raises(DataError, match="is damaged"):
        LmdbImages(folder, SHAPE, "get it")


def test_a_value_of_the_wrong_length(tmp_path, formats):
    formats.write_lmdb(tmp_path / "x.lmdb", {0: b"short", 1: bytes(72)})
    images = LmdbImages(tmp_path / "x.lmdb", SHAPE, "get it")
    with pytest.raises(DataError, match="image 0 has 5 bytes, 4x6x3 has 72"):
        images[0]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"00000000": b"\x89PNG\r\n\x1a\n123"}, "first key is b'00000000', its first value a PNG"),
        ({"a1b2.webp": b"RIFF1234WEBP"}, "a WebP picture of 12 bytes"),
        (
            {"0": b"\xff\xd8\xff\xe0", "1": b"\xff\xd8\xff\xe0"},
            "'0', its first value a JPEG picture",
        ),
        ({"0": b"\x80\x04]q.", "length": b"\x80\x04K\x01."}, "a pickle of 5 bytes"),
        ({"image-000000001": bytes(72), "num-samples": b"1"}, "'image-000000001'"),
    ],
)
def test_lmdbs_of_other_programs_are_told_apart_from_damage(tmp_path, formats, values, kind):
    path = tmp_path / "x.lmdb"
    formats.write_lmdb(path, values)
    with pytest.raises(DataError) as caught:
        LmdbImages(path, SHAPE, "bash get_it.sh")[0]
    line = str(caught.value)
    assert "made by another program" in line and kind in line and "\n" not in line
    assert "keys here are 0, 1, ... and the values raw images" in line
    assert ("data.convert.images" in line) == ("picture" in kind or "PNG" in kind)


def test_an_lmdb_that_is_a_file(tmp_path):
    (tmp_path / "x.lmdb").write_bytes(b"data")
    with pytest.raises(DataError, match=r"x\.lmdb is a file; needed is a folder with data\.mdb"):
        LmdbImages(tmp_path / "x.lmdb", SHAPE, "get it")


def test_a_missing_image(tmp_path, formats):
    formats.write_lmdb(tmp_path / "x.lmdb", {0: bytes(72), 2: bytes(72), 5: bytes(72)})
    images = LmdbImages(tmp_path / "x.lmdb", SHAPE, "get it")
    with pytest.raises(DataError, match="has no image 1"):
        images[1]


def test_an_empty_lmdb(tmp_path, formats):
    formats.write_lmdb(tmp_path / "x.lmdb", {})
    with pytest.raises(DataError, match=r"x\.lmdb is empty"):
        LmdbImages(tmp_path / "x.lmdb", SHAPE, "get it")


@pytest.mark.parametrize("index", [-1, 25])
def test_an_index_out_of_range(folder, index):
    with pytest.raises(IndexError):
        LmdbImages(folder, SHAPE, "get it")[index]
