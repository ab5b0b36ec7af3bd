"""Signals that a process cannot note, and processes of a run that a signal does not reach."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import REPOSITORY

from lib.training.processes import is_stopped
from lib.training.signals import StopSignals


def test_a_signal_is_known_while_the_main_thread_is_inside_of_a_library():
    """There it may wait for another process for ever, and Python's handlers wait with it."""
    seen: list[tuple[int, int]] = []

    def watch() -> None:
        time.sleep(0.2)  # until the main thread is there
        os.kill(os.getpid(), signal.SIGTERM)
        while not (arrived := signals.arrived):
            time.sleep(0.01)
        seen.append((arrived, signals.received))

    with StopSignals() as signals:
        signals.training = True
        assert signals.arrived == 0
        watcher = threading.Thread(target=watch)
        watcher.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)  # lets other threads run, and no handler
        watcher.join()
        assert signals.received == signal.SIGTERM
    assert seen == [(signal.SIGTERM, 0)]
    assert signal.set_wakeup_fd(-1) == -1, "nothing is left behind"


WATCH = """
import os, signal, subprocess, sys, time, threading
from types import SimpleNamespace
from lib.training import processes
from lib.training.signals import StopSignals
processes.STOPPED_GRACE = processes.STOP_LIMIT = 1
child = subprocess.Popen(["sleep", "100"])
if sys.argv[1] == "stopped":
    child.send_signal(signal.SIGSTOP)
else:
    processes.STOPPED_GRACE = 1000
launcher = SimpleNamespace(procs=[child])
environment = SimpleNamespace(creates_processes_externally=False)
strategy = SimpleNamespace(cluster_environment=environment, launcher=launcher)
trainer = SimpleNamespace(world_size=2, strategy=strategy)
with StopSignals() as signals, processes.watch_ranks(trainer, signals):
    signals.training = True
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("stopped", "process 1 of this machine is stopped (SIGSTOP)"),
        ("deaf", "the processes of this run did not meet within 1 s"),
    ],
)
def test_a_run_that_cannot_stop_ends(how, told):
    done = subprocess.run(
        [sys.executable, "-c", WATCH, how],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 75, done.stderr
    assert f"{told}, so this run ends without another checkpoint; --use_checkpoint" in done.stderr


def test_a_process_that_is_stopped_is_known():
    with subprocess.Popen(["sleep", "100"]) as process:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 20
        while not is_stopped(process.pid):
            assert time.monotonic() < end
        process.kill()
    assert not is_stopped(process.pid)
