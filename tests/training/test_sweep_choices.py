"""The backends of a run's sweeps: chosen by the first process, adopted by the others."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib.nn import SDNLayer
from lib.sweeps import selection
from lib.training.sweep_choices import SweepChoices


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = SDNLayer(3, 3, dirs=[0, 2])
        self.observation = SimpleNamespace(encode=lambda images: images.float())
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.layer(x)


@pytest.fixture
def module(monkeypatch):
    """A model whose device, the CPU, counts as one on which backends are measured."""
    monkeypatch.setattr(selection, "_choices", {})
    monkeypatch.setattr(selection, "_verdicts", {})
    monkeypatch.setattr(selection, "ON_CPU", ())
    monkeypatch.setenv("SDN_CACHE", "")
    monkeypatch.setattr(selection, "_measure", lambda names, *_: dict.fromkeys(names, 1.0))
    device = SimpleNamespace(type="of the test")
    return SimpleNamespace(model=Model(), device=device)


def trainer(rank: int, sent: list):
    """Of a rank of two; what rank 0 broadcasts arrives in the others."""

    def broadcast(value):
        if rank == 0:
            sent.append(value)
        return sent[0]

    return SimpleNamespace(
        is_global_zero=rank == 0,
        world_size=2,
        precision_plugin=SimpleNamespace(forward_context=torch.no_grad),
        strategy=SimpleNamespace(broadcast=broadcast),
    )


def test_the_first_process_chooses_and_the_others_adopt(module, monkeypatch):
    adopted = []
    monkeypatch.setattr(
        "lib.training.sweep_choices.adopt", lambda shared, device: adopted.append(shared)
    )
    batch, sent = (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.arange(2)), []
    first, second = SweepChoices(), SweepChoices()
    for index in range(3):
        first.on_train_batch_start(trainer(0, sent), module, batch, index)
    assert module.model.passes == 1 and len(sent) == 1
    cases = [case for case, _ in sent[0]]
    assert {(case.num_lines, case.num_positions) for case in cases} == {(4, 5), (5, 4)}
    second.on_train_batch_start(trainer(1, sent), module, batch, 0)
    assert module.model.passes == 1 and adopted == [sent[0], sent[0]]


def test_nothing_happens_on_a_cpu(module):
    module.device = torch.device("cpu")
    SweepChoices().on_train_batch_start(trainer(0, []), module, (torch.zeros(1), None), 0)
    assert module.model.passes == 0
