"""3D-Shapes: the order of its scenes, and the reader of the HDF5 file on small files in the real
format."""

import contextlib
import fcntl
import itertools
import os
import pickle
import re
import shutil
import sys
import tempfile
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data import scenes
from data.convert import shapes3d
from data.convert.shapes3d import main
from data.errors import DataError
from data.scenes import FACTOR_SIZES, SCENES, Scenes, all_labels, validation_scenes
from data.sets.shapes3d import Shapes3D
from lib.files import LOCK, locked

h5py = pytest.importorskip("h5py")
COUNT = 960
LABELS = all_labels()
LAYOUTS = {
    "plain": {},
    "gzip": dict(compression="gzip", chunks=(64, 64, 64, 3)),
    "lzf": dict(compression="lzf", chunks=(700, 64, 64, 3)),
    "split images": dict(compression="gzip", compression_opts=1, chunks=(90, 4, 4, 1)),
    "uncompressed pieces": dict(chunks=(100, 64, 64, 3)),
}


@pytest.fixture(scope="module")
def pictures():
    coarse = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture
def small(monkeypatch):
    """The data set ends after 960 scenes."""
    monkeypatch.setattr(scenes, "SCENES", COUNT)
    monkeypatch.setattr(scenes, "all_labels", lambda: LABELS[:COUNT])


@pytest.fixture
def make(tmp_path, pictures):
    """Writes a file in some layout; the other arguments replace what would be right."""

    def write(layout="gzip", name="3dshapes.h5", images=pictures, labels=LABELS[:COUNT]):
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("images", data=images, **LAYOUTS[layout])
            file.create_dataset("labels", data=labels, compression="gzip")
        return tmp_path / name

    return write


def uncompressed(path):
    return path.with_suffix(".uncompressed.h5")


def assert_read(dataset, pictures, scenes=range(0, COUNT, 37)):
    expected = torch.from_numpy(pictures[list(scenes)]).permute(0, 3, 1, 2)
    assert torch.equal(torch.stack([dataset[scene] for scene in scenes]), expected)
    images = dataset.images(dataset.factors(torch.tensor(scenes)))
    assert images.dtype == torch.uint8 and torch.equal(images, expected)


def test_scenes_are_numbered_with_the_last_factor_fastest():
    assert SCENES == 480_000
    scenes = Scenes()
    every = scenes.factors(torch.arange(SCENES))
    assert every.dtype == torch.int64 and torch.equal(scenes.index_of(every), torch.arange(SCENES))
    counted = itertools.product(*map(range, FACTOR_SIZES))
    assert [tuple(row) for row in every[:5000].tolist()] == list(itertools.islice(counted, 5000))
    assert every[-1].tolist() == [9, 9, 9, 7, 3, 14]
    assert scenes.index_of(torch.tensor([[1, 2, 3, 4, 1, 5]])).tolist() == [
        48000 + 2 * 4800 + 3 * 480 + 4 * 60 + 15 + 5
    ]


def test_labels_are_the_official_values():
    scenes = Scenes()
    labels = scenes.labels(torch.tensor([0, 1, 15, 60, 480, 479_999]))
    assert labels.dtype == torch.float64
    expected = [
        [0, 0, 0, 0.75, 0, -30],
        [0, 0, 0, 0.75, 0, -30 + 60 / 14],
        [0, 0, 0, 0.75, 1, -30],
        [0, 0, 0, 0.75 + 0.5 / 7, 0, -30],
        [0, 0, 0.1, 0.75, 0, -30],
        [0.9, 0.9, 0.9, 1.25, 3, 30],
    ]
    torch.testing.assert_close(
        labels, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert torch.equal(scenes.labels(torch.arange(SCENES)), torch.from_numpy(LABELS))


def test_what_is_out_of_range():
    scenes = Scenes()
    for indices in ([-1], [0, SCENES]):
        with pytest.raises(IndexError):
            scenes.factors(torch.tensor(indices))
    for factors in ([[10, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 4, 0]], [[0, 0, 0, 0, 0, -1]]):
        with pytest.raises(IndexError):
            scenes.index_of(torch.tensor(factors))
    for index in (-1, SCENES):
        with pytest.raises(IndexError):
            scenes[index]
    with pytest.raises(DataError, match="unknown split 'test'"):
        Scenes("test")


def test_validation_is_a_fixed_list_of_scenes():
    scenes = validation_scenes()
    assert (
        len(scenes) == len(Scenes("validation")) == len(scenes.unique()) == 10_000
        and len(Scenes()) == SCENES
    )
    assert scenes[:5].tolist() == [208122, 140985, 411293, 278685, 258639], (
        "the list must never change"
    )
    shares = [
        scenes_with.float() / 10_000
        for scenes_with in map(torch.bincount, Scenes().factors(scenes).T)
    ]
    for size, share in zip(FACTOR_SIZES, shares, strict=True):
        assert (share * size - 1).abs().max() < 0.15, (
            "all values of a factor occur about equally often"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout, small, make, pictures):
    path = make(layout)
    before = path.read_bytes()
    dataset = Shapes3D(path)
    assert len(dataset) == COUNT
    item = dataset[5]
    assert item.shape == (3, 64, 64) and item.dtype == torch.uint8
    item.zero_()  # what is handed out belongs to the caller
    assert_read(dataset, pictures)
    copied = uncompressed(path)
    assert copied.exists() == (layout != "plain") and path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} <= {path.name, copied.name}, (
        "nothing else is left"
    )
    validation = Shapes3D(path, "validation")
    listed = validation_scenes().tolist()
    assert len(validation) == len(listed)
    assert torch.equal(validation[3], dataset[listed[3]])
    assert torch.equal(
        validation.images(dataset.factors([7])), dataset.images(dataset.factors([7]))
    )


