"""Machines that lack what Linux has: modules, signals, locks, a home, a name for the user."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from endings import ending_of
from helpers import REPOSITORY, TINY_BETA, csv_rows, resumable

import evaluate
import train
from lib.config import ConfigError, TrainConfig
from lib.training.run import choose_devices

# What Windows lacks, as far as torch itself does without it here.
AS_ON_WINDOWS = """
import os, signal, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGHUP", "SIGCHLD"):
    delattr(signal, name)
del os.sched_getaffinity
"""
IMPORT_ALL = """
import importlib, pathlib
skipped = ("__main__", "lines_kernels")  # a program, and what needs Triton
for folder in ("lib", "data", "experiments"):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        if path.stem not in skipped:
            importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""


@pytest.mark.slow
def test_what_windows_lacks_is_not_needed(tmp_path, images):
    """All modules can be imported; a run trains, refuses a second one, and is evaluated."""
    flags = resumable(images, tmp_path, "--iters", 2)
    evaluation = ["--model", "sdn", "--output_dir", str(tmp_path), "--elbo", "--likelihood"]
    evaluation += ["--importance_samples", "2", "--limit", "2", "--device", "cpu"]
    code = f"""
{AS_ON_WINDOWS}
{IMPORT_ALL}
from pathlib import Path
import evaluate, train
from lib.files import exclusive_folder
with exclusive_folder(Path({str(tmp_path)!r}) / "checkpoints/sdn", ""):
    try:
        train.main({flags!r})
    except SystemExit as refusal:
        print("refused with", refusal.code)
train.main({flags!r})
evaluate.main({evaluation!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "refused with 2" in done.stdout and "is in use by another run" in done.stderr
    assert len(csv_rows(tmp_path / "checkpoints/sdn/steps.csv")) == 2
    assert (tmp_path / "figs/sdn/results.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to be root")
def test_a_user_without_a_name_and_a_home_trains_and_evaluates():
    """As in containers that run with any number of a user; with wandb, which wants a home, too."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        if not (child := os.fork()):
            status = 99
            try:
                status = as_nobody(Path(folder))
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (
            Path(folder) / "errors.txt"
        ).read_text()


def as_nobody(folder: Path) -> int:
    os.setgroups([])
    os.setgid(12345)
    os.setuid(12345)
    for name in list(os.environ):
        if name in ("HOME", "USER", "LOGNAME") or name.startswith("WANDB_"):
            del os.environ[name]
    os.environ["WANDB_SILENT"] = "true"
    with pytest.raises(RuntimeError):
        Path.home()
    flags = [*TINY_BETA, "--iters", 1, "--make_checkpoint", "--output_dir", folder]
    flags[flags.index("--logger") + 1] = "auto"
    evaluation = ["--model", "sdn", "--output_dir", folder, "--elbo", "--limit", 2]
    for main, arguments in ((train.main, flags), (evaluate.main, evaluation)):
        done = ending_of(main, arguments)
        (folder / "errors.txt").write_text(done.err)
        if done.status or "Traceback" in done.err:
            return 1
    return 0


def test_a_gpu_of_apples_is_taken_if_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_devices(TrainConfig(gpus=1)) == {"accelerator": "mps", "devices": 1}
    assert choose_devices(TrainConfig())["accelerator"] == "cpu"
    with pytest.raises(ConfigError, match="--gpus 2: this machine has none"):
        choose_devices(TrainConfig(gpus=2))
