"""The benchmark of communication counts what is there, and its model of efficiency behaves."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY

import train
from benchmarks.communication import BACKWARD_SHARE, BETWEEN_NODES, count, efficiency, recipe
from lib.training.base import objective


def test_the_bytes_counted_are_those_of_the_gradients():
    config = train.parse(TINY)
    module = train.TRAINING[config.task](train.make_model(config), config)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    output = module.model(module.model.observation.encode(images))
    objective(output).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    counted = count(config)
    assert counted["gradient_bytes"] == sum(4 * gradient.numel() for gradient in gradients)
    assert counted["gradient_tensors"] == len(gradients)


def test_flags_are_those_of_the_recipes():
    sdn, cnn = (recipe("train_cifar.sh", variant) for variant in ("sdn", "cnn"))
    assert (sdn.dataset, sdn.depth, sdn.sdn_nfeat_0, sdn.sdn_max_scale) == ("CIFAR10", 15, 360, 32)
    assert cnn.sdn_max_scale == 0


@pytest.mark.parametrize("link", BETWEEN_NODES, ids=lambda link: link["name"])
def test_efficiency_is_lost_to_bytes_and_gpus_and_regained_by_overlap(link):
    few, many, slow = (
        efficiency(bytes_, gpus, seconds, link)
        for bytes_, gpus, seconds in ((10**8, 8, 0.1), (10**9, 512, 0.1), (10**9, 512, 10.0))
    )
    for result in (few, many, slow):
        assert 0 < result["without_overlap"] < result["with_overlap"] <= 1
    assert (
        many["without_overlap"] < few["without_overlap"]
        and many["without_overlap"] < slow["without_overlap"]
    )
    sent = 2 * 511 / 512 * 10**9 / link["bandwidth"]
    assert sent < many["all_reduce_seconds"] < 1.2 * sent
    assert many["with_overlap"] < 0.1 / (0.1 + sent - BACKWARD_SHARE * 0.1)