def test_the_copy_is_a_file_of_its_own_and_made_once(small, make, pictures, capsys):
    path = make("gzip")
    Shapes3D(path)
    assert "is compressed; its images are written to" in capsys.readouterr().err
    copied = uncompressed(path)
    stamp = copied.stat().st_mtime_ns
    assert_read(Shapes3D(path), pictures)
    assert_read(Shapes3D(copied), pictures)
    path.unlink()
    assert_read(Shapes3D(path), pictures)
    assert copied.stat().st_mtime_ns == stamp and not capsys.readouterr().err


def test_a_copy_of_another_file(small, make, pictures):
    path = make("gzip")
    Shapes3D(path)
    make("gzip", images=pictures[:, ::-1, :, ::-1] // 2)
    with pytest.raises(
        DataError, match=r"uncompressed\.h5 is not a copy of .*3dshapes\.h5; remove it"
    ):
        Shapes3D(path)
    uncompressed(path).unlink()
    assert_read(Shapes3D(path), pictures[:, ::-1, :, ::-1] // 2)
    make("gzip", name="3dshapes.uncompressed.h5")
    with pytest.raises(DataError, match="uncompressed.h5 is compressed; remove it"):
        Shapes3D(path)


def test_what_an_interrupted_conversion_left_is_replaced(small, make, pictures):
    path = make("gzip")
    partial = uncompressed(path).with_suffix(".partial.h5")
    partial.write_bytes(b"half of it")
    assert_read(Shapes3D(path), pictures)
    assert not partial.exists()


def test_an_interruption_leaves_nothing(small, make, monkeypatch, capsys):
    path, seen = make("gzip"), []

    def interrupted(*arguments):
        seen.extend(file.name for file in path.parent.glob("*.partial.h5"))
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(shapes3d, "decoded", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(path)])
    assert stop.value.code == 2 and "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert seen and [file.name for file in path.parent.iterdir()] == [path.name]


def test_two_processes_convert_once(small, make, pictures, capfd):
    path = make("gzip")
    made = []
    threads = [threading.Thread(target=lambda: made.append(Shapes3D(path))) for _ in range(2)]
    with locked(path.parent / LOCK, ""):
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
        assert not made and not uncompressed(path).exists()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    for dataset in made:
        assert_read(dataset, pictures)
    assert capfd.readouterr().err.count("waiting for another process") >= 1


def test_a_disk_that_is_too_small(small, make, monkeypatch):
    path = make("gzip")
    usage = namedtuple("usage", "free")
    partial = uncompressed(path).with_suffix(".partial.h5")
    partial.write_bytes(b"of a process that was killed")
    monkeypatch.setattr(
        shapes3d.shutil, "disk_usage", lambda folder: usage(50_000_000 - 10**9 * partial.exists())
    )
    with pytest.raises(DataError, match=r"has 0\.1 GB free, 3dshapes\.uncompressed\.h5 takes 0\.1"):
        Shapes3D(path)


def assert_refused(path, *messages):
    """The reader and the command refuse the file in one line that names it and says what to do."""
    with pytest.raises(DataError) as caught:
        Shapes3D(path, command="bash get_it.sh")
    line = str(caught.value)
    assert (
        "\n" not in line
        and str(path) in line
        and line.endswith("get it again with: bash get_it.sh")
    )
    for message in messages:
        assert re.search(message, line), line
    assert not uncompressed(path).exists()


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(
        DataError, match=r"there is no .*3dshapes\.h5; get it with: bash get_it\.sh"
    ):
        Shapes3D(tmp_path / "3dshapes.h5", command="bash get_it.sh")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, os.urandom(5000)])
