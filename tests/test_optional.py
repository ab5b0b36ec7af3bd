"""Packages that only some uses need: one line says which is missing and which extra brings it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY

from data.convert.shapes3d import opened
from data.convert.sources import open_source
from data.convert.storing import Store
from data.convert.tfrecord import masked_crc32c
from data.convert.tfrecords import convert_split
from data.lmdb_datasets import LmdbImages
from data.sets.photos32 import photographs
from experiments.output import panels
from lib.config import TrainConfig
from lib.DisentanglementVAE import metrics
from lib.evaluation.report import write_report
from lib.pictures import save_rates
from lib.training.loggers import Dashboard


def lmdb_images(folder: Path) -> None:
    (folder / "data.mdb").touch()
    LmdbImages(folder, (3, 32, 32), "")


def score(function):
    return lambda folder: function(lambda images: np.zeros((len(images), 2)), None, seed=0)


USES = {
    "wandb": lambda folder: Dashboard(TrainConfig(logger="wandb"), folder),
    "tensorboard": lambda folder: Dashboard(TrainConfig(logger="tensorboard"), folder),
    "google_crc32c": lambda folder: masked_crc32c(b""),
    "h5py": lambda folder: opened(folder).__enter__(),
    "pyarrow": lambda folder: open_source(str(touched(folder / "a.parquet"))),
    "datasets": lambda folder: open_source("hf:somebody/something"),
    "skimage": lambda folder: photographs(),
    "jinja2": lambda folder: write_report(folder / "a", title="", results={}, config={}),
    "matplotlib": lambda folder: save_rates([1.0], folder / "a.png"),
    "lmdb": lmdb_images,
    "sklearn.datasets": lambda folder: photographs(),
    "sklearn": score(metrics.mig),
}
OTHER_USES = [
    ("lmdb", lambda folder: open_source(str(touched(folder / "data.mdb").parent))),
    ("lmdb", lambda folder: Store(folder, {})),
    ("lmdb", lambda folder: convert_split("ImageNet32", "train", [], folder)),
    ("matplotlib", lambda folder: panels(folder / "a.png", 1, 1, size=(1, 1)).__enter__()),
    ("sklearn", score(metrics.beta_vae)),
    ("sklearn", score(metrics.dci)),
    ("sklearn", score(metrics.sap)),
]


def touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(("module", "use"), [*USES.items(), *OTHER_USES])
def test_a_missing_package_is_one_line_that_names_its_extra(module, use, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Exception) as raised:
        use(tmp_path)
    found = re.fullmatch(
        r".+ needs the package ([\w-]+): pip install \1 \(or this project with its extra "
        r"\[(\w+)\]\)",
        str(raised.value),
    )
    assert found, repr(raised.value)
    assert not isinstance(raised.value, ImportError)
    extras = (REPOSITORY / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    (packages,) = re.findall(rf"^{found[2]} = \[(.*)\]$", extras, re.MULTILINE)
    assert f'"{found[1]}"' in packages, "the extra has the package"
