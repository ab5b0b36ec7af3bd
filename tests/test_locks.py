"""Locks between processes, also on file systems that have none and on other systems than Linux."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time

import pytest
from endings import assert_refused, ending_of
from helpers import csv_rows, resumable

import evaluate
import train
from lib.evaluation.ledger import Ledger, LedgerError
from lib.evaluation.results import add_result, own_folder, read_results
from lib.files import HELD, LOCK, exclusive_folder, locked


@pytest.fixture(params=["locks", errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def file_system(request, monkeypatch):
    """One with locks, and such as refuse to lock."""
    if request.param != "locks":
        monkeypatch.setattr(fcntl, "flock", refuses(request.param))
    return request.param


@pytest.fixture
def without_locks(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuses(errno.ENOLCK))


def refuses(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


def in_another_process(work) -> int:
    """The exit status, or minus the signal, of a child that ends without any clearing up."""
    if not (child := os.fork()):
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_one_process_at_a_time_holds_a_lock(tmp_path, file_system):
    def other() -> int:
        try:
            with locked(tmp_path / LOCK, "held"):
                return 0
        except BlockingIOError as error:
            return 1 if str(error).startswith("held") else 2

    with locked(tmp_path / LOCK, "held"):
        assert in_another_process(other) == 1
        with pytest.raises(BlockingIOError, match="held"), locked(tmp_path / LOCK, "held"):
            pass
    assert not list(tmp_path.iterdir())
    assert in_another_process(other) == 0


def test_a_killed_process_leaves_no_lock(tmp_path, file_system):
    def killed() -> None:
        with exclusive_folder(tmp_path, "held"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_another_process(killed) == -signal.SIGKILL
    with exclusive_folder(tmp_path, "held"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_is_waited_for(tmp_path, file_system):
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            with locked(tmp_path / LOCK, ""):
                os.write(write, b"1")
                time.sleep(0.3)
                (tmp_path / "done").touch()
        finally:
            os._exit(0)
    os.read(read, 1)
    with locked(tmp_path / LOCK, "", wait=True):
        assert (tmp_path / "done").exists()
    os.waitpid(child, 0)


def test_a_holder_on_another_machine_is_named_where_there_are_no_locks(tmp_path, without_locks):
    marker = tmp_path / (LOCK + HELD)
    marker.write_text("1\nsome-other-machine\n")
    os.utime(marker, (0, 0))
    with pytest.raises(BlockingIOError) as refusal, exclusive_folder(tmp_path, "in use"):
        pass
    assert str(marker) in str(refusal.value) and "remove the file" in str(refusal.value)
    assert marker.exists()


def test_runs_and_evaluations_do_without_locks(tmp_path, images, without_locks):
    """A second run in the folder is refused as ever, and nothing of the locks remains."""
    flags = resumable(images, tmp_path, "--iters", 2)
    folder = tmp_path / "checkpoints/sdn"
    with exclusive_folder(folder, ""):
        assert_refused(ending_of(train.main, flags), "train.py", "in use by another run")
    done = ending_of(train.main, flags)
    assert done.status == 0, done.err
    assert len(csv_rows(folder / "steps.csv")) == 2
    evaluation = ["--model", "sdn", "--output_dir", tmp_path, "--root", images, "--elbo"]
    evaluation += ["--likelihood", "--importance_samples", 2, "--limit", 2, "--device", "cpu"]
    done = ending_of(evaluate.main, evaluation)
    assert done.status == 0, done.err
    assert {"elbo", "likelihood"} <= json.loads(
        (tmp_path / "figs/sdn/results.json").read_text()
    ).keys()
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".weights"]


def test_a_ledger_is_of_one_process(tmp_path, file_system):
    with (
        Ledger(tmp_path / "ledger.csv", {"samples": 1}),
        pytest.raises(LedgerError, match="in use by another process"),
    ):
        Ledger(tmp_path / "ledger.csv", {"samples": 1})
    with Ledger(tmp_path / "ledger.csv", {"samples": 1}) as ledger:
        ledger.add(0, -1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.csv"]


def test_what_another_evaluation_writes_stays(tmp_path, file_system):
    """Half-written files go only when nobody has written to them for a day."""
    folder = own_folder(tmp_path, "name", "1" * 12)
    half = folder / "results.json.abc.partial"
    half.touch()
    assert own_folder(tmp_path, "name", "1" * 12) == folder and half.exists()
    add_result(folder / "results.json", "elbo", {"weights": "1" * 12})
    yesterday = time.time() - 25 * 3600
    os.utime(half, (yesterday, yesterday))
    assert own_folder(tmp_path, "name", "1" * 12) == folder and not half.exists()
    assert list(read_results(folder / "results.json")) == ["elbo"]
    assert sorted(path.name for path in folder.iterdir()) == [".weights", "results.json"]
