"""Bad input by the thousand: flags and files as no one should give them, in forked copies of one
process.

    python -m tests.stress.bad_input --cases 1000 --seed 0

A case is a command of train.py or evaluate.py with nonsense for one flag or for several, with flags
that contradict each other, with a file that it reads cut off, overwritten, of another kind, a pipe
or a folder, or with a checkpoint whose content was changed by hand. Whatever it is, the command
ends in time with status 0, or with status 2, one line on stderr and nothing changed on the disk; no
traceback, and nothing half-written. Exit status 1 if one does not; `--only NUMBER` repeats a case.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import evaluate
import train
from lib.checkpoint import read_checkpoint, write_checkpoint
from lib.cli import make_streams_unfailing
from lib.config import ConfigError, TrainConfig, flag_type
from lib.evaluation.options import make_parser
from tests.stress.attack import TINY

LIMIT = 60  # seconds of a command
DATA_SET = "photos-32x32"
FLAGS = [*TINY, "--dataset", DATA_SET, "--root", "data", "--make_checkpoint", "--iters", "1"]
RESUME = [*FLAGS[:-1], "3", "--exp_name", "tiny", "--use_checkpoint"]
EVALUATE = ["--model", "tiny", "--batch", "4"]
OF_EVALUATIONS = {
    "elbo": "--limit 2",
    "likelihood": "--limit 2 --importance_samples 2",
    "reconstruction": "--count 2",
    "sampling": "--count 2 --temperatures 1",
    "interpolation": "--images 0 1 --layers 1 --frames 2 --temperatures 1",
    "neighborhood": "--images 0 1 --layers 1 --temperatures 1",
    "overfitting": "--count 2 --temperatures 1 --neighbors 2",
    "report": "",
}
# Values of these up to the largest that is allowed are work, not bad input.
WORK = (
    "depth h_size z_size mix_components sdn_nfeat_0 sdn_max_scale batch batch_val iters figsize "
    "num_workers num_processes num_nodes epoch_images image_size "
    "count frames importance_samples processes chunk compile"
).split()
CHEAP = 40

INTEGERS = (
    "0 -1 -0 1 2 3 7 64 100000 1000000000 1000000001 1000000000000 2147483647 2147483648".split()
)
INTEGERS += [
    str(sign * 2**power + more)
    for power in (32, 63, 64, 200)
    for sign, more in ((1, 0), (1, -1), (-1, -1))
]
FLOATS = (
    "0.0 -0.0 0.5 1.5 1e3 1e-400 1e400 -1e400 1e39 3.5e38 1e20 1e300 1e-45 nan inf -inf".split()
)
NO_NUMBERS = ["0x10", "1_0", "١٢", "1,2", "9" * 5000, "two", "None", "True", "1 2", "½"]
WORDS = ["", " ", "-", "--", "---", "-x", "--depth", ".", "..", "...", "*", "~", "%s%n", "{}"]
WORDS += [
    "'; touch pwned",
    "$(touch pwned)",
    "\0",
    "a\0b",
    "\n",
    "5\n",
    "a\nb",
    "a\r\nb",
    "\x1b[31m",
]
WORDS += ["🦆", "ÿ", "\udcff", "a\u2028b", "x" * 300, "x" * 5000, "absent", "file", "file/x"]
WORDS += ["absent/../file", "/dev/null", "/dev/null/x", "/proc/x/y", "pipe", "folder", "../x", "/x"]
NONSENSE = [*INTEGERS, *FLOATS, *NO_NUMBERS, *WORDS]

JUNK = [None, True, -1, 0, 1, 1.5, float("nan"), float("inf"), -0.5, 10**9, 2**70, "", "x", "0"]
JUNK += [
    "a\nb",
    "\0",
    "\udcff",
    b"x",
    [],
    [1],
    [None],
    ["x"],
    [2**70],
    (1, 2),
    {},
    {"a": 1},
    {1: 2},
]

# The files that each command reads.
DATA = [f"data/{DATA_SET}/{name}" for name in ("dataset.json", "train.lmdb", "validation.lmdb")]
CHECKPOINTS = [f"checkpoints/tiny/{name}.ckpt" for name in ("best", "last", "step_0000002")]
PICTURE = "photos/0.png"
LOGS = [f"checkpoints/tiny/{name}" for name in ("steps.csv", "epochs.csv", "run.json")]
RESULTS = ["figs/tiny/results.json", "figs/tiny/.weights"]
READ_BY: dict[tuple[str, ...], list[str]] = {
    ("train.py", *FLAGS): DATA,
    ("train.py", *RESUME): [*CHECKPOINTS, *LOGS],
    ("evaluate.py", *EVALUATE, "--elbo"): [CHECKPOINTS[0], DATA[2], *RESULTS],
    ("evaluate.py", *EVALUATE, "--likelihood", *OF_EVALUATIONS["likelihood"].split()): ["LEDGER"],
    ("evaluate.py", *EVALUATE, "--overfitting", "--queries", PICTURE): [PICTURE, DATA[1]],
    ("evaluate.py", *EVALUATE, "--report"): [*RESULTS, "figs/tiny/reconstructions.png"],
}
KEPT = (*DATA, PICTURE, "file")


@dataclass
class Case:
    """A command, and what is done to the folder in which it runs."""

    kind: str
    program: str
    arguments: list[str]
    damage: Callable[[Path], str] = field(default=lambda folder: "")


def make_template(folder: Path) -> None:
    """Data sets, pictures, a finished run and its results, in which each case runs anew."""
    (folder / "photos").mkdir()
    for number in range(120):
        Image.new("RGB", (32, 32), (2 * number, 99, 7)).save(folder / f"photos/{number}.png")
    (folder / "folder").mkdir()
    (folder / "file").write_text("mine")
    os.mkfifo(folder / "pipe")
    photos = [*FLAGS, "--dataset", "./photos", "--image_size", "32"]
    everything = [
        word for name, flags in OF_EVALUATIONS.items() for word in (f"--{name}", *flags.split())
    ]
    for program, arguments in (
        ("train.py", [*photos, "--exp_name", "photos"]),
        ("train.py", [*FLAGS[:-1], "2", "--exp_name", "tiny"]),
        ("evaluate.py", [*EVALUATE, *everything]),
    ):
        ending = run(program, arguments, folder)
        assert ending.status == 0, ending.err
    shutil.rmtree(folder / "checkpoints/photos")
    whole = shutil.copytree(folder, folder.parent / "whole", copy_function=copy)
    for program, *arguments in READ_BY:  # what is refused later is refused for what was changed
        ending = run(program, arguments, whole)
        assert ending.status == 0, ending.err


@dataclass
class Ending:
    status: int | None  # None: it did not end in time
    err: str
    seconds: float


def run(program: str, arguments: list[str], folder: Path) -> Ending:
    """Runs a program in a copy of this process, as if it had been started in the folder."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            become(program, arguments, folder, (out.fileno(), err.fileno()))
        status = None
        while status is None and time.monotonic() - begun < LIMIT:
            done, raw = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(raw) if done else None
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if status is None:
            os.waitpid(pid, 0)
        err.seek(0)
        return Ending(status, err.read().decode(errors="replace"), time.monotonic() - begun)