def test_what_is_no_hdf5_file(content, tmp_path):
    (tmp_path / "x.h5").write_bytes(content)
    assert_refused(tmp_path / "x.h5", "is no whole HDF5 file")


def refusal_of(path):
    with pytest.raises(DataError) as caught:
        Shapes3D(path, command="bash get_it.sh")
    line = str(caught.value)
    assert "\n" not in line and str(path) in line
    assert "damaged" not in line and "whole" not in line and "remove" not in line
    return line


def test_a_locked_file_is_not_called_damaged(small, make, pictures):
    """HDF5 locks a file while it writes it; whoever opens it to read it then is refused."""
    path = make("plain")
    with path.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert "is locked by another process" in refusal_of(path)
        with pytest.raises(SystemExit) as stop:
            main(["check", str(path)])
        assert stop.value.code == 2
    assert_read(Shapes3D(path), pictures)


@contextlib.contextmanager
def as_nobody():
    """Permissions hold for this process, also where it is root's."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def shared(tmp_path):
    """A folder that everybody can look into, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_file_that_one_may_not_read_is_not_called_damaged(small, make, shared):
    path = shared / "3dshapes.h5"
    shutil.copy(make("plain"), path)
    path.chmod(0)
    with as_nobody():
        assert "cannot be read by this user: change its permissions" in refusal_of(path)


def test_a_file_system_without_locks_is_not_called_damage(small, make, monkeypatch):
    def refuse(*arguments):
        raise OSError(
            "Unable to open file (unable to lock file, errno = 37, error message = 'No locks "
            "available')"
        )

    path = make("plain")
    monkeypatch.setattr(h5py, "File", refuse)
    assert "HDF5_USE_FILE_LOCKING=FALSE" in refusal_of(path)


