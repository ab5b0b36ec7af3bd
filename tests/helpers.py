"""What several tests need: golden vectors, relative errors, small models, running the entry
scripts."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import forked
from torch import Tensor

REPOSITORY = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

SMALL = dict(h_size=8, z_size=2, depth=3, ds_list=[0, 2], nbits=8, mix_components=2)
SMALL_SDN = SMALL | dict(sdn_max_scale=8, sdn_nfeat_0=6, sdn_nfeat_diff=2, sdn_num_dirs=2)
# Flags of a run that takes seconds.
TINY = (
    "--dataset ImageNet32 --batch 4 --batch_val 8 --depth 2 --ds_list 1 --downsample_first "
    "--h_size 8 --z_size 2 "
    "--post_model IsoGaussian --mix_components 1 --sdn_nfeat_0 6 --sdn_num_dirs 1 --num_workers 0 "
    "--gpus 0 "
    "--logger none --figsize 2"
).split()
TINY_BETA = (
    "--task disentanglement --dataset Shapes3DRendered --batch 4 --batch_val 8 --z_size 3 "
    "--sdn_nfeat_0 4 "
    "--epoch_images 16 --val_images 11 --num_workers 0 --gpus 0 --logger none --figsize 2"
).split()


def resumable(images: Path, folder: Path, *more: object) -> list[str]:
    """Flags of a small run on `images` that keeps checkpoints in `folder` and goes on from them."""
    where = ["--root", images, "--output_dir", folder, "--make_checkpoint", "--use_checkpoint"]
    return [*TINY, *map(str, [*where, *more])]


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; the plain norm if that is zero."""
    difference = (actual.detach().double() - expected.double()).norm()
    scale = expected.double().norm()
    return (difference / scale if scale > 0 else difference).item()


def run(
    script: str, *arguments: object, cwd: Path = REPOSITORY, timeout: int = 600, **environment: str
):
    """Runs an entry script, or with `-m NAME` a module, as a user would; the finished process with
    its text output.

    With changes of the `environment` in a new interpreter, otherwise in a copy of a running one,
    which starts sooner.
    """
    start = (
        ["-m", script.removeprefix("-m ")]
        if script.startswith("-m ")
        else [str(REPOSITORY / script)]
    )
    command = [*start, *map(str, arguments)]
    all_of_it = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"} | environment
    if not environment:
        return forked.run(command, cwd, all_of_it, timeout)
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=all_of_it
    )


def assert_one_line_error(done: subprocess.CompletedProcess, *parts: str, status: int = 2) -> None:
    """The process failed with `status` and without a traceback; its one line with "error:" holds
    all `parts`."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (last,) = [line for line in done.stderr.splitlines() if "error:" in line]
    for part in parts:
        assert part in last, last
