"""Recorded sweeps, with a recording that is emulated: a function is run once and then again, on the
memory that it was recorded with."""

import pytest
import torch
from torch import Tensor

from lib.sweeps import checking, graphs, lines_backend

CPU = torch.device("cpu")


class Emulated:
    """Stands for a CUDA graph: what it captured it runs again, with the same tensors."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function):
        self.recorded += 1
        function()

        def replay():
            self.replayed += 1
            function()

        return replay


def arguments(seed: int, shape=(3, 4, 2), C=5) -> list[Tensor]:
    torch.manual_seed(seed)
    tensors, _ = checking.example(shape, C, CPU)
    return [tensor + 0.1 * torch.randn_like(tensor) for tensor in tensors]


@pytest.fixture
def emulated(monkeypatch):
    """Makes the CPU a device whose sweeps are replayed."""
    recording = Emulated()
    monkeypatch.setattr(graphs, "_graphs", type(graphs._graphs)())
    monkeypatch.setattr(graphs, "captured", recording)
    monkeypatch.setattr(graphs, "replays", lambda lines: graphs.is_small(lines))
    return recording


OPTIONS = (False, False, torch.float64)


def test_layers_of_one_shape_share_a_recording(emulated):
    for seed in range(3):  # other features and other weights
        tensors = arguments(seed)
        (expected,) = lines_backend._sweep(*tensors, *OPTIONS)
        assert torch.equal(lines_backend.sweep(*tensors, *OPTIONS), expected)
        given = (torch.cos(expected), *tensors, expected, *OPTIONS)
        found = lines_backend.sweep_backward(*given)
        for one, other in zip(found, lines_backend._sweep_backward(*given), strict=True):
            assert torch.equal(one, other)
    assert (emulated.recorded, emulated.replayed) == (2, 6)


def test_results_and_inputs_are_copies(emulated):
    """What a caller holds does not change when the recording runs again, and what it passed may."""
    tensors = arguments(0)
    first = lines_backend.sweep(*tensors, *OPTIONS)
    before = first.clone()
    tensors[0].zero_()
    lines_backend.sweep(*arguments(1), *OPTIONS)
    assert torch.equal(first, before)


@pytest.mark.parametrize(
    "change",
    [
        dict(shape=(4, 4, 2)),
        dict(C=6),
        dict(dtype=torch.float32),
        dict(options=(True, False, torch.float64)),
        dict(options=(False, True, torch.float64)),
        dict(transposed=True),
    ],
    ids=str,
)
def test_what_differs_is_recorded_by_itself(emulated, change):
    lines_backend.sweep(*arguments(0), *OPTIONS)
    tensors = arguments(0, change.get("shape", (3, 4, 2)), change.get("C", 5))
    if "dtype" in change:
        tensors = [tensor.to(change["dtype"]) for tensor in tensors]
    if "transposed" in change:
        tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    options = change.get("options", OPTIONS)
    (expected,) = lines_backend._sweep(*tensors, *options)
    assert torch.equal(lines_backend.sweep(*tensors, *options), expected)
    assert emulated.recorded == 2


def test_the_number_of_recordings_is_limited(emulated, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for length in (3, 4, 3, 5, 3, 4):  # 3 is used most recently whenever there is no room
        lines_backend.sweep(*arguments(0, (length, 4, 2)), *OPTIONS)
    assert len(graphs._graphs) == 2 and emulated.recorded == 4


def test_buffers_outlive_inference_mode(emulated):
    with torch.inference_mode():
        lines_backend.sweep(*arguments(0), *OPTIONS)
    tensors = arguments(1)
    (expected,) = lines_backend._sweep(*tensors, *OPTIONS)
    assert torch.equal(lines_backend.sweep(*tensors, *OPTIONS), expected)


def test_large_sweeps_are_not_recorded(emulated, monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST", 3 * 4 * 2 * 5 - 1)
    lines_backend.sweep(*arguments(0), *OPTIONS)
    assert emulated.recorded == 0


def test_nothing_is_recorded_on_a_cpu():
    assert not graphs.replays(torch.zeros(1, 1, 1, 1))
