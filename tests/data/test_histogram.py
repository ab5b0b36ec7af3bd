"""The histogram's figure, against plain counting, and the command that prints it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from data.get_dataset import get_dataset
from data.histogram import histogram_bits_per_dim, main


def images(count: int, seed: int) -> list[torch.Tensor]:
    """Pictures whose colours have different and uneven distributions."""
    rng = np.random.default_rng(seed)
    levels = rng.normal([60, 120, 200], [5, 30, 60], size=(count, 4, 5, 3)).clip(0, 255)
    return [torch.from_numpy(picture.astype(np.uint8)).permute(2, 0, 1) for picture in levels]


@pytest.mark.parametrize("nbits", [1, 5, 8])
def test_it_is_the_cross_entropy_under_smoothed_counts(nbits):
    train, validation = images(7, seed=0), images(4, seed=1)
    levels = 2**nbits
    bits = []
    for colour in range(3):
        seen = [
            int(value) * levels // 256 for picture in train for value in picture[colour].flatten()
        ]
        for picture in validation:
            for value in picture[colour].flatten():
                occurrences = seen.count(int(value) * levels // 256) + 1
                bits.append(-math.log2(occurrences / (len(seen) + levels)))
    expected = sum(bits) / len(bits)
    assert histogram_bits_per_dim(train, validation, nbits) == pytest.approx(expected, rel=1e-9)


def test_one_colour_costs_less_the_more_often_it_was_seen():
    black = torch.zeros(3, 8, 8, dtype=torch.uint8)
    few, many = (
        histogram_bits_per_dim([black], [black]),
        histogram_bits_per_dim([black] * 50, [black]),
    )
    assert few == pytest.approx(math.log2((64 + 256) / 65))
    assert many == pytest.approx(math.log2((3200 + 256) / 3201))


def test_the_command_prints_one_line(capsys):
    main(["Photos32", "--nbits", "5"])
    output = capsys.readouterr().out
    printed = re.fullmatch(
        r"Photos32, 5 bits: histogram of each colour: (\d\.\d{3}) bits/dim\n", output
    )
    assert printed, output
    splits = [get_dataset("Photos32", split=split) for split in ("train", "validation")]
    assert float(printed[1]) == pytest.approx(histogram_bits_per_dim(*splits, 5), abs=5.1e-4)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (
            ["ImageNet32"],
            ["there is no", "train.lmdb", "bash data/ImageNet32/get_imagenet_data.sh"],
        ),
        (["Photos32", "--nbits", "9"], ["--nbits", "9"]),
        (["Cifar"], ["Cifar", "CIFAR10"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys, arguments, parts):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--root", str(tmp_path)])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    for part in ["data.histogram: error: ", *parts]:
        assert part in line, line
