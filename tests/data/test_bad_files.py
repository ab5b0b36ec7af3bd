"""Data sets that are damaged, cut off, of the wrong size or empty, and full disks: one line, and
nothing changed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from endings import assert_refused, assert_told, ending_of, generated, leaving_files_alone
from helpers import GOLDEN, TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import evaluate
import train
from data import histogram, scenes
from data.convert import shapes3d, tfrecords
from data.errors import DataError
from data.lmdb_datasets import LmdbImages
from data.sets.cifar10 import images_of
from lib import released

pytest.importorskip("lmdb")
pytestmark = pytest.mark.slow

FRACTIONS = st.floats(0, 1, exclude_max=True)
CHANGES = st.lists(st.tuples(FRACTIONS, st.integers(0, 255)), max_size=30)
FATAL = {-signal.SIGBUS, -signal.SIGSEGV}


def damage(content: bytes, cut: float | None, changes: list[tuple[float, int]]) -> bytes:
    """Cut off at a part of the length, and with bytes replaced."""
    damaged = bytearray(content if cut is None else content[: int(cut * len(content))])
    for place, value in changes:
        if damaged:
            damaged[int(place * len(damaged))] = value
    return bytes(damaged)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, images):
    """A folder of data sets with the same two LMDBs, of which a test may damage one; and its
    bytes."""
    root = tmp_path_factory.mktemp("damaged")
    whole = {
        split: (images / f"ImageNet32/{split}.lmdb/data.mdb").read_bytes()
        for split in ("train", "validation")
    }
    for split, content in whole.items():
        (root / f"ImageNet32/{split}.lmdb").mkdir(parents=True)
        (root / f"ImageNet32/{split}.lmdb/data.mdb").write_bytes(content)
    return root, whole


def in_a_child(work) -> int:
    """The exit status of a forked process that does the work; 99 if it raises. LMDB reads damaged
    pages as they are."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            print(repr(error), file=sys.__stderr__, flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@generated(60)
@given(
    split=st.sampled_from(["train", "validation"]),
    cut=st.none() | FRACTIONS,
    changes=CHANGES,
    page=st.booleans(),
)
def test_a_damaged_lmdb(imagenet, split, cut, changes, page):
    """Read to its end or refused. Bits that flip inside its pages may end the process, with a
    status that tells."""
    root, whole = imagenet
    content = damage(whole[split], cut, changes)
    if page:  # the damage is in the pages' headers, which an image's bytes are not
        content = bytearray(content)
        for number, (_, value) in enumerate(changes):
            place = 4096 * (number % 12) + value % 64
            if place < len(content):
                content[place] ^= value
    path = root / f"ImageNet32/{split}.lmdb/data.mdb"
    path.write_bytes(content)

    def work():
        with leaving_files_alone(root):
            ending = ending_of(histogram.main, ["ImageNet32", "--root", root])
        assert_told(ending, "data.histogram")
        sys.exit(ending.status)

    try:
        assert in_a_child(work) in {0, 2, *FATAL}
        if cut is not None:
            assert in_a_child(work) == 2
    finally:
        path.write_bytes(whole[split])


VALUES = st.dictionaries(
    st.sampled_from(["0", "1", "2", "3", "00", "x", "-1", "é"]),
    st.sampled_from([0, 1, 3071, 3072, 3073]),
    max_size=5,
)


