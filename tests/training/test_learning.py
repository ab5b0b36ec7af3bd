"""Slow: small models really learn photographs."""

from __future__ import annotations

import csv

import pytest
from helpers import run

from data.get_dataset import get_dataset
from data.histogram import histogram_bits_per_dim

SMALL = (
    "--dataset Photos32 --batch 16 --batch_val 64 --depth 2 --ds_list 1 --downsample_first "
    "--h_size 24 --z_size 4 "
    "--post_model IsoGaussian --mix_components 2 --sdn_nfeat_0 24 --sdn_num_dirs 1 --num_workers "
    "0 --gpus 0 "
    "--logger none --figsize 2 --iters 150 --lrate 0.005 --lrate_decay 1 --ema_coef 0.95 "
    "--random_seed 1"
).split()


@pytest.fixture(scope="module")
def histogram() -> float:
    return histogram_bits_per_dim(
        get_dataset("Photos32"), get_dataset("Photos32", split="validation")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "precision"), [("sdn", "32-true"), ("sdn", "bf16-mixed"), ("cnn", "32-true")]
)
def test_a_small_model_beats_the_histogram_by_a_bit(variant, precision, histogram, tmp_path):
    flags = ["--precision", precision, "--output_dir", tmp_path, "--exp_name", variant]
    flags += ["--sdn_max_scale", 0 if variant == "cnn" else 16]
    done = run("train.py", *SMALL, *flags, timeout=1200)
    assert done.returncode == 0, done.stderr
    with (tmp_path / f"checkpoints/{variant}/epochs.csv").open(newline="") as file:
        bits = float(list(csv.DictReader(file))[-1]["val_neg_elbo"])
    print(f"{variant}, {precision}: {bits:.3f} bits/dim; histogram of each colour: {histogram:.3f}")
    assert bits < histogram - 1
