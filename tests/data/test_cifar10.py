"""CIFAR10 in torchvision's layout, from an archive that the test makes and serves."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from data.cifar10 import Cifar10
from data.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3072), dtype=np.uint8)  # five training files, one of tests


@pytest.fixture
def archive(monkeypatch):
    """The archive's bytes; torchvision expects its checksums."""
    names = [f"data_batch_{i + 1}" for i in range(5)] + ["test_batch"]
    files = {
        name: pickle.dumps({"data": pixels, "labels": [0] * 5}) for name, pixels in zip(names, PIXELS, strict=True)
    }
    files["batches.meta"] = pickle.dumps({"label_names": ["thing"]})
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = buffer.getvalue()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], sums[names[5]]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing-listens-here")
    return content


def assert_images(folder):
    for split, pixels in (("train", PIXELS[:5].reshape(-1, 3072)), ("validation", PIXELS[5])):
        images = Cifar10(folder, split)
        expected = torch.from_numpy(pixels).view(-1, 3, 32, 32)
        assert torch.equal(torch.stack([images[i] for i in range(len(images))]), expected)
        assert images[0].dtype == torch.uint8


def test_it_is_downloaded_on_first_use_only(archive, tmp_path, server, monkeypatch):
    server.content = archive
    monkeypatch.setattr(CIFAR10, "url", server.url)
    assert_images(tmp_path / "new/CIFAR10")
    asked = len(server.ranges)
    assert asked > 0
    assert_images(tmp_path / "new/CIFAR10")
    assert len(server.ranges) == asked


def test_an_archive_put_there_by_hand_is_used(archive, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(archive)
    assert_images(tmp_path)


def test_a_damaged_archive_is_not_used(archive, tmp_path):
    (tmp_path / CIFAR10.filename).write_bytes(archive[:-20])
    with pytest.raises(DataError, match=CIFAR10.filename):
        Cifar10(tmp_path, "train")