@generated(40)
@given(values=VALUES, program=st.sampled_from(["train.py", "evaluate.py", "data.histogram"]))
def test_lmdbs_of_wrong_keys_and_sizes(
    tmp_path_factory, formats, finished, monkeypatch, values, program
):
    root = tmp_path_factory.mktemp("root")
    (root / "ImageNet32").mkdir()
    for split in ("train", "validation"):
        formats.write_lmdb(
            root / f"ImageNet32/{split}.lmdb", {key: bytes(size) for key, size in values.items()}
        )
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: None)
    commands = {
        "train.py": (
            train.main,
            [*TINY, "--root", root, "--output_dir", root / "out", "--batch", 1],
        ),
        "evaluate.py": (
            evaluate.main,
            [
                "--checkpoint",
                finished / "checkpoints/tiny/last.ckpt",
                "--elbo",
                "--root",
                root,
                "--output_dir",
                root,
            ],
        ),
        "data.histogram": (histogram.main, ["ImageNet32", "--root", root]),
    }
    main, arguments = commands[program]
    with leaving_files_alone(root):
        ending = ending_of(main, arguments)
    assert_told(ending, program)
    right = values and all(values.get(str(index)) == 3072 for index in range(len(values)))
    if program != "train.py":  # which reads the rest of the images when it trains
        assert (ending.status == 0) == bool(right), ending.err
    elif not values or values.get(str(len(values) - 1)) != 3072:
        assert_refused(ending, program, "ImageNet32")


@generated(60)
@given(data=st.data(), cut=st.none() | FRACTIONS, changes=CHANGES, as_archive=st.booleans())
def test_damaged_tfrecords(tmp_path_factory, formats, data, cut, changes, as_archive):
    """Every bit of a record is under a checksum: a conversion is complete and right, or it is
    refused."""
    pytest.importorskip("google_crc32c")
    folder = tmp_path_factory.mktemp("source")
    files, _ = formats.imagenet_shards(train=(1, 1), validation=(1,), prefix="")
    source = folder / "archive.tar"
    if as_archive:
        whole = formats.tar_of(files)
        damaged = damage(whole, cut, changes)
        source.write_bytes(damaged)
    else:
        name = data.draw(st.sampled_from(sorted(files)))
        whole, damaged = files[name], damage(files[name], cut, changes)
        for other, content in (files | {name: damaged}).items():
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_bytes(content)
        source = folder
    target = tmp_path_factory.mktemp("target")
    (target / "mine").write_text("mine")
    with leaving_files_alone(folder, target):
        ending = ending_of(tfrecords.main, ["ImageNet32", "--source", source, "--target", target])
    assert_told(ending, "data.convert.tfrecords")
    assert damaged != whole or ending.status == 0
    if not as_archive and damaged != whole and "-r05-" in name:
        assert ending.status == 2
        split = name.partition("/")[0]
        assert not (target / f"{split}.lmdb").exists()


