"""Models of one size that are evaluated at another."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import larger
from lib.config import TrainConfig
from lib.models import build_model
from lib.nn import Sweep


def test_sweeps_and_weights_stay_where_they_are():
    config = replace(
        TrainConfig(), depth=2, ds_list=[1], h_size=8, z_size=2, sdn_max_scale=8, sdn_nfeat_0=8,
        sdn_nfeat_diff=0, sdn_num_dirs=2, mix_components=2, downsample_first=True,
    )  # fmt: skip
    model = build_model(config, 16)
    twice = larger.at_size(SimpleNamespace(model=model, config=config), 32)
    assert twice.image_shape == (3, 32, 32)
    kinds = [[type(m).__name__ for m in either.modules()] for either in (model, twice)]
    assert kinds[0] == kinds[1]
    assert any(isinstance(m, Sweep) for m in model.modules())
    for one, other in zip(model.parameters(), twice.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.modules(), twice.modules(), strict=True):
        if isinstance(one, nn.Conv2d):
            assert (one.kernel_size, one.stride) == (other.kernel_size, other.stride)


def test_models_are_evaluated_and_sampled_at_other_sizes(finished, tmp_path):
    pytest.importorskip("skimage")
    output = tmp_path / "larger.json"
    flags = ["tiny", "--output_dir", str(finished), "--sizes", "32", "48", "--count", "2"]
    larger.main([*flags, "--output", str(output), "--pictures", str(tmp_path)])
    rows = json.loads(output.read_text())["rows"]
    assert [(row["model"], row["size"], row["images"]) for row in rows] == [
        ("tiny", 32, 2),
        ("tiny", 48, 2),
    ]
    assert all(0 < row["rate"] < row["bits_per_dim"] < 20 for row in rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {"tiny_32.png", "tiny_48.png"}


def test_what_cannot_be_is_said(finished, capsys):
    for flags, message in [
        (["missing"], "known: tiny"),
        (["tiny", "--sizes", "30"], "--sizes must be multiples of 4"),
        (["tiny", "--count", "0"], "--count must be 1 to 1024"),
    ]:
        with pytest.raises(SystemExit) as refused:
            larger.main([*flags, "--output_dir", str(finished)])
        assert refused.value.code not in (None, 0)
        assert message in capsys.readouterr().err
