"""CIFAR10 from an archive that the test makes and serves: read without unpacking it or executing
what it holds."""

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import REPOSITORY

from data import download
from data.errors import DataError
from data.get_dataset import get_dataset
from data.sets import cifar10
from data.sets.cifar10 import ARCHIVE, FOLDER, Cifar10, images_of

PIXELS = np.random.default_rng(0).integers(
    0, 256, (6, 5, 3072), dtype=np.uint8
)  # five training files, one of tests


def archive_of(files, folder=FOLDER):
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return buffer.getvalue()


def expect(files, monkeypatch):
    """The code takes these files for the published ones."""
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    known = {split: {name: sums[name] for name in names} for split, names in cifar10.FILES.items()}
    monkeypatch.setattr(cifar10, "FILES", known)


@pytest.fixture
def published(monkeypatch):
    """The files, and the archive that they are published in, where nothing can be downloaded."""
    names = [f"data_batch_{i + 1}" for i in range(5)] + ["test_batch"]
    # With protocol 3, as in the published files, an array holds its bytes.
    files = {
        n: pickle.dumps({"data": p, "labels": [0] * 5}, protocol=3)
        for n, p in zip(names, PIXELS, strict=True)
    }
    expect(files, monkeypatch)
    archive = archive_of(files | {"batches.meta": b"labels"})
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/nothing-listens-here")
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.001)
    return SimpleNamespace(files=files, archive=archive)


def assert_images(folder):
    for split, pixels in (("train", PIXELS[:5].reshape(-1, 3072)), ("validation", PIXELS[5])):
        images = Cifar10(folder, split)
        expected = torch.from_numpy(pixels).view(-1, 3, 32, 32)
        assert torch.equal(torch.stack([images[i] for i in range(len(images))]), expected)
        assert images[0].dtype == torch.uint8


def unpack(files, folder):
    (folder / FOLDER).mkdir(parents=True)
    for name, content in files.items():
        (folder / FOLDER / name).write_bytes(content)


def test_it_is_downloaded_on_first_use_only(published, tmp_path, server, monkeypatch):
    server.content = published.archive
    monkeypatch.setattr(cifar10, "URL", server.url)
    folder = tmp_path / "new/CIFAR10"
    assert_images(folder)
    assert len(server.ranges) == 1
    assert sorted(path.name for path in folder.iterdir()) == [ARCHIVE, f"{ARCHIVE}.sha256"]


def test_another_archive_than_the_published_one_is_not_used(
    published, tmp_path, server, monkeypatch
):
    server.content = archive_of(published.files | {"data_batch_1": b"other"})
    monkeypatch.setattr(cifar10, "URL", server.url)
    with pytest.raises(DataError, match="has SHA-256 .*, but the published file has"):
        Cifar10(tmp_path, "validation")
    assert not (tmp_path / ARCHIVE).exists()


def test_an_archive_put_there_by_hand_is_used(published, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(published.archive)
    assert_images(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE], "nothing is unpacked"


def test_unpacked_files_are_used_without_network_or_writing(published, tmp_path):
    unpack(published.files, tmp_path)
    assert_images(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_an_unpacked_file_that_is_damaged_is_left_and_the_archive_used(published, tmp_path):
    unpack(published.files | {"data_batch_3": b"cut off"}, tmp_path)
    with pytest.raises(DataError, match="cannot be downloaded"):
        Cifar10(tmp_path, "train")
    (tmp_path / ARCHIVE).write_bytes(published.archive)
    assert_images(tmp_path)
    assert (tmp_path / FOLDER / "data_batch_3").read_bytes() == b"cut off"


def test_without_a_network_the_message_says_what_to_put_where(published, tmp_path):
    with pytest.raises(DataError) as raised:
        get_dataset("CIFAR10", tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        "Connection refused",
        f"put {ARCHIVE} from {cifar10.URL} into {tmp_path / 'CIFAR10'}",
    ):
        assert part in message, message


def test_a_folder_that_cannot_be_made_is_said(published, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="Not a directory"):
        Cifar10(tmp_path / "file/CIFAR10", "train")


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.999])
def test_an_archive_that_is_cut_off_is_not_used_and_stays(keep, published, tmp_path):
    cut = published.archive[: keep if isinstance(keep, int) else int(keep * len(published.archive))]
    (tmp_path / ARCHIVE).write_bytes(cut)
    with pytest.raises(
        DataError, match=rf"{ARCHIVE} is damaged .*: remove it to download it again"
    ):
        Cifar10(tmp_path, "train")
    assert (tmp_path / ARCHIVE).read_bytes() == cut