def test_a_compressed_file_in_a_folder_that_cannot_be_written(
    small, make, pictures, shared, monkeypatch, capsys
):
    """Its copy is in the user's cache folder, made once; without one, the line says what to set."""
    path = shared / "3dshapes.h5"
    shutil.copy(make("gzip"), path)
    path.chmod(0o644)
    with tempfile.TemporaryDirectory() as cache:
        os.chmod(cache, 0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        with as_nobody():
            first = Shapes3D(path)
            assert "its images are written to" in capsys.readouterr().err
            second = Shapes3D(path)
            assert not capsys.readouterr().err
            assert_read(first, pictures)
            assert_read(second, pictures)
        assert first.path == second.path and first.path.is_relative_to(cache)
        assert [file.name for file in shared.iterdir()] == [path.name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "not/there"))
    with as_nobody():
        assert "let XDG_CACHE_HOME name a folder with 6 GB" in refusal_of(path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with as_nobody():
        assert "let XDG_CACHE_HOME name a folder with 6 GB" in refusal_of(path)


@pytest.mark.parametrize("layout", ["plain", "gzip", "split images"])
@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_a_truncated_file(layout, kept, small, make):
    path = make(layout)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert_refused(path, "is no whole HDF5 file|is damaged")


def test_a_plain_file_that_is_cut_off_later(small, make):
    path = make("plain")
    dataset = Shapes3D(path)
    os.truncate(path, dataset._offset + 900 * 64 * 64 * 3 + 5)
    assert dataset[899].any()
    with pytest.raises(
        DataError,
        match=r"3dshapes\.h5 ends before image 900; remove it and get it again with: bash",
    ):
        dataset[900]


def test_a_damaged_piece(small, make):
    path = make("gzip")
    with h5py.File(path) as file:
        piece = file["images"].id.get_chunk_info(10)
    with path.open("r+b") as file:
        file.seek(piece.byte_offset)
        file.write(b"\xff" * piece.size)
    assert_refused(path, "is damaged in images 512 ... 959")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_images(small, make, pictures):
    assert_refused(
        make(images=pictures[:-1]),
        r"images is uint8 \[959, 64, 64, 3\] instead of uint8 \[960, 64, 64, 3\]",
    )
    assert_refused(
        make(images=pictures.transpose(0, 3, 1, 2), layout="plain"),
        r"images is uint8 \[960, 3, 64, 64\]",
    )
    assert_refused(make(images=pictures.astype(np.float32), layout="plain"), r"images is float32")
    assert_refused(make(images=pictures.astype(np.int8), layout="plain"), r"images is int8")
    empty = pictures.copy()
    empty[700] = 3
    assert_refused(make(images=empty), "nothing is to be seen on image 700")


def test_a_small_file_is_no_3dshapes(make):
    assert_refused(make(), r"instead of uint8 \[480000, 64, 64, 3\]")


def test_other_labels(small, make):
    def changed(row, column, value):
        labels = LABELS[:COUNT].copy()
        labels[row, column] = value
        return labels

    assert_refused(
        make(labels=changed(17, 4, 2)),
        r"the labels of image 17 are \[0\.0, 0\.0, 0\.0, 0\.75, 2\.0, -21\.4\d+\] instead of "
        r"\[.*1\.0, -21\.4\d+\]",
        r"\(1 of 960 differ\)",
    )
    assert_refused(make(labels=changed(959, 5, np.nan)), "the labels of image 959 are .*nan")
    assert_refused(make(labels=LABELS[:COUNT, ::-1]), "the labels of image 0 are")
    assert_refused(make(labels=LABELS[COUNT : 2 * COUNT]), r"\(960 of 960 differ\)")
    assert_refused(
        make(labels=LABELS[:COUNT, :5]),
        r"labels is float64 \[960, 5\] instead of float64 \[960, 6\]",
    )
    assert_refused(make(labels=LABELS[:COUNT].astype(int)), r"labels is int64")
    Shapes3D(make("plain", labels=LABELS[:COUNT].astype(np.float32)))


def test_other_names(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["pictures"] = [1]
    assert_refused(tmp_path / "x.h5", r"has no data set 'images', but 'pictures'")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_group("images")
    assert_refused(tmp_path / "x.h5", r"has no data set 'images', but 'images'")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset(
            "images", (SCENES, 64, 64, 3), "u1", chunks=(64, 64, 64, 3), compression="gzip"
        )
    assert_refused(tmp_path / "x.h5", r"has no data set 'labels', but 'images'")


def test_the_last_image_of_a_whole_file(tmp_path):
    """A file of the full size in which only the last image takes room on the disk."""
    path = tmp_path / "3dshapes.h5"
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        file["labels"] = LABELS
        file.create_dataset("images", (SCENES, 64, 64, 3), "u1")[SCENES - 1] = image
    dataset = Shapes3D(path)
    assert len(dataset) == SCENES
    assert torch.equal(dataset[SCENES - 1], torch.from_numpy(image).permute(2, 0, 1))
    assert torch.equal(dataset.images([[9, 9, 9, 7, 3, 14]])[0], dataset[SCENES - 1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(method, small, make, pictures):
    dataset = Shapes3D(make("gzip"))
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert torch.equal(dataset[4], expected[4])  # the file is open before the workers start
    loader = DataLoader(dataset, batch_size=96, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(dataset[5], expected[5])


def test_processes_that_share_the_open_file(small, make, pictures):
    dataset = Shapes3D(make("plain"))
    assert_read(dataset, pictures)
    children = []
    for part in range(3):
        if not (child := os.fork()):
            right = all(
                dataset[i].numpy().tobytes() == pictures[i].transpose(2, 0, 1).tobytes()
                for i in range(part, COUNT)
            )
            os._exit(0 if right else 1)
        children.append(child)
    assert_read(dataset, pictures)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]


def test_pickling_after_reading(small, make, pictures):
    dataset = Shapes3D(make("gzip"))
    assert_read(dataset, pictures)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2000
    assert_read(pickle.loads(pickled), pictures)
    assert_read(dataset, pictures)


def test_a_missing_package_is_named(make, monkeypatch):
    path = make()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        Shapes3D(path)


def test_the_commands(small, make, capsys):
    path = make("gzip")
    main(["check", str(path)])
    assert f"{path}: 960 images with the labels of 3D-Shapes" in capsys.readouterr().out
    assert not uncompressed(path).exists()
    main(["convert", str(path)])
    assert f"{uncompressed(path)}: 960 images to be read at random" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:100_000])
    for action in ("check", "convert"):
        with pytest.raises(SystemExit) as stop:
            main([action, str(path)])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"data.convert.shapes3d: error: {path} is no whole HDF5 file")
