"""Attacks on running programs: their processes, their streams, their disk, their logs.

    python -m tests.stress.attack --repeat 3 --seed 0

Each attack is a function that returns what happened, and raises AssertionError if a program did not
end as docs/training.md promises: with its status, one line, no traceback, in time, and with a
folder that `--use_checkpoint` goes on with. Exit status 1 if any did. The table that it prints
stands in docs/training.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.checkpoint import read_checkpoint
from tests.stress.runs_compared import log_rows

REPOSITORY = Path(__file__).parents[2]
TINY = (
    "--dataset Photos32 --depth 2 --ds_list 1 --h_size 8 --z_size 2 --sdn_nfeat_0 8 --batch 4 "
    "--epoch_images 8 --val_images 4 --num_workers 0 --gpus 0 --logger none --downsample_first "
    "--sdn_max_scale 8 --figsize 1"
).split()
ENDLESS = "--epoch_images 4000 --checkpoint_every_n_steps 1 --make_checkpoint".split()
RANKS = "--num_processes 2 --batch 2 --num_workers 2".split()
EVALUATE = "--elbo --sampling --count 4 --temperatures 1 --limit 2 --model tiny".split()
PATIENCE = 120  # seconds, on a busy machine, within which every program ends that is to end

ATTACKS: dict[str, Callable[[Path, random.Random], str]] = {}


def attack(function: Callable[[Path, random.Random], str]) -> Callable[[Path, random.Random], str]:
    ATTACKS[function.__name__] = function
    return function


def start(
    program: str, folder: Path, *more: object, limits: dict[int, int] | None = None, **streams
) -> subprocess.Popen:
    """Starts an entry script in a process group of its own, which holds all that it starts.

    Arguments:
        folder: Its `--output_dir`.
        more: Further flags.
        limits: Of resources (`RLIMIT_...`).
        streams: Instead of the pipe of stderr, and of no stdout.
    """
    flags = [*TINY, "--exp_name", "tiny"] if program == "train.py" else EVALUATE
    command = [sys.executable, program, *flags, "--output_dir", folder, *more]

    def limit() -> None:
        for kind, most in (limits or {}).items():
            resource.setrlimit(kind, (most, most))

    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        preexec_fn=limit,
        start_new_session=True,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | streams,
    )


def ended(process: subprocess.Popen, *statuses: int, says: tuple[str, ...] = ()) -> str:
    """What a process wrote to stderr until it, and all that it started, ended as expected."""
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it had not ended after {PATIENCE} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    errors = errors or ""
    tail = errors[-2000:]
    assert process.returncode in statuses, f"status {process.returncode}: {tail}"
    assert "Traceback" not in errors and "Exception ignored" not in errors, tail
    assert not says or any(words in errors for words in says), f"none of {says} in {tail}"
    return errors


def until(reached: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 2 * PATIENCE
    while not reached():
        assert process.poll() is None and time.monotonic() < end, "it ended before it was attacked"
        time.sleep(0.05)


def training(folder: Path, *more: object) -> subprocess.Popen:
    """A run without end, once it has a checkpoint."""
    process = start("train.py", folder, *ENDLESS, *more)
    until((folder / "checkpoints/tiny/last.ckpt").exists, process)
    return process


def goes_on(folder: Path, *more: object) -> None:
    """The run in the folder takes a few more steps, and its log has every step once."""
    run = folder / "checkpoints/tiny"
    steps = read_checkpoint(run / "last.ckpt")["global_step"] + 2
    flags = [*ENDLESS, *more, "--use_checkpoint", "--iters", steps]
    ended(start("train.py", folder, *flags), 0)
    logged = [int(row["step"]) for row in log_rows(run / "steps.csv")]
    assert logged == list(range(1, steps + 1)), f"steps.csv holds the steps {logged}"


def children(process: subprocess.Popen, *, ranks: bool) -> list[int]:
    """The other ranks that a run started, or its loader workers."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(pid)
        for pid in found
        if (b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()) == ranks
    ]


def finished(folder: Path) -> None:
    """Puts a finished run called tiny into the folder."""
    kept = Path(tempfile.gettempdir()) / f"sdn_attack_{os.getpid()}"
    if not kept.exists():
        ended(start("train.py", kept, "--iters", 2, "--make_checkpoint"), 0)
    shutil.copytree(kept, folder, dirs_exist_ok=True)


