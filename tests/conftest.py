"""Fixtures that several test files share."""

from __future__ import annotations

import signal

import pytest
import torch
from helpers import TINY, TINY_BETA, run

# Tests send these to programs, which inherit that they are ignored under nohup or in a shell's
# background job.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of data sets with a small ImageNet32 in the real format: 32 training and 11
    validation images."""
    lmdb = pytest.importorskip("lmdb")
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 32), ("validation", 11)):
        (root / "ImageNet32").mkdir(exist_ok=True)
        environment = lmdb.open(str(root / f"ImageNet32/{split}.lmdb"), map_size=2**20)
        with environment, environment.begin(write=True) as transaction:
            for index in range(count):
                coarse = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator)
                image = coarse.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
                transaction.put(str(index).encode(), image.numpy().tobytes())
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory, images):
    """The output folder of a run of 6 steps, called tiny, with checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--root", images, "--output_dir", folder]
    arguments += "--exp_name tiny --iters 6 --make_checkpoint".split()
    done = run("train.py", *TINY, *arguments)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def beta_run(tmp_path_factory):
    """The output folder of a disentanglement run of 8 steps in two epochs, called beta; β rises to
    8 in 4 steps."""
    folder = tmp_path_factory.mktemp("beta_run")
    flags = "--exp_name beta --iters 8 --beta_final 8 --beta_rate 0.25 --make_checkpoint".split()
    done = run("train.py", *TINY_BETA, *flags, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder
