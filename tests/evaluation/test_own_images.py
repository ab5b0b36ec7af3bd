"""Evaluations of one's own pictures, and samples as other tools read them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mixed_pictures import encoded, scene
from PIL import Image

import evaluate
from data.get_dataset import fit_of
from lib.evaluation.sampling import write_folder, write_npz


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "my photo.jpg"
    path.write_bytes(encoded(scene(3, 90, 70), "JPEG"))
    return str(path)


def evaluated(finished, folder, *flags):
    checkpoint = finished / "checkpoints/tiny/last.ckpt"
    where = ["--checkpoint", checkpoint, "--output_dir", folder, "--device", "cpu"]
    evaluate.main([str(flag) for flag in (*where, *flags)])
    return json.loads((folder / "figs/tiny/results.json").read_text())


def test_pictures_of_other_sizes_are_evaluated(finished, images, tmp_path, photo):
    flags = ["--reconstruction", "--interpolation", "--neighborhood", "--overfitting"]
    flags += ["--images", 2, photo, "--queries", photo, "--layers", 1, "--frames", 2]
    results = evaluated(finished, tmp_path, *flags, "--temperatures", 0.8, "--root", images)
    figs = tmp_path / "figs/tiny"
    assert (figs / "interpolation_2_my_photo.png").is_file()
    assert (figs / "neighborhood_my_photo.png").is_file()
    assert results["reconstruction"]["images"] == 2
    assert results["interpolation"]["images"] == [2, photo]
    assert len(results["overfitting"]["neighbours"]) == 1


def test_own_pictures_need_no_data_set(finished, tmp_path, photo):
    flags = ["--interpolation", "--images", photo, photo, "--frames", 2, "--layers", 1]
    evaluated(finished, tmp_path, *flags, "--root", tmp_path / "nowhere")
    assert (tmp_path / "figs/tiny/interpolation_my_photo-0_my_photo-1.png").is_file()


def test_pictures_are_fitted_as_the_data_set_was(tmp_path):
    assert fit_of("CIFAR10", tmp_path) == fit_of("absent", tmp_path) == "crop"
    (tmp_path / "cats").mkdir()
    described = dict(format=1, shape=[3, 8, 8], flip=False, options=dict(shape=dict(fit="pad")))
    (tmp_path / "cats/dataset.json").write_text(json.dumps(described))
    assert fit_of("cats", tmp_path) == "pad"


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_written_as_they_come(tmp_path, channels):
    images = torch.randint(0, 256, (7, channels, 4, 6), dtype=torch.uint8)
    done = []
    first = write_npz(iter(images.split(3)), tmp_path / "all", 7, done.append)
    stored = np.load(tmp_path / "all.npz")["arr_0"]
    assert stored.dtype == np.uint8 and stored.shape == (7, 4, 6, channels) and done == [3, 3, 1]
    assert (torch.from_numpy(stored).permute(0, 3, 1, 2) == images).all() and (
        first == images
    ).all()
    write_folder(iter(images.split(3)), tmp_path / "all", 7, done.append)
    assert sorted(path.name for path in (tmp_path / "all").iterdir())[-1] == "0006.png"
    pixels = np.asarray(Image.open(tmp_path / "all/0006.png")).reshape(4, 6, channels)
    assert (pixels == stored[6]).all()