def results(folder: Path) -> set[str]:
    path = folder / "figs/tiny/results.json"
    return set(json.loads(path.read_text())) if path.exists() else set()


@attack
def rank_killed(folder: Path, chance: random.Random) -> str:
    process = training(folder, *RANKS)
    time.sleep(chance.uniform(0, 3))
    main = chance.random() < 0.3
    os.kill(process.pid if main else children(process, ranks=True)[0], signal.SIGKILL)
    lines = ("died (SIGKILL)", "main process died", "lost contact with another process")
    ended(process, -signal.SIGKILL if main else 1, says=lines)
    goes_on(folder, *RANKS)
    return "status 1, and one line says which"


@attack
def rank_stopped(folder: Path, chance: random.Random) -> str:
    process = training(folder, *RANKS)
    os.kill(children(process, ranks=True)[0], signal.SIGSTOP)
    time.sleep(chance.uniform(0, 3))
    process.send_signal(signal.SIGTERM)
    ended(process, 75, says=("is stopped (SIGSTOP)",))
    goes_on(folder, *RANKS)
    return "status 75 within a minute, and one line says which"


@attack
def worker_killed(folder: Path, chance: random.Random) -> str:
    process = training(folder, "--num_workers", 2)
    time.sleep(chance.uniform(0, 3))
    os.kill(chance.choice(children(process, ranks=False)), signal.SIGKILL)
    ended(process, 1, says=("a loader process died",))
    goes_on(folder)
    return "status 1, and one line says so"


@attack
def signalled(folder: Path, chance: random.Random) -> str:
    process = training(folder, *chance.choice([RANKS, []]))
    time.sleep(chance.uniform(0, 3))
    signum = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
    process.send_signal(signum)
    status = 130 if signum == signal.SIGINT else 75
    ended(process, status, says=("stopped after step",))
    goes_on(folder)
    return "status 75, or 130 after SIGINT, with a checkpoint"


def closed(chance: random.Random) -> list[int]:
    return chance.choice([[1], [2], [1, 2], [0, 1, 2]])


def without(descriptors: list[int], program: str, *arguments: object) -> list[str]:
    """The command of a shell that starts a program with some streams closed."""
    shut = " ".join("<&-" if number == 0 else f"{number}>&-" for number in descriptors)
    return ["sh", "-c", f'exec "$@" {shut}', "sh", sys.executable, program, *map(str, arguments)]


