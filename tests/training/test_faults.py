"""Losses and gradients that are not finite, signals, and processes that die: what becomes of the
run."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, csv_rows, resumable, run
from torch import nn

import train
from lib.checkpoint import read_checkpoint
from lib.training.base import VAETraining
from lib.training.non_finite import all_finite


@pytest.fixture
def spoil(monkeypatch):
    """Makes the loss, a layer's output or a gradient of given steps not finite."""
    compute = VAETraining.compute

    def from_now_on(steps: set[int], what: str, value: float = math.nan) -> None:
        def spoiled(self: VAETraining, batch):
            if self.global_step not in steps:
                return compute(self, batch)
            layer = self.model.ladder_layers[1].up_a
            if what == "output":
                with layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * value,)):
                    return compute(self, batch)
            output = compute(self, batch)
            if what == "loss":
                output.distortion = output.distortion + value
            else:
                layer.bias.register_hook(lambda gradient: gradient * value)
            return output

        monkeypatch.setattr(VAETraining, "compute", spoiled)

    return from_now_on


@pytest.mark.parametrize(
    ("what", "value"), [("loss", math.nan), ("loss", math.inf), ("output", math.inf)]
)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, images, spoil, what, value):
    """Weights, moments and average after it are those before it; it is counted and logged."""
    train.main(resumable(images, tmp_path, "--iters", 3, "--exp_name", "before"))
    spoil({3}, what, value)
    train.main(resumable(images, tmp_path, "--iters", 4, "--exp_name", "spoiled"))
    before, after = (
        read_checkpoint(tmp_path / f"checkpoints/{name}/last.ckpt")
        for name in ("before", "spoiled")
    )
    assert before["global_step"] == 3 and after["global_step"] == 4
    for name, tensor in before["state_dict"].items():
        assert torch.equal(tensor, after["state_dict"][name]), name
    for index, state in before["optimizer_states"][0]["state"].items():
        assert all(
            torch.equal(state[name], after["optimizer_states"][0]["state"][index][name])
            for name in state
        )
    rows = csv_rows(tmp_path / "checkpoints/spoiled/steps.csv")
    assert [row["skipped"] for row in rows] == ["0", "0", "0", "1"]
    epoch = csv_rows(tmp_path / "checkpoints/spoiled/epochs.csv")[-1]
    assert float(epoch["train_neg_elbo"]) == pytest.approx(
        sum(float(row["neg_elbo"]) for row in rows[:3]) / 3
    )


def test_accumulated_batches_are_skipped_together(tmp_path, images, spoil):
    spoil({1}, "loss")
    train.main(resumable(images, tmp_path, "--iters", 4, "--accumulate_grad_batches", 2))
    rows = csv_rows(tmp_path / "checkpoints/sdn/steps.csv")
    assert [row["skipped"] for row in rows] == ["0", "1", "0", "0"]
    assert all_finite(read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")["state_dict"])


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("loss", "the first is the loss, with every layer's output finite"),
        ("output", "the first is in the output of ladder_layers.1.up_a"),
        ("gradient", "the first is in the gradient of ladder_layers.1.up_a.bias"),
    ],
)
def test_a_run_goes_back_with_a_lower_rate_and_stops_at_last(
    tmp_path, images, spoil, capfd, what, where
):
    spoil(set(range(5, 99)), what)
    with pytest.raises(SystemExit) as stop:
        more = [
            "--iters",
            50,
            "--max_skipped",
            3,
            "--max_rollbacks",
            2,
            "--checkpoint_every_n_steps",
            2,
        ]
        train.main(resumable(images, tmp_path, *more, "--lrate_decay", 1))
    assert stop.value.code == 1
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    notes = [line for line in errors.splitlines() if "back to the weights of step_" in line]
    assert len(notes) == 2 and all(where in note for note in notes)
    assert (
        "note: step 8: 3 steps in a row" in notes[0]
        and "back to the weights of step_0000004.ckpt" in notes[0]
    )
    assert notes[0].endswith("with the learning rate 0.001") and notes[1].endswith(
        "with the learning rate 0.0005"
    )
    last = errors.strip().splitlines()[-1]
    assert last.startswith("train.py: error: step 14: 3 steps in a row") and where in last
    assert (
        "stopped after going back 2 times. --use_checkpoint goes on from " in last
        and ".ckpt: with a smaller" in last
    )
    rows = csv_rows(tmp_path / "checkpoints/sdn/steps.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 15))
    assert [float(row["lr"]) for row in rows] == [0.002] * 8 + [0.001] * 3 + [0.0005] * 3


def test_a_run_that_went_back_recovers(tmp_path, images, spoil):
    """The weights are those of the checkpoint, the rate stays low, and a resumed run keeps both."""
    spoil(set(range(4, 7)), "output", math.inf)
    more = ["--max_skipped", 3, "--checkpoint_every_n_steps", 2, "--lrate_decay", 1]
    for iters in (7, 10):
        train.main(resumable(images, tmp_path, *more, "--iters", iters))
    folder = tmp_path / "checkpoints/sdn"
    rows = csv_rows(folder / "steps.csv")
    assert [int(row["skipped"]) for row in rows] == [0] * 4 + [1] * 3 + [0] * 3
    assert [float(row["lr"]) for row in rows] == [0.002] * 7 + [0.001] * 3
    last = read_checkpoint(folder / "last.ckpt")
    assert last["lrate_factor"] == 0.5 and all_finite(last["state_dict"])
    assert last["state_dict"]["average.n_averaged"] == 4 + 3


def test_many_skipped_steps_with_good_ones_between(tmp_path, images, spoil, capfd):
    """More than half of the last 100, although never many in a row."""
    spoil({step for step in range(200) if step % 5 > 1}, "loss")
    train.main(
        resumable(
            images, tmp_path, "--iters", 100, "--lrate_decay", 1, "--checkpoint_every_n_steps", 50
        )
    )
    assert (
        "note: step 100: 60 of the last 100 steps had a loss or gradient that is not finite"
        in capfd.readouterr().err
    )


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path, images, spoil, capfd):
    spoil(set(range(2, 99)), "loss")
    with pytest.raises(SystemExit) as stop:
        train.main(
            [
                flag
                for flag in resumable(images, tmp_path, "--max_skipped", 2)
                if flag != "--make_checkpoint"
            ]
        )
    assert stop.value.code == 1
    assert "there is no checkpoint to go back to" in capfd.readouterr().err.splitlines()[-1]


