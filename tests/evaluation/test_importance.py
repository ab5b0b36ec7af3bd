"""Importance sampling within the memory that there is: halving, and the chunk that is picked."""

from __future__ import annotations

import json
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from test_likelihood import OPTIONS, in_another_process, needs_proc, open_small, values_in

from lib.DensityVAE import DensityVAE
from lib.DisentanglementVAE import DisentanglementVAE
from lib.evaluation import importance
from lib.evaluation.importance import ImportanceSampler, LikelihoodError, pick_chunk
from lib.evaluation.likelihood import negative_log_likelihood


def narrow(monkeypatch, largest: int, error: Exception) -> list[int]:
    """Lets memory run out in passes of more rows than `largest`; the rows of each pass that was
    begun."""
    rows = []
    top_down = DensityVAE.top_down

    def limited(self, batch, **options):
        rows.append(batch)
        if batch > largest:
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
            [6, 3, 3, 3, 3],
            3,
        ),
        (
            2,
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
            [6, 3, 1, 1, 1, 1, 1, 1] + 6 * [1],
            1,
        ),
    ],
)
def test_the_chunk_is_halved_until_it_fits(tmp_path, monkeypatch, largest, error, expected, chunk):
    negative_log_likelihood(open_small, range(2), ledger=tmp_path / "whole.csv", **OPTIONS)
    rows = narrow(monkeypatch, largest, error)
    result = negative_log_likelihood(
        open_small, range(2), ledger=tmp_path / "l.csv", **OPTIONS | {"chunk": 24}
    )
    assert (rows, result["chunk"]) == (expected, chunk)
    assert values_in(tmp_path / "l.csv") == pytest.approx(
        values_in(tmp_path / "whole.csv"), rel=1e-6
    )


def test_a_row_that_does_not_fit_is_one_clear_line(tmp_path, monkeypatch):
    narrow(
        monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
    )
    message = (
        r"^out of memory on cpu with a single importance sample .* "
        r"\(CUDA out of memory. Tried to allocate 2.00 GiB\)$"
    )
    for chunk in (12, None):
        with pytest.raises(LikelihoodError, match=message):
            negative_log_likelihood(
                open_small, range(8), ledger=tmp_path / "l", **OPTIONS | {"chunk": chunk}
            )


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    narrow(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        negative_log_likelihood(open_small, range(8), ledger=tmp_path / "l", **OPTIONS)


def test_the_picked_chunk_is_a_power_of_two_within_the_bytes_of_the_device(monkeypatch):
    model, _ = open_small()
    widest = max(m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    row = importance.TENSORS_ALIVE * 4 * widest * 8 * 8
    for size, expected in ((0, 1), (2 * row, 2), (7.9 * row, 4), (8 * row, 8)):
        monkeypatch.setitem(importance.BYTES, "cpu", int(size))
        assert pick_chunk(model) == expected
    monkeypatch.undo()
    assert pick_chunk(model) == importance.LARGEST_CHUNK["cpu"]
    assert pick_chunk(DisentanglementVAE(z_size=3)) == importance.LARGEST_CHUNK["cpu"]


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
    ImportanceSampler(*opened, samples=1, seed=0, chunk=1)(0)  # what only a first pass takes
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + spare, resource.RLIM_INFINITY))
    options = OPTIONS | {"samples": 32, "chunk": 32, "image_shape": (3, 64, 64)}
    print(json.dumps(negative_log_likelihood(lambda device: opened, [0], ledger=path, **options)))


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
    options = OPTIONS | {"samples": 32, "chunk": 8, "image_shape": (3, 64, 64)}
    much = negative_log_likelihood(
        partial(open_small, **LARGE), [0], ledger=tmp_path / "much.csv", **options
    )
    assert little["bits_per_dim"] == pytest.approx(much["bits_per_dim"], rel=1e-6)
