"""How a command ends when it runs in this process, and what bad input may not do."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings


def generated(cases: int) -> settings:
    """So many generated cases, the same each time."""
    return settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(
            HealthCheck
        ),  # fixtures of the session are shared by all cases on purpose
    )


@dataclass(frozen=True)
class Ending:
    """A finished command: its exit status and what it wrote."""

    status: int
    out: str
    err: str


def ending_of(main: Callable[[list[str]], None], arguments: Sequence[object]) -> Ending:
    """Runs the `main` of an entry script with streams like those of a terminal. What would be a
    traceback is raised."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(
        io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    status = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            assert isinstance(stop.code, int), "an exit status is a number"
            status = stop.code
    return Ending(status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())


def files_in(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@contextmanager
def leaving_files_alone(*folders: Path) -> Iterator[None]:
    """Every file that is there stays as it is to the byte, and nothing half-written is left."""
    before = {path: content for folder in folders for path, content in files_in(folder).items()}
    yield
    after = {path: content for folder in folders for path, content in files_in(folder).items()}
    changed = [path for path, content in before.items() if after.get(path) != content]
    assert not changed, changed
    partial = [path for folder in folders for path in folder.rglob("*") if ".partial" in path.name]
    assert not partial, partial


def assert_told(ending: Ending, program: str) -> None:
    """The status is 0 without an error, or 2 with one line that begins with the program's name."""
    errors = [line for line in ending.err.split("\n") if "error:" in line]
    assert "Traceback" not in ending.err, ending.err
    if ending.status == 0:
        assert not errors, ending.err
        return
    assert ending.status == 2, ending
    assert len(errors) == 1, ending.err
    assert errors[0].startswith(f"{program}: error: ") and len(errors[0]) > len(
        f"{program}: error: "
    ), errors[0]
    assert ending.err.endswith(f"{errors[0]}\n"), ending.err


def assert_refused(ending: Ending, program: str, *parts: str) -> None:
    """One line that holds all parts, and status 2."""
    assert_told(ending, program)
    assert ending.status == 2, ending
    for part in parts:
        assert part in ending.err, ending.err