def test_gradients_are_clipped(tmp_path, images):
    """Logged before clipping; Adamax is insensitive to a constant factor, but not to a changing
    one."""
    for name, clip in (("free", 0), ("clipped", 1e-3)):
        train.main(
            resumable(images, tmp_path, "--iters", 4, "--exp_name", name, "--grad_clip", clip)
        )
    free, clipped = (tmp_path / f"checkpoints/{name}" for name in ("free", "clipped"))
    first = [float(csv_rows(folder / "steps.csv")[0]["grad_norm"]) for folder in (free, clipped)]
    assert first[0] == first[1] > 1
    moments = [
        read_checkpoint(folder / "last.ckpt")["optimizer_states"][0]["state"]
        for folder in (free, clipped)
    ]
    norms = [
        math.hypot(*(state["exp_avg"].norm().item() for state in of.values())) for of in moments
    ]
    assert norms[1] <= 1e-3 < norms[0]


def test_finite_values_in_nested_outputs():
    nan = torch.tensor([1.0, math.nan])
    assert all_finite((torch.ones(2), {"a": [torch.arange(2)]}, None, 3))
    assert not all_finite((torch.ones(2), {"a": [nan]}))
    assert not all_finite(nn.ReLU()(nan))


TRAIN = (sys.executable, "train.py")


