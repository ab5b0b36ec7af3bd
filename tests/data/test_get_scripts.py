"""The scripts that get ImageNet32 and CelebAHQ256, against a server on this machine."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY

from data.lmdb_datasets import LmdbImages

pytest.importorskip("lmdb")
pytest.importorskip("google_crc32c")
SCRIPT = REPOSITORY / "data/ImageNet32/get_imagenet_data.sh"


def run_script(root, server):
    environment = os.environ | {
        "SDN_DATA_URL": server.url,
        "SDN_PYTHON": sys.executable,
        "SDN_DATA_ROOT": str(root),
    }
    return subprocess.run(
        ["bash", SCRIPT], cwd=root.parent, env=environment, capture_output=True, text=True
    )


def test_the_script_downloads_and_converts_from_any_folder(tmp_path, formats, server):
    files, images = formats.imagenet_shards()
    server.content = formats.tar_of(files)
    done = run_script(tmp_path / "root with spaces", server)
    assert done.returncode == 0, done.stderr
    assert "train.lmdb: 5 images" in done.stdout
    assert f"bash train_imagenet.sh --root '{tmp_path}/root with spaces'" in done.stdout
    archive = tmp_path / "root with spaces/ImageNet32/imagenet-oord-tfr.tar"
    assert f"no longer needed: {archive}" in done.stdout and archive.is_file()
    archive.unlink()
    stored = LmdbImages(
        tmp_path / "root with spaces/ImageNet32/validation.lmdb", (3, 32, 32), "get it"
    )
    assert torch.equal(
        torch.stack(list(stored)), torch.from_numpy(images["validation"]).permute(0, 3, 1, 2)
    )
    asked = len(server.ranges)
    again = run_script(tmp_path / "root with spaces", server)
    assert again.returncode == 0 and "already" in again.stdout and len(server.ranges) == asked


def test_the_script_stops_where_the_download_fails(tmp_path, server):
    server.statuses = [404]
    done = run_script(tmp_path / "root", server)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "404" in line
    assert not list((tmp_path / "root/ImageNet32").glob("*.lmdb*"))


@pytest.mark.parametrize(
    ("script", "archive", "recipe"),
    [
        ("ImageNet32/get_imagenet_data.sh", "imagenet-oord-tfr.tar", "train_imagenet.sh"),
        ("CelebAHQ256/get_celeb_data.sh", "celeba-tfr.tar", "train_celeb.sh"),
    ],
)
def test_the_scripts_download_convert_and_name_the_recipe(script, archive, recipe, tmp_path):
    """With an interpreter that only notes what it is asked to run."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$*"\n')
    fake.chmod(0o755)
    root, name = tmp_path / "root", script.partition("/")[0]
    environment = os.environ | {"SDN_PYTHON": str(fake), "SDN_DATA_ROOT": str(root)}
    environment.pop("SDN_DATA_URL", None)
    command = ["bash", str(REPOSITORY / "data" / script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    download, convert, following = done.stdout.splitlines()
    url = f"https://openaipublic.azureedge.net/glow-demo/data/{archive}"
    assert download == f"-m data.download {url} {root / name / archive}"
    source, target = root / name / archive, root / name
    assert convert == f"-m data.convert.tfrecords {name} --source {source} --target {target}"
    assert f"bash {recipe} --root '{root}'" in following
