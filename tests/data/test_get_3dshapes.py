"""The script that gets 3DShapes, against a server on this machine."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPOSITORY

from data.scenes import SCENES, all_labels

h5py = pytest.importorskip("h5py")
SCRIPT = REPOSITORY / "data/3DShapes/get_3dshapes_data.sh"


def run_script(root, **environment):
    return subprocess.run(
        ["bash", SCRIPT],
        cwd="/",
        env=os.environ | {"SDN_DATA_ROOT": str(root)} | environment,
        capture_output=True,
        text=True,
    )


def test_the_script_downloads_converts_and_names_the_data_set(tmp_path):
    """With an interpreter that only notes what it is asked to run."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$*"\n')
    fake.chmod(0o755)
    root = tmp_path / "root with spaces"
    done = run_script(root, SDN_PYTHON=str(fake), SDN_DATA_URL="")
    assert done.returncode == 0, done.stderr
    file = root / "3DShapes/3dshapes.h5"
    download, convert, following = done.stdout.splitlines()
    published = "0a0f6ed98baff276a50f3a081a7434d788da63cb135a98189b2a5b5769be1785"
    url = "https://storage.googleapis.com/3d-shapes/3dshapes.h5"
    assert download == f"-m data.download {url} {file} --sha256 {published}"
    assert convert == f"-m data.convert.shapes3d convert {file}"
    assert following == f"next: bash '{REPOSITORY}/train_3dshapes.sh' --root '{root}'"
    file.with_suffix(".uncompressed.h5").touch()
    done = run_script(root, SDN_PYTHON=str(fake), SDN_DATA_URL="")
    assert done.stdout.splitlines() == [convert, following]


def test_the_script_stops_where_something_fails(tmp_path, server):
    real = dict(SDN_PYTHON=sys.executable, SDN_DATA_URL=server.url)
    server.statuses = [404]
    done = run_script(tmp_path, **real)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "404" in line and "next" not in done.stdout
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file.create_dataset("labels", data=all_labels(), compression="gzip")
        images = file.create_dataset(
            "images", (SCENES, 64, 64, 3), "u1", chunks=(64, 64, 64, 3), compression="gzip"
        )
        images[:64] = np.arange(64, dtype=np.uint8)[:, None, None]
    server.content = (tmp_path / "part.h5").read_bytes()
    server.cuts = [100_000]  # and the connection breaks
    done = run_script(tmp_path, **real)
    *_, line = done.stderr.strip().splitlines()
    assert (
        done.returncode == 2
        and "nothing is to be seen on image 64" in line
        and "next" not in done.stdout
    )
    folder = tmp_path / "3DShapes"
    assert (folder / "3dshapes.h5").read_bytes() == server.content
    assert sorted(file.name for file in folder.iterdir()) == ["3dshapes.h5", "3dshapes.h5.sha256"]
