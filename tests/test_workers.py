"""Worker processes: tasks shared out, errors passed on, nobody left behind. Without torch, and so
quick to start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import DataError
from lib.evaluation.workers import WorkerError, open_workers

REPOSITORY = Path(__file__).parent.parent


def start(device: str):
    """A worker that yields each task and its square, and reports its process."""
    return (device, os.getpid()), lambda task: [(device, task), (device, task * task)]


def start_slow_first(device: str):
    """The worker for "a" never comes to an end with its first task."""
    return None, lambda task: [(device, task)] if device == "b" else wait_for_ever(task)


def wait_for_ever(task):
    yield ("a", task)
    time.sleep(60)


class Awkward(Exception):
    """Cannot be made again from its message alone, as unpickling tries."""

    def __init__(self, number: int, text: str):
        super().__init__(f"{number} {text}")


def start_failing(device: str):
    def compute(task):
        yield task
        if task == "data":
            raise DataError("image 5 is damaged")
        if task == "awkward":
            raise Awkward(3, "times")
        if task == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "exit":
            sys.exit(7)

    return None, compute


def start_dead(device: str):
    os.kill(os.getpid(), signal.SIGKILL)


def start_without_data(device: str):
    raise DataError("no data here")


@pytest.mark.parametrize("devices", [["a"], ["a", "b"]])
def test_every_task_is_done_once_and_in_order(devices):
    with open_workers(start, devices) as workers:
        assert [device for device, _ in workers.reports] == devices
        processes = {process for _, process in workers.reports}
        assert len(processes) == len(devices) and (os.getpid() in processes) == (len(devices) == 1)
        found = list(workers.run(range(2, 30)))
        assert sorted(value for _, value in found) == sorted(
            [*range(2, 30), *(n * n for n in range(2, 30))]
        )
        for device in devices:
            values = [value for worker, value in found if worker == device]
            assert values[1::2] == [n * n for n in values[::2]]
        assert [value for _, value in workers.run([5])] == [5, 25], "a second round"
    assert not multiprocessing.active_children()


def test_whoever_is_free_takes_the_next_task():
    with open_workers(start_slow_first, ["a", "b"]) as workers:
        passed_on = []
        for device, task in workers.run(range(10)):
            passed_on.append((device, task))
            if len(passed_on) == 10:
                break
    assert sorted(passed_on) == [("a", 0), *(("b", task) for task in range(1, 10))]


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("data", DataError, "^image 5 is damaged$"),
        ("awkward", WorkerError, "^Awkward: 3 times$"),
        (
            "kill",
            WorkerError,
            "^the worker for a was killed by SIGKILL, perhaps because the machine ran out of memory;",
        ),
        (
            "exit",
            WorkerError,
            "^the worker for a ended with exit status 7; what was finished is kept: run again$",
        ),
    ],
)
def test_a_failure_reaches_the_parent_and_ends_the_others(task, kind, message):
    found = []
    with (
        pytest.raises(kind, match=message) as caught,
        open_workers(start_failing, ["a", "a"]) as workers,
    ):
        found.extend(workers.run(["fine", "fine", task]))
    if task == "data":
        assert "in compute" in str(caught.value.__cause__), (
            "the worker's traceback is kept as the cause"
        )
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("start", "kind", "message"),
    [
        (start_dead, WorkerError, "was killed by SIGKILL"),
        (start_without_data, DataError, "^no data here$"),
    ],
)
def test_a_failure_at_the_start_is_noticed(start, kind, message):
    with pytest.raises(kind, match=message), open_workers(start, ["a", "a"]):
        pass
    assert not multiprocessing.active_children()


def work_for_ever() -> None:
    """Run in a process of its own: a worker is busy for ever, the other idle."""
    with open_workers(start_slow_first, ["a", "b"]) as workers:
        for _ in workers.run(range(2)):
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)


def in_another_process(call: str) -> subprocess.Popen:
    """A process, and group of its own, that calls a function given with its module."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import {call.partition('.')[0]}; {call}"],
        env=os.environ
        | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def assert_ended(processes: list[int]) -> None:
    """All are gone soon, or wait only for their parent to take note."""
    deadline = time.monotonic() + 20
    while left := [pid for pid in processes if state(pid) != "Z"]:
        assert time.monotonic() < deadline, f"processes {left} do not end"
        time.sleep(0.02)


def state(pid: int) -> str:
    """One letter, as /proc has it; Z for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent_and_without_a_word(number):
    process = in_another_process("test_workers.work_for_ever()")
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert len(children) == 2 and "Z" not in map(state, children)
    if number == signal.SIGINT:  # Ctrl-C reaches them all, in any order
        for child in children:
            os.kill(child, number)
        time.sleep(0.2)
        assert "Z" not in map(state, children)
    process.send_signal(number)
    _, stderr = process.communicate(
        timeout=30
    )  # ends only when the workers have closed their ends as well
    assert_ended(children)
    assert stderr.count("Traceback") == (number == signal.SIGINT), stderr
