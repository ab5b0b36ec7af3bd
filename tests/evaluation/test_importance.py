"""Importance sampling within the memory that there is: halving, splitting, and the chunk that is
picked."""

from __future__ import annotations

import json
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from test_likelihood import OPTIONS, open_small, values_in
from test_workers import in_another_process

from lib.DensityVAE import DensityVAE
from lib.evaluation import importance
from lib.evaluation.importance import (
    Group,
    ImportanceSampler,
    LikelihoodError,
    bytes_per_row,
    pick_chunk,
)
from lib.evaluation.likelihood import negative_log_likelihood


def narrow(monkeypatch, largest: int, error: Exception, after: int = 0) -> list[int]:
    """Lets memory run out in passes of more rows than `largest`, `after` some; the rows of each
    pass that was begun."""
    rows = []
    top_down = DensityVAE.top_down

    def limited(self, batch, **options):
        rows.append(batch)
        if batch > largest and len(rows) > after:
            raise error
        return top_down(self, batch, **options)

    monkeypatch.setattr(DensityVAE, "top_down", limited)
    return rows


@pytest.mark.parametrize(
    ("largest", "error", "expected", "chunk"),
    [
        (
            4,
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            [24, 12] + 12 * [4],
            6,
        ),
        (
            3,
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
            [24, 12, 4] + 24 * [2],
            2,
        ),
    ],
)
def test_the_chunk_is_halved_until_it_fits(tmp_path, monkeypatch, largest, error, expected, chunk):
    """Groups of four images with six samples; where even one sample of each is too much they are
    divided."""
    negative_log_likelihood(open_small, range(8), ledger=tmp_path / "whole.csv", **OPTIONS)
    rows = narrow(monkeypatch, largest, error)
    result = negative_log_likelihood(
        open_small, range(8), ledger=tmp_path / "l.csv", **OPTIONS | {"chunk": 24}
    )
    assert (rows, result["chunk"]) == (expected, chunk)
    assert values_in(tmp_path / "l.csv") == pytest.approx(
        values_in(tmp_path / "whole.csv"), rel=1e-6
    )


def test_what_was_done_before_memory_ran_out_is_not_repeated(tmp_path, monkeypatch):
    options = OPTIONS | {"samples": 40, "chunk": 8}
    whole = negative_log_likelihood(open_small, [0], ledger=tmp_path / "whole.csv", **options)
    rows = narrow(monkeypatch, 5, torch.OutOfMemoryError("out of memory"), after=2)
    result = negative_log_likelihood(open_small, [0], ledger=tmp_path / "ledger.csv", **options)
    assert rows == [8, 8, 8] + 6 * [4], "the third pass failed"
    assert result["bits_per_dim"] == pytest.approx(whole["bits_per_dim"], rel=1e-6)


def test_the_bottom_up_pass_is_split_too(tmp_path, monkeypatch):
    negative_log_likelihood(open_small, range(8), ledger=tmp_path / "whole.csv", **OPTIONS)
    bottom_up = DensityVAE.bottom_up
    batches = []

    def limited(self, x):
        batches.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return bottom_up(self, x)

    monkeypatch.setattr(DensityVAE, "bottom_up", limited)
    negative_log_likelihood(
        open_small, range(8), ledger=tmp_path / "l.csv", **OPTIONS | {"chunk": 24}
    )
    assert batches == [4, 2] + 8 * [1]
    assert values_in(tmp_path / "l.csv") == pytest.approx(
        values_in(tmp_path / "whole.csv"), rel=1e-6
    )


def test_a_row_that_does_not_fit_is_one_clear_line(tmp_path, monkeypatch):
    narrow(
        monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
    )
    message = r"^out of memory on cpu with a single importance sample .* \(CUDA out of memory. Tried to allocate 2.00 GiB\)$"
    for chunk in (12, None):
        with pytest.raises(LikelihoodError, match=message):
            negative_log_likelihood(
                open_small, range(8), ledger=tmp_path / "l", **OPTIONS | {"chunk": chunk}
            )


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    narrow(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        negative_log_likelihood(open_small, range(8), ledger=tmp_path / "l", **OPTIONS)


def test_the_picked_chunk_fits_half_of_the_free_memory(monkeypatch):
    model, _ = open_small()
    row = bytes_per_row(model)
    for free, sharing, expected in (
        (0, 1, 1),
        (2 * row, 1, 1),
        (15.9 * row, 1, 4),
        (16.1 * row, 1, 8),
        (16.1 * row, 2, 4),
    ):
        monkeypatch.setattr(importance, "_free_memory", lambda device, free=free: int(free))
        assert pick_chunk(model, sharing) == expected
    monkeypatch.setattr(importance, "_free_memory", lambda device: 2**50)
    assert pick_chunk(model) == importance.LARGEST_CHUNK_CPU
    monkeypatch.undo()
    assert 2**20 < importance._free_memory(torch.device("cpu")) < 2**50


def print_memory_of_a_pass(rows: int) -> None:
    """Run in a process of its own: the estimate, and by how much a pass raises the most that the
    process ever held."""
    model, images = open_small(image_size=32, h_size=48, sdn_max_scale=32, sdn_nfeat_0=48, count=1)
    estimate = rows * bytes_per_row(model)

    def most() -> int:
        # Not ru_maxrss, which a process inherits from the one that started it.
        (line,) = [
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM:")
        ]
        return int(line.split()[1]) * 1024

    before = most()
    list(
        ImportanceSampler(model, images, samples=rows, seed=0, chunk=rows)(Group((0,), 0, (), rows))
    )
    print(estimate, most() - before)


# Large tensors with little arithmetic.
LARGE = dict(
    image_size=64,
    mix_components=20,
    sdn_max_scale=32,
    post_model="IsoGaussian",
    depth=2,
    ds_list=[0],
    count=1,
)


def compute_in_little_memory(path: str, spare: int) -> None:
    """Run in a process of its own: a likelihood whose chunk does not fit into what may still be
    allocated."""
    opened = open_small(**LARGE)
    list(
        ImportanceSampler(*opened, samples=1, seed=0, chunk=1)(Group((0,), 0, (), 1))
    )  # what only a first pass takes
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + spare, resource.RLIM_INFINITY))
    assert importance._free_memory(torch.device("cpu")) <= spare
    result = negative_log_likelihood(
        lambda device: opened, [0], ledger=path, **OPTIONS | {"samples": 32, "chunk": 32}
    )
    print(json.dumps(result))


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")


@needs_proc
def test_the_estimated_memory_of_a_pass_is_not_below_the_truth():
    with in_another_process("test_importance.print_memory_of_a_pass(32)") as process:
        estimate, taken = map(int, process.stdout.read().split())
    assert estimate / 4 < taken <= estimate


@needs_proc
def test_the_chunk_is_halved_when_memory_really_runs_out(tmp_path):
    path = tmp_path / "little.csv"
    with in_another_process(
        f"test_importance.compute_in_little_memory({str(path)!r}, {160 * 2**20})"
    ) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    little = json.loads(stdout)
    assert 1 < little["chunk"] < 32
    options = OPTIONS | {"samples": 32, "chunk": 8}
    much = negative_log_likelihood(
        partial(open_small, **LARGE), [0], ledger=tmp_path / "much.csv", **options
    )
    assert little["bits_per_dim"] == pytest.approx(much["bits_per_dim"], rel=1e-6)