def become(program: str, arguments: list[str], folder: Path, streams: tuple[int, int]) -> None:
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
        sys.argv = [program, *arguments]
        make_streams_unfailing()
        {"train.py": train, "evaluate.py": evaluate}[program].main(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def verdict(case: Case, ending: Ending, before: dict[str, bytes], folder: Path) -> str | None:
    """What is wrong with the end of a case; None if nothing is."""
    after = content(folder)
    errors = [line for line in ending.err.splitlines() if "error:" in line]
    kept = before
    if ending.status == 0:
        goes_on = "--use_checkpoint" in case.arguments
        names = [*KEPT, *([] if goes_on else CHECKPOINTS)]
        kept = {name: before[name] for name in names if name in before}
    changed = sorted(name for name in kept if after.get(name) != kept[name])
    if ending.status is None:
        return f"it did not end within {LIMIT} s"
    if "Traceback" in ending.err or ending.status not in (0, 2):
        return f"status {ending.status}"
    if ending.status == 2 and (
        len(errors) != 1 or not errors[0].startswith(f"{case.program}: error: ")
    ):
        return f"status 2 with {len(errors)} lines of errors"
    if ending.status == 0 and errors:
        return "status 0 with an error"
    if changed:
        return f"status {ending.status}, but {', '.join(changed)} changed"
    if new := sorted(
        name for name in after.keys() - before.keys() if ".partial" in name or ending.status
    ):
        return f"status {ending.status}, but {', '.join(new)} is new"
    if os.path.exists(folder / "pwned"):
        return "a shell saw it"
    return None


def content(folder: Path) -> dict[str, bytes]:
    """Every file, link, pipe and folder without the files in it."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path).encode()
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not path.is_dir():
            found[name] = b"a pipe"
        elif not any(path.iterdir()):
            found[name] = b"an empty folder"
    return found


def train_flag(chance: random.Random, *, plausible: bool = False) -> list[str]:
    field = chance.choice(dataclasses.fields(TrainConfig))
    choices, (kind, is_list) = field.metadata["choices"], flag_type(field.name)
    if kind is bool:
        return [f"--{field.name}"]
    if choices and (plausible or chance.random() < 0.3):
        return [f"--{field.name}", chance.choice(choices)]
    return valued(chance, field.name, kind, is_list, plausible)


def valued(
    chance: random.Random, name: str, kind: type, is_list: bool, plausible: bool = False
) -> list[str]:
    """A flag with a value, or values, that may be of its type or not."""
    if plausible and kind is not str:
        own = "0 1 2 3 4 8".split()
    else:
        of_kind = {int: INTEGERS, float: [*FLOATS, *INTEGERS], str: WORDS}.get(kind, WORDS)
        own = of_kind if chance.random() < 0.7 else NONSENSE
    values = [chance.choice(own) for _ in range(chance.choice([0, 1, 2, 2, 3]) if is_list else 1)]
    if len(values) == 1 and chance.random() < 0.3:
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def is_work(arguments: list[str]) -> bool:
    """Whether a command of train.py or evaluate.py is right, and would just take long."""
    for place, word in enumerate(arguments):
        name, _, value = word.removeprefix("--").partition("=")
        if name in WORK:
            values = [value] if value else arguments[place + 1 : place + 3]
            # Ranks are started anew by the name of the program, which is not in the case's folder.
            most = 1 if name in ("num_processes", "num_nodes") else CHEAP
            many = (text.isdecimal() and len(text) < 30 and int(text) > most for text in values)
            if name == "compile" or any(many):
                break
    else:
        return False
    with contextlib.redirect_stderr(None), contextlib.redirect_stdout(None):
        try:
            if arguments[0] == "train.py":
                train.parse([*arguments[1:], "--dataset", "Photos32"])
            else:
                evaluate.check(make_parser("").parse_args(arguments[1:]))
        except (ConfigError, SystemExit):
            return False
        except Exception:
            return False
    return True


def wrong_flags(chance: random.Random) -> Case:
    if chance.random() < 0.6:
        more = train_flag(chance)
        return Case(
            "a flag of train.py", "train.py", [*chance.choice([FLAGS, FLAGS, RESUME]), *more]
        )
    action = chance.choice([a for a in make_parser("")._actions if a.dest != "help"])
    takers = [
        name
        for name in OF_EVALUATIONS
        if f"--{name}:" in (action.help or "") or f"--{name}," in (action.help or "")
    ]
    task = chance.choice(takers or ["elbo", "sampling"])
    arguments = [*EVALUATE, f"--{task}", *OF_EVALUATIONS[task].split()]
    if action.dest in ("model", "checkpoint"):
        arguments = arguments[2:]
    if action.nargs == 0:
        arguments += [f"--{action.dest}", *OF_EVALUATIONS.get(action.dest, "").split()]
    else:
        kind = action.type if isinstance(action.type, type) else str
        arguments += valued(chance, action.dest, kind, action.nargs == "+", False)
    return Case("a flag of evaluate.py", "evaluate.py", arguments)


def contradictions(chance: random.Random) -> Case:
    """Several flags of train.py, each of which may be right."""
    arguments = list(FLAGS)
    for _ in range(chance.randint(2, 5)):
        arguments += train_flag(chance, plausible=True)
    return Case("several flags of train.py", "train.py", arguments)


def damaged_file(chance: random.Random) -> Case:
    (program, *arguments), files = chance.choice(list(READ_BY.items()))
    name = chance.choice(files)
    how = chance.choice(list(DAMAGES))
    seed = chance.random()

    def damage(folder: Path) -> str:
        path = folder / name
        if name == "LEDGER":
            (path,) = (folder / "figs/tiny").glob("likelihood_*.csv")
        if path.is_dir():
            path /= "data.mdb"
        DAMAGES[how](path, random.Random(seed))
        return f"{path.relative_to(folder)} {how}"

    return Case("a damaged file", program, arguments, damage)


def replaced(text: bytes) -> Callable[[Path, random.Random], None]:
    return lambda path, chance: path.write_bytes(text)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, int(chance.random() * path.stat().st_size))


def flipped(path: Path, chance: random.Random) -> None:
    changed = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(changed))] ^= chance.randint(1, 255)
    path.write_bytes(changed)


def zeroed(path: Path, chance: random.Random) -> None:
    changed = bytearray(path.read_bytes())
    begin, end = sorted(chance.randrange(len(changed) + 1) for _ in range(2))
    changed[begin:end] = bytes(end - begin)
    path.write_bytes(changed)


def other_values(path: Path, chance: random.Random) -> None:
    """Of a file of JSON: one value, however deep, becomes another. Of a table: one cell."""
    text = path.read_text(errors="replace")
    try:
        values = json.loads(text)
    except ValueError:
        cells = text.split(",")
        cells[chance.randrange(len(cells))] = str(chance.choice(JUNK)).replace("\udcff", "ÿ")
        path.write_text(",".join(cells))
        return
    plain = [junk for junk in JUNK if not isinstance(junk, bytes) and junk != "\udcff"]
    path.write_text(json.dumps(with_junk(values, chance, plain)))


def instead(make: Callable[[Path], Any]) -> Callable[[Path, random.Random], None]:
    def replace(path: Path, chance: random.Random) -> None:
        path.unlink()
        make(path)

    return replace


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut off": cut,
    "with flipped bytes": flipped,
    "with a stretch of zeros": zeroed,
    "with other values": other_values,
    "empty": replaced(b""),
    "all zeros": replaced(bytes(5000)),
    "text": replaced(b"hello\nworld\n"),
    "no UTF-8": replaced(b"\xff\xfe,\x80\n1,2\n"),
    "null": replaced(b"null"),
    "a list": replaced(b"[1, 2]"),
    "a list in lists": replaced(b"[" * 100_000 + b"]" * 100_000),
    "NaN": replaced(b'{"elbo": {"bits_per_dim": NaN, "weights": NaN}, "config": NaN}'),
    "a picture": lambda path, chance: Image.new("L", (5, 7)).save(path, format="PNG"),
    "a pipe": instead(os.mkfifo),
    "a folder": instead(Path.mkdir),
    "missing": instead(lambda path: None),
    "a link to itself": instead(lambda path: path.symlink_to(path.name)),
    "a link to nothing": instead(lambda path: path.symlink_to("absent")),
    "a long line": replaced(b"1," * 500_000),
}  # fmt: skip


def with_junk(values: Any, chance: random.Random, junk: list[Any] = JUNK) -> Any:
    """Nested values with one of them, at any depth, missing, another, or too much."""
    if isinstance(values, dict) and values and chance.random() < 0.85:
        name = chance.choice(list(values))
        how = chance.random()
        if how < 0.12:
            return {key: value for key, value in values.items() if key != name}
        if how < 0.2:
            return values | {
                chance.choice(["x", 7, "é"]) if junk is JUNK else "x": chance.choice(junk)
            }
        return values | {name: with_junk(values[name], chance, junk)}
    if isinstance(values, list | tuple) and values and chance.random() < 0.85:
        place = chance.randrange(len(values))
        changed = with_junk(values[place], chance, junk)
        return type(values)([*values[:place], changed, *values[place + 1 :]])
    if isinstance(values, torch.Tensor) and chance.random() < 0.5:
        return chance.choice(
            [
                values[None],
                values.reshape(-1)[:0],
                values.double(),
                values.bool(),
                values + float("nan"),
            ]
        )
    return chance.choice(junk)


def checkpoint_by_hand(chance: random.Random) -> Case:
    """Every checkpoint of the run is changed in the same way."""
    seed, evaluates = chance.random(), chance.random() < 0.25
    program, arguments = (
        ("evaluate.py", [*EVALUATE, "--elbo"]) if evaluates else ("train.py", RESUME)
    )

    def damage(folder: Path) -> str:
        original = read_checkpoint(folder / CHECKPOINTS[0])
        chosen = random.Random(seed)
        name = chosen.choice(sorted(original))
        changed: Any = None
        while not isinstance(changed, dict):
            changed = with_junk({name: original[name]}, chosen)
        rest = {key: value for key, value in original.items() if key != name}
        for path in CHECKPOINTS:
            write_checkpoint(rest | changed, folder / path)
        return f"the checkpoint's {where(original.get(name), changed.get(name), name)}"

    return Case("a checkpoint by hand", program, list(arguments), damage)


def where(before: Any, after: Any, name: str) -> str:
    """Where two nested values differ, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            if before.get(key) is not after.get(key):
                return where(before.get(key), after.get(key), f"{name}[{key!r}]")
    if (
        isinstance(before, list | tuple)
        and type(before) is type(after)
        and len(before) == len(after)
    ):
        for place, (x, y) in enumerate(zip(before, after, strict=True)):
            if x is not y:
                return where(x, y, f"{name}[{place}]")
    return f"{name} is {after!r:.80}"


MAKERS: dict[str, tuple[Callable[[random.Random], Case], int]] = {
    "flags": (wrong_flags, 5),
    "pairs": (contradictions, 1),
    "files": (damaged_file, 4),
    "checkpoints": (checkpoint_by_hand, 3),
}


def case_of(seed: int, number: int, kinds: Sequence[str] = tuple(MAKERS)) -> Case:
    """The case of a number, the same every time."""
    chance = random.Random(f"{seed} {number}")
    makers, weights = zip(*(MAKERS[kind] for kind in kinds), strict=True)
    while True:
        case = chance.choices(makers, weights)[0](chance)
        if not is_work([case.program, *case.arguments]):
            return case


def carry_out(number: int, *, seed: int, kinds: Sequence[str], template: Path) -> Outcome:
    """Runs a case in a copy of the template."""
    case = case_of(seed, number, kinds)
    with tempfile.TemporaryDirectory(dir=template.parent) as place:
        folder = Path(place) / "case"
        shutil.copytree(template, folder, copy_function=copy)
        what = case.damage(folder)
        before = content(folder)
        ending = run(case.program, case.arguments, folder)
        fault = verdict(case, ending, before, folder)
    given = " ".join(map(ascii, case.arguments))[-400:]
    text = f"({ending.seconds:.1f} s) {case.program} {given} [{what}]"
    lines = [line[-1000:] for line in ending.err.splitlines()[-25:]]
    return Outcome(number, case.kind, ending.status, fault, "\n  ".join([text, *lines]))


@dataclass
class Outcome:
    """How a case ended; `fault` says what is wrong with that."""

    number: int
    kind: str
    status: int | None
    fault: str | None
    text: str


def outcomes(
    numbers: Iterable[int], *, seed: int, jobs: int = 1, kinds: Sequence[str] = tuple(MAKERS)
) -> Iterator[Outcome]:
    """Carries out the cases of these numbers, several at a time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sdn_bad_input_") as place:
        template = Path(place) / "template"
        template.mkdir()
        make_template(template)
        todo = partial(carry_out, seed=seed, kinds=kinds, template=template)
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            yield from pool.map(todo, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time")
    parser.add_argument("--kinds", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases, which are told")
    flags = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    wrong = []
    numbers = flags.only or range(flags.cases)
    for case in outcomes(numbers, seed=flags.seed, jobs=flags.jobs, kinds=flags.kinds):
        if case.fault or flags.only:
            print(f"case {case.number}: {case.fault} {case.text}", flush=True)
        wrong += [case.number] if case.fault else []
        ended = "refused in one line" if case.status else "done"
        counts[case.kind, "NOT AS PROMISED" if case.fault else ended] += 1
    print("| bad input | cases | ended |", "|---|---|---|", sep="\n")
    for (kind, ended), times in sorted(counts.items()):
        print(f"| {kind} | {times} | {ended} |")
    print(f"not as promised: {wrong}" if wrong else "all as promised")
    sys.exit(1 if wrong else 0)


def copy(source: str, target: str) -> None:
    """As shutil.copy2, of pipes too."""
    if Path(source).is_file():
        shutil.copy2(source, target)
    else:
        os.mkfifo(target)


if __name__ == "__main__":
    main()