def start(
    images: Path, folder: Path, *more: object, program: Sequence[str] = TRAIN
) -> subprocess.Popen:
    """A run that does not end by itself; returns when it has a checkpoint."""
    command = [*program, *resumable(images, folder, "--checkpoint_every_n_steps", 1, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 120
    while not (folder / "checkpoints/sdn/last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.1)
    return process


SIGNALS = [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("signum", "status"), SIGNALS)
def test_a_signal_stops_the_run_with_a_checkpoint(tmp_path, images, signum, status):
    """To all processes of the job, loader workers among them, as a terminal or SLURM sends it."""
    process = start(images, tmp_path, "--num_workers", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (*map(int, children), process.pid):
        os.kill(pid, signum)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in errors, errors
    step = read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")["global_step"]
    assert (
        errors.splitlines()[-1]
        == f"train.py: stopped after step {step}; --use_checkpoint goes on from there"
    )
    assert [int(row["step"]) for row in csv_rows(tmp_path / "checkpoints/sdn/steps.csv")] == list(
        range(1, step + 1)
    )


@pytest.mark.parametrize(("signum", "status"), SIGNALS)
def test_a_signal_during_the_imports_ends_the_program(tmp_path, images, signum, status):
    """A job that is stopped so early is to be queued again like any other."""
    command = [sys.executable, "train.py", *resumable(images, tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True, stderr=subprocess.PIPE)
    while not handles(process.pid, signal.SIGHUP):  # the last that is set
        assert process.poll() is None
    process.send_signal(signum)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == status and errors == ""


def handles(pid: int, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    text = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", text)[1], 16) >> signum - 1 & 1)


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, images):
    process = start(images, tmp_path, program=("nohup", *TRAIN))
    step = read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")["global_step"]
    process.send_signal(signal.SIGHUP)
    while read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")["global_step"] <= step + 1:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    assert "SIGHUP" not in process.communicate()[1]


def test_the_second_interrupt_stops_at_once(tmp_path, images):
    """Also while a step takes for ever: here the main process waits for a loader worker that is
    stopped."""
    process = start(images, tmp_path, "--num_workers", 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children:
        os.kill(int(pid), signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    assert (
        process.returncode == 130 and "stopped at once" in errors and "Traceback" not in errors
    ), errors
    assert read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")


def test_a_signal_in_a_validation_keeps_what_was_trained(tmp_path, images):
    """The run goes on with that validation, and ends as if it had never been stopped."""
    code = """
import os, signal, train
from lib.training.base import VAETraining
before = VAETraining.validation_step
def step(self, batch, batch_idx):
    if self.global_step == 8 and batch_idx == 0 and not self.trainer.sanity_checking:
        os.kill(os.getpid(), signal.SIGTERM)
    return before(self, batch, batch_idx)
VAETraining.validation_step = step
train.main()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    more = resumable(images, tmp_path, "--iters", 12, "--batch_val", 4)
    done = subprocess.run(
        [sys.executable, "-c", code, *more],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 75, done.stderr
    last = read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")
    assert last["position"] == {"epoch": 0, "images": 32, "validate": True}
    assert csv_rows(tmp_path / "checkpoints/sdn/epochs.csv") == []
    for arguments in (more, [*more, "--exp_name", "whole"]):
        done = run("train.py", *arguments)
        assert done.returncode == 0, done.stderr
    folders = [tmp_path / "checkpoints" / name for name in ("sdn", "whole")]
    rows = [
        [(row["step"], row["epoch"], row["val_neg_elbo"]) for row in csv_rows(x / "epochs.csv")]
        for x in folders
    ]
    assert rows[0] == rows[1] and [row[0] for row in rows[0]] == ["8", "12"]
    ours, theirs = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in folders)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_loader_worker_that_dies_is_one_line(tmp_path, images):
    process = start(images, tmp_path, "--num_workers", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert "train.py: error: a loader process died" in errors.splitlines()[-1]
    assert "--use_checkpoint goes on" in errors.splitlines()[-1]


DIES = """
import multiprocessing, os, signal, sys, time
from torch.utils.data import DataLoader
from lib.training.processes import LoaderWatch
with LoaderWatch() as watch:
    batches = iter(DataLoader(range(100), num_workers=2, timeout=600))
    next(batches)
    watch.start()
    try:
        os.kill(multiprocessing.active_children()[1].pid, signal.SIGKILL)
        time.sleep(20)
    except Exception:
        print("taken for something else")
"""


def test_a_loader_worker_that_dies_is_never_taken_for_another_fault():
    """As by whoever writes a checkpoint at that moment."""
    done = subprocess.run(
        [sys.executable, "-c", DIES], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(
        r".*: error: a loader process died, .*; --use_checkpoint goes on from .*",
        done.stderr.strip(),
    )


HANGS = """
import multiprocessing, os, signal, time
import torch
from data.datamodule import BatchLoader, IndexedImages
images = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
images = IndexedImages(images, augment=False, flip=False, seed=0)
batches = iter(BatchLoader(images, 100, num_workers=2, timeout=2, persistent_workers=True))
next(batches)
time.sleep(1)
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGSTOP)
for batch in batches:
    pass
print("all of them")
"""


def test_a_loader_that_hangs_ends_the_run():
    """Its workers stop while they send batches that are larger than a pipe: torch's own limit does
    not see it."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and not done.stdout
    assert (
        "error: the loader gave no batch for 2 s; --use_checkpoint goes on from"
        in done.stderr.splitlines()[-1]
    )


def test_a_run_goes_on_where_nothing_can_be_printed(tmp_path, images):
    """Its output goes to a full disk."""
    command = [sys.executable, "train.py", *resumable(images, tmp_path, "--iters", 3)]
    with open("/dev/full", "w") as full:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=full, stderr=full)
    assert done.returncode == 0
    assert read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")["global_step"] == 3