@pytest.fixture(scope="module")
def hdf5_bytes(tmp_path_factory):
    """A file of 3D-Shapes' structure that is small, because nothing is in its compressed images."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path_factory.mktemp("h5") / "3dshapes.h5"
    with h5py.File(path, "w") as file:
        shape = (scenes.SCENES, *scenes.IMAGE_SHAPE)
        file.create_dataset("labels", data=scenes.all_labels(), compression="gzip")
        file.create_dataset("images", shape, np.uint8, chunks=(64, 64, 64, 3), compression="gzip")
    return path.read_bytes()


@generated(40)
@given(cut=st.none() | FRACTIONS, changes=CHANGES, action=st.sampled_from(["check", "convert"]))
def test_a_damaged_hdf5_file(tmp_path_factory, hdf5_bytes, cut, changes, action):
    path = tmp_path_factory.mktemp("3DShapes") / "3dshapes.h5"
    path.write_bytes(
        damage(hdf5_bytes, cut, [*changes, (0.0, 7)] if cut is None and not changes else changes)
    )

    def work():
        with leaving_files_alone(path.parent):
            ending = ending_of(shapes3d.main, [action, path])
        assert_refused(ending, "data.convert.shapes3d", "3dshapes.h5")
        assert list(path.parent.iterdir()) == [path]
        sys.exit(ending.status)

    assert in_a_child(work) in {2, *FATAL}


@generated(60)
@given(cut=st.none() | FRACTIONS, changes=CHANGES, protocol=st.integers(2, 3))
def test_a_damaged_cifar_batch(cut, changes, protocol):
    """Without the check of its sum, which comes first."""
    rows = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    whole = pickle.dumps({"data": rows, "labels": [0, 1]}, protocol=3)
    try:
        images = images_of(
            "data_batch_1", damage(whole[:400] if protocol == 2 else whole, cut, changes)
        )
    except DataError as error:
        assert "\n" not in str(error) and str(error).startswith(
            "CIFAR10's data_batch_1 is damaged ("
        )
    else:
        assert images.shape == (2, 3, 32, 32) and images.dtype == np.uint8


@generated(30)
@given(
    content=st.sampled_from(
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe",
            b'{"elbo": 3}',
            b'{"elbo": {"weights": []}}',
            b"{}",
        ]
    )
    | st.binary(max_size=40),
    ending=st.sampled_from(["results.json", "picture.png"]),
)
def test_files_that_evaluations_read(finished, tmp_path_factory, content, ending):
    """Earlier results that are damaged are not overwritten; pictures that are none are named."""
    folder = tmp_path_factory.mktemp("out")
    (folder / "figs/tiny").mkdir(parents=True)
    path = folder / "figs/tiny" / ending
    path.write_bytes(content)
    task = ["--report"] if ending == "results.json" else ["--overfitting", "--queries", path]
    best = finished / "checkpoints/tiny/best.ckpt"
    with leaving_files_alone(folder):
        assert_refused(
            ending_of(evaluate.main, ["--checkpoint", best, *task, "--output_dir", folder]),
            "evaluate.py",
        )


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is nearly full: what is written beyond the size fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def commands_that_write(finished: Path, source: Path, folder: Path) -> dict[str, tuple]:
    best = finished / "checkpoints/tiny/best.ckpt"
    drawn = [
        "--output_dir",
        folder,
        "--limit",
        2,
        "--count",
        2,
        "--temperatures",
        1,
        "--importance_samples",
        2,
    ]
    return {
        "evaluate.py": (
            evaluate.main,
            ["--checkpoint", best, "--likelihood", "--latents", "--sampling", *drawn],
        ),
        "python -m lib.released": (released.main, [GOLDEN / "tiny_8bit.ckpt", folder / "new.ckpt"]),
        "data.convert.tfrecords": (
            tfrecords.main,
            ["ImageNet32", "--source", source, "--target", folder / "data", "--force"],
        ),
    }


def images_in(folder: Path) -> list[torch.Tensor]:
    """All images of the two splits."""
    splits = [
        LmdbImages(folder / f"{split}.lmdb", (3, 32, 32), "") for split in ("train", "validation")
    ]
    return [image for images in splits for image in images]


@generated(18)
@given(size=st.integers(0, 60_000), number=st.integers(0, 2))
def test_a_full_disk(finished, tmp_path_factory, formats, size, number):
    """Everything that was there, also by the same command, stays; nothing half-written does."""
    pytest.importorskip("google_crc32c")
    source, folder = (
        tmp_path_factory.mktemp("source") / "archive.tar",
        tmp_path_factory.mktemp("out"),
    )
    files, _ = formats.imagenet_shards(train=(2,), validation=(1,), prefix="")
    source.write_bytes(formats.tar_of(files))
    program, (main, arguments) = list(commands_that_write(finished, source, folder).items())[number]
    new, figures = folder / "new.ckpt", folder / "figs/tiny"
    if program != "python -m lib.released":  # which never writes a second time
        assert ending_of(main, arguments).status == 0
    before = images_in(folder / "data") if program == "data.convert.tfrecords" else []
    for path in figures.glob("likelihood_*.csv"):  # it is begun anew
        path.unlink()
    with leaving_files_alone(finished), files_of_at_most(size):
        ending = ending_of(main, arguments)
    assert_told(ending, program)
    assert not [path for path in folder.rglob("*") if ".partial" in path.name]
    if program == "python -m lib.released":
        assert (ending.status, new.exists()) == (2, False)
    elif program == "evaluate.py":
        assert set(json.loads((figures / "results.json").read_text())) == {
            "likelihood",
            "latents",
            "sampling",
        }
        for picture in figures.rglob("*.png"):
            Image.open(picture).load()
    else:
        after = images_in(folder / "data")
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