def test_a_file_in_the_archive_that_is_missing_or_another_is_named(published, tmp_path):
    without = {name: content for name, content in published.files.items() if name != "data_batch_2"}
    for files in (without, without | {"data_batch_2": published.files["data_batch_1"]}):
        (tmp_path / ARCHIVE).write_bytes(archive_of(files))
        with pytest.raises(DataError, match="data_batch_2 is missing or damaged"):
            Cifar10(tmp_path, "train")


@pytest.mark.parametrize("where", ["a batch", "another file", "a header"])
def test_an_archive_that_unpacks_to_gigabytes_is_refused(where, published, tmp_path):
    """2 MB that unpack to 2 GB: in a file that is read, in one that is passed over, and in a header
    that tarfile reads as a whole. The process may take 0.6 GB more than it has."""
    size = 2 * 10**9
    name = {"a batch": f"{FOLDER}/data_batch_1", "another file": "x", "a header": "x"}[where]
    info = tarfile.TarInfo(name)
    info.size = size
    if where == "a header":
        info.type = tarfile.GNUTYPE_LONGNAME
    with gzip.open(tmp_path / ARCHIVE, "wb", compresslevel=6) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        block = bytes(10**7)
        for _ in range(size // len(block)):
            file.write(block)
    assert (tmp_path / ARCHIVE).stat().st_size < 3e6
    program = f"""
import resource, sys
from data.errors import DataError
from data.sets.cifar10 import Cifar10
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000,) * 2)
try:
    Cifar10(__import__("pathlib").Path({str(tmp_path)!r}), "train")
except DataError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{ARCHIVE} is damaged (it unpacks to more than 200000000 bytes)" in done.stdout


def test_members_that_lead_out_of_the_folder_write_nothing(published, tmp_path):
    """Paths upwards, absolute paths, links and devices: the archive is read, never unpacked."""
    outside = tmp_path / "outside"
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("../../outside", str(outside), f"{FOLDER}/../../outside"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, BytesIO(b"evil"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
            info.type, info.linkname = kind, str(outside)
            tar.addfile(info)
        for name, content in published.files.items():
            info = tarfile.TarInfo(f"{FOLDER}/{name}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    folder = tmp_path / "in/here"
    folder.mkdir(parents=True)
    (folder / ARCHIVE).write_bytes(buffer.getvalue())
    assert_images(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [ARCHIVE, "here", "in"]


class Runs:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["whole", "data", "label"])
def test_a_malicious_batch_runs_nothing(place, protocol, published, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    calls = [
        Runs(os.system, f"touch {canary}"),
        Runs(eval, f"open({str(canary)!r}, 'w')"),
        Runs(getattr, Runs(__import__, "os"), "system"),
        Runs(np.save, str(canary), 0),
        Runs(np.frombuffer, b"0" * 15360, np.uint8),
    ]
    for call in calls:
        batch = {
            "whole": call,
            "data": {"data": call},
            "label": {"labels": [call], "data": PIXELS[0]},
        }[place]
        content = pickle.dumps(batch, protocol=protocol)
        with pytest.raises(DataError, match=r"data_batch_1 is damaged \(it holds a ") as raised:
            images_of("data_batch_1", content)
        assert "\n" not in str(raised.value)
    files = published.files | {"data_batch_1": pickle.dumps({"data": calls[0]}, protocol=protocol)}
    expect(files, monkeypatch)
    (tmp_path / ARCHIVE).write_bytes(archive_of(files))
    with pytest.raises(DataError, match=r"data_batch_1 is damaged \(it holds a .*system\)"):
        Cifar10(tmp_path, "train")
    assert not canary.exists()
    assert not list(tmp_path.glob("canary*"))


def test_the_malicious_calls_would_run_if_they_were_loaded(tmp_path):
    """The canary of the test above can sing."""
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "batch",
    [
        {"data": PIXELS[0].astype(np.uint16)},
        {"data": PIXELS[0].T},
        {"data": np.asfortranarray(PIXELS[0])},
        {"data": PIXELS[0][:0]},
        {"data": PIXELS[0][:, :3000]},
        {"data": np.array([{}], object)},
        {"data": [1, 2]},
        {"labels": []},
        [PIXELS[0]],
        None,
    ],
    ids=str,
)
def test_other_arrays_are_refused(batch):
    with pytest.raises(DataError, match="test_batch is damaged"):
        images_of("test_batch", pickle.dumps(batch, protocol=3))


def test_a_batch_of_python_2_is_read():
    """The published files: text for bytes, and the array in numpy's old place."""
    pixels = bytes(range(256)) * 12
    content = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tbs."
    )
    assert np.array_equal(
        images_of("data_batch_1", content).reshape(-1), np.frombuffer(pixels, np.uint8)
    )
