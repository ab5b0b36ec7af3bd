"""A run that is killed at any moment and started again ends bit for bit where one that was never
killed ends."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from helpers import REPOSITORY, TINY, TINY_BETA, csv_rows, run

from lib.checkpoint import read_checkpoint
from lib.training.resume import step_checkpoints
from tests.stress.runs_compared import differences, same

ONE_THREAD = os.environ | {
    "OMP_NUM_THREADS": "1"
}  # as `run`: another number of threads rounds otherwise


def run_and_die(hook: str, step: int, *arguments: object) -> None:
    """Runs train.py and kills it with SIGKILL when a hook (or function) `MODULE.CLASS.NAME` is
    called after `step`."""
    code = f"""
import os, signal, sys, train, lib.training.metrics_log, lib.training.checkpoints, lib.files
import pytorch_lightning as pl
owner, name = {hook.rsplit(".", 1)!r}
owner = eval(owner)
before = getattr(owner, name)
trainer = None
Trainer = pl.Trainer
def made(*args, **options):
    global trainer
    trainer = Trainer(*args, **options)
    return trainer
pl.Trainer = made
def killed(*args, **options):
    if trainer is not None and not trainer.sanity_checking and trainer.global_step >= {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **options)
setattr(owner, name, killed)
train.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=ONE_THREAD
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


MOMENTS = [
    ("lib.training.metrics_log.MetricsLog.on_train_batch_end", 1),
    ("lib.training.metrics_log.MetricsLog.on_before_optimizer_step", 5),
    ("lib.training.checkpoints.Checkpoints.on_train_batch_end", 8),
    ("lib.training.metrics_log.MetricsLog.on_validation_end", 8),
    ("lib.training.checkpoints.Checkpoints.on_train_epoch_end", 8),
    ("lib.training.checkpoints.link_or_copy", 8),  # of the best
    ("lib.files.sync", 9),
    ("lib.training.checkpoints.link_or_copy", 12),
    ("lib.files.sync", 16),  # of a picture
    ("lib.training.checkpoints.Checkpoints.on_train_epoch_end", 19),
    ("lib.training.checkpoints.link_or_copy", 19),
]


def test_killed_at_any_moment(tmp_path, images):
    """One run is killed at one moment after the other, each time further on."""
    common = [*TINY, "--root", images, "--make_checkpoint", "--output_dir", tmp_path, "--iters", 19]
    common += ["--checkpoint_every_n_steps", 3, "--lrate_decay", 0.5, "--use_checkpoint"]
    done = run("train.py", *common, "--exp_name", "whole")
    assert done.returncode == 0, done.stderr
    for hook, step in MOMENTS:
        run_and_die(hook, step, *common, "--exp_name", "killed")
    done = run("train.py", *common, "--exp_name", "killed")
    assert done.returncode == 0, done.stderr
    assert differences(tmp_path, "whole", "killed") == []


KINDS = {
    "workers": [*TINY, "--num_workers", 2, "--iters", 21],
    "accumulation": [
        *TINY,
        "--accumulate_grad_batches",
        3,
        "--iters",
        8,
        "--batch",
        2,
        "--grad_clip",
        0.1,
    ],
    "annealing": [
        *TINY_BETA,
        "--beta_final",
        8,
        "--beta_rate",
        0.1,
        "--iters",
        11,
        "--check_val_every_n_epoch",
        2,
    ],
    "noise by image": [*TINY, "--noise", "image", "--max_epochs", 2, "--ema_coef", 0.9],
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(kind, tmp_path, images):
    """A real process is killed by the clock, several times, somewhere after its first new
    checkpoint."""
    common = [
        *KINDS[kind],
        "--root",
        images,
        "--make_checkpoint",
        "--output_dir",
        tmp_path,
        "--use_checkpoint",
    ]
    common += ["--checkpoint_every_n_steps", 2]
    done = run("train.py", *common, "--exp_name", "whole")
    assert done.returncode == 0, done.stderr
    chance = random.Random(kind)
    command = [sys.executable, REPOSITORY / "train.py", *common, "--exp_name", "killed"]
    kills = 0
    for _ in range(3):
        before = step_checkpoints(tmp_path / "checkpoints/killed")[:1]
        process = subprocess.Popen(
            list(map(str, command)),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=ONE_THREAD,
        )
        deadline = time.monotonic() + 240
        while (
            process.poll() is None
            and step_checkpoints(tmp_path / "checkpoints/killed")[:1] == before
        ):
            assert time.monotonic() < deadline, "there is no checkpoint after four minutes"
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(
                chance.uniform(0, 0.3) if kills else 0
            )  # the first at once: it must not be over
        kills += process.poll() is None
        process.kill()
        process.wait()
    done = run("train.py", *common, "--exp_name", "killed")
    assert done.returncode == 0, done.stderr
    assert kills, "the run was over before it could be killed"
    assert differences(tmp_path, "whole", "killed") == []


def test_a_run_that_ended_inside_an_epoch_goes_on_there(tmp_path, images):
    """More --iters later are the same run; only the validation of the earlier end is one more."""
    common = [
        *TINY,
        "--root",
        images,
        "--make_checkpoint",
        "--output_dir",
        tmp_path,
        "--use_checkpoint",
    ]
    pictures, remains = tmp_path / "figs/parts", ".123.partial"  # of a process that was killed
    for name, iters in (("whole", 14), ("parts", 5), ("parts", 14), ("parts", 14)):
        done = run("train.py", *common, "--exp_name", name, "--iters", iters)
        assert done.returncode == 0, done.stderr
        if iters == 5:
            for path in (
                tmp_path / "checkpoints/parts/last.ckpt",
                pictures / "samples_0000008.png",
            ):
                path.with_name(path.name + remains).touch()
            (pictures / f"results.json{remains}").touch()
    assert [path.name for path in tmp_path.rglob("*.partial")] == [f"results.json{remains}"], (
        "that is evaluate.py's"
    )
    whole, parts = (tmp_path / "checkpoints" / name for name in ("whole", "parts"))
    a, b = (
        [(row["step"], row["epoch"], row["neg_elbo"]) for row in csv_rows(x / "steps.csv")]
        for x in (whole, parts)
    )
    assert a == b
    assert [row["step"] for row in csv_rows(parts / "epochs.csv")] == ["5", "8", "14"]
    a, b = (read_checkpoint(folder / "last.ckpt") for folder in (whole, parts))
    assert same(a["state_dict"], b["state_dict"]) and a["position"] == b["position"]
