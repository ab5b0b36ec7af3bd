"""Models that cannot be built are refused before they take memory or time."""

from __future__ import annotations

import pytest
import torch

from lib.config import ConfigError, TrainConfig
from lib.models import _build, build_model

SMALL = dict(depth=2, ds_list=[1], h_size=8, sdn_nfeat_0=6)


@pytest.mark.parametrize("name", ["depth", "h_size", "z_size", "mix_components", "sdn_nfeat_0"])
def test_sizes_beyond_all_reason_are_refused(name):
    for size in (10**12, 2**70):
        with pytest.raises(ConfigError, match=f"--{name} must be .*; got {size}"):
            TrainConfig(**SMALL | {name: size}).validate()


@pytest.mark.parametrize("name", ["h_size", "sdn_nfeat_0"])
def test_weights_that_do_not_fit_into_memory_are_refused(name):
    with pytest.raises(
        ValueError, match="the model's weights take .* GB, this machine's memory has"
    ):
        build_model(TrainConfig(**SMALL | {name: 2**20}), 32)


def test_looking_at_the_size_changes_no_weights():
    torch.manual_seed(0)
    expected = _build(TrainConfig(**SMALL), 32).state_dict()
    torch.manual_seed(0)
    weights = build_model(TrainConfig(**SMALL), 32).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