@attack
def streams_closed(folder: Path, chance: random.Random) -> str:
    finished(folder)
    flags = [*EVALUATE, "--output_dir", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = dict(cwd=REPOSITORY, env=environment, timeout=PATIENCE, capture_output=True)
    done = subprocess.run(without(closed(chance), "evaluate.py", *flags), **options)
    assert done.returncode == 0 and results(folder) == {"elbo", "sampling"}, done
    flags = [*TINY, "--exp_name", "new", "--iters", 2, "--make_checkpoint", "--output_dir", folder]
    done = subprocess.run(without(closed(chance), "train.py", *flags), **options)
    assert done.returncode == 0, done
    assert read_checkpoint(folder / "checkpoints/new/last.ckpt")["global_step"] == 2
    return "status 0, nothing is lost"


@attack
def reader_gone(folder: Path, chance: random.Random) -> str:
    finished(folder)
    process = start("evaluate.py", folder, stdout=subprocess.PIPE)
    if chance.random() < 0.5:
        process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    ended(process, 0)
    assert results(folder) == {"elbo", "sampling"}
    return "status 0, every result is kept"


@attack
def streams_full(folder: Path, chance: random.Random) -> str:
    finished(folder)
    with open("/dev/full", "w") as full:
        ended(start("evaluate.py", folder, stdout=full, stderr=full), 0)
    assert results(folder) == {"elbo", "sampling"}
    return "status 0, every result is kept"


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes at the folder, if this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        raise PermissionError("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@attack
def disk_full_at_start(folder: Path, chance: random.Random) -> str:
    with small_disk(folder / "disk", chance.choice([4096, 8192, 16384])):
        errors = ended(start("train.py", folder / "disk", "--iters", 2, "--make_checkpoint"), 2)
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert str(folder / "disk") in line, line
    return "status 2, and one line names the file"


@attack
def disk_full_later(folder: Path, chance: random.Random) -> str:
    """Room for the logs, and for one checkpoint at most."""
    with small_disk(folder / "disk", chance.choice([2**18, 2**21, 2**22])):
        process = start("train.py", folder / "disk", "--iters", 12, "--make_checkpoint")
        errors = ended(process, 2)
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert str(folder / "disk") in line, line
    return "status 2, and one line names the file"


@attack
def disk_full_at_resume(folder: Path, chance: random.Random) -> str:
    finished(folder)
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*.ckpt")}
    most = {resource.RLIMIT_FSIZE: chance.choice([1, 100, 4096, 2**18])}
    flags = ["--make_checkpoint", "--use_checkpoint", "--iters", 4]
    errors = ended(start("train.py", folder, *flags, limits=most), 2)
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert str(folder) in line, line
    assert all(path.read_bytes() == content for path, content in before.items())
    goes_on(folder)
    return "status 2, one line names the file, checkpoints stay"


@attack
def disk_full_at_evaluation(folder: Path, chance: random.Random) -> str:
    finished(folder)
    most = {resource.RLIMIT_FSIZE: chance.choice([1, 100, 600])}
    errors = ended(start("evaluate.py", folder, limits=most), 2)
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert str(folder / "figs") in line, line
    ended(start("evaluate.py", folder), 0)
    return "status 2, and one line names the file"


@attack
def logs_removed(folder: Path, chance: random.Random) -> str:
    """Some or all of a run's logs go while it writes them, or are emptied."""
    process = training(folder)
    time.sleep(chance.uniform(0, 2))
    run = folder / "checkpoints/tiny"
    names = chance.choice([["steps.csv"], ["steps.csv", "epochs.csv", "run.json"]])
    for name in names:
        if chance.random() < 0.5:
            (run / name).unlink(missing_ok=True)
        else:
            os.truncate(run / name, 0)
    removed_at = read_checkpoint(run / "last.ckpt")["global_step"]
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    ended(process, 75)
    content = (run / "steps.csv").read_bytes()
    assert content.startswith(b"step,") and b"\0" not in content, content[:200]
    logged = [int(row["step"]) for row in log_rows(run / "steps.csv")]
    last = read_checkpoint(run / "last.ckpt")["global_step"]
    assert logged == list(range(logged[0], last + 1)), logged
    assert logged[0] <= removed_at + 2, (logged[0], removed_at)
    return "a note; the log begins again with its header"


@attack
def few_descriptors(folder: Path, chance: random.Random) -> str:
    most = {resource.RLIMIT_NOFILE: chance.choice([32, 24, 20])}
    flags = ["--iters", 2, "--make_checkpoint", "--num_workers", 2]
    errors = ended(start("train.py", folder, *flags, limits=most), 0, 1, 2)
    lines = [line for line in errors.splitlines() if "error:" in line]
    done = (folder / "checkpoints/tiny/step_0000002.ckpt").exists()
    assert done or "ulimit -n" in lines[-1], errors
    return "status 0; or 1 or 2, and one line names ulimit -n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, help="how often each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    flags = parser.parse_args()
    rows, failures = [], 0
    for name in flags.only:
        outcomes: Counter[str] = Counter()
        for number in range(flags.repeat):
            chance = random.Random(f"{flags.seed} {name} {number}")
            with tempfile.TemporaryDirectory(prefix="sdn_attack_") as folder:
                try:
                    outcome = ATTACKS[name](Path(folder), chance)
                except PermissionError as error:
                    outcome = f"not run: {error}"
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    outcome, failures = "NOT AS PROMISED", failures + 1
                    print(f"{name} {number}: {error}", file=sys.stderr, flush=True)
            outcomes[outcome] += 1
            print(f"{name} {number}: {outcome}", flush=True)
        rows += [f"| {name} | {times} | {what} |" for what, times in outcomes.items()]
    print("\n".join(["| attack | how often | what happened |", "|---|---|---|", *rows]))
    shutil.rmtree(Path(tempfile.gettempdir()) / f"sdn_attack_{os.getpid()}", ignore_errors=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
