"""The shell scripts: recipes as specified, flags passed through."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

import train
from experiments import disentanglement
from lib.config import ConfigError, TrainConfig
from lib.DensityVAE.blocks import BLOCKS
from lib.models import build_model
from lib.presets import PRESETS

COMMON = dict(
    batch=32,
    lrate_decay=0.999,
    obs_model="DML",
    nbits=8,
    z_size=4,
    h_size=200,
    free_bits=0.01,
    gpus=8,
)
COMMON |= dict(
    ema_coef=0.999, random_seed=1234, sampling_temperature=0.85, amp=True, make_checkpoint=True
)
RECIPES = {
    "train_cifar.sh": COMMON
    | dict(
        dataset="CIFAR10", depth=15, ds_list=[5, 10], lrate=0.002, sdn_max_scale=32, sdn_num_dirs=2
    )
    | dict(sdn_nfeat_0=360, sdn_nfeat_diff=128, mix_components=5),
    "train_imagenet.sh": COMMON
    | dict(
        dataset="ImageNet32",
        depth=16,
        ds_list=[3, 7, 11],
        lrate=0.002,
        lrate_decay=1,
        sdn_max_scale=32,
    )
    | dict(
        sdn_num_dirs=3,
        sdn_nfeat_0=424,
        sdn_nfeat_diff=0,
        mix_components=10,
        ema_coef=0.9995,
        random_seed=13,
    )
    | dict(sampling_temperature=1.0),
    "train_celeb.sh": COMMON
    | dict(
        dataset="CelebAHQ256",
        batch=4,
        depth=17,
        ds_list=[4, 7, 9, 11, 13, 15],
        lrate=0.001,
        sdn_max_scale=64,
    )
    | dict(
        sdn_num_dirs=2, sdn_nfeat_0=400, sdn_nfeat_diff=80, mix_components=30, nbits=5, z_size=8
    ),
}


def bash(script: str | Path, *arguments: str, python: object = "echo", cwd: object = REPOSITORY):
    """A finished script, in which something else stands for Python."""
    return subprocess.run(
        ["bash", str(REPOSITORY / script), *arguments],
        cwd=cwd,
        env=os.environ | {"SDN_PYTHON": str(python)},
        capture_output=True,
        text=True,
    )


def flags_of(script: str, *arguments: str, tmp_path, cwd=REPOSITORY) -> TrainConfig:
    """The configuration that a script asks of train.py, caught by an interpreter that only notes
    its arguments."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    done = bash(script, *arguments, python=fake, cwd=cwd)
    assert done.returncode == 0, done.stderr
    program, *flags = done.stdout.splitlines()
    assert program == "train.py"
    return train.parse(flags)


@pytest.mark.parametrize("script", RECIPES)
def test_recipes(script, tmp_path):
    sdn, cnn = (flags_of(script, *variant, tmp_path=tmp_path, cwd="/") for variant in ([], ["cnn"]))
    assert {name: getattr(sdn, name) for name in RECIPES[script]} == RECIPES[script]
    assert cnn.sdn_max_scale == 0 and sdn.exp_name != cnn.exp_name
    same = dict(exp_name="", sdn_max_scale=0)
    assert sdn.to_dict() | same == cnn.to_dict() | same


@pytest.mark.parametrize("script", RECIPES)
def test_further_flags_win(script, tmp_path):
    arguments = "sdn --gpus 0 --depth 3 --ds_list 1 --precision bf16-mixed".split()
    config = flags_of(script, *arguments, tmp_path=tmp_path)
    assert (config.gpus, config.depth, config.ds_list) == (0, 3, [1])
    assert (config.amp, config.precision) == (False, "bf16-mixed")
    header = (REPOSITORY / script).read_text()
    assert "expected: unknown" in header and "hardware" in header


@pytest.mark.parametrize(
    ("block", "lrate", "kind", "highway"),
    [
        ("sdn", 0.002, "sdn", "auto"),
        ("conv3", 0.002, "conv3", "auto"),
        ("conv5", 0.0005, "conv5", "auto"),
        ("conv3x2-highway", 0.001, "conv3x2", "on"),
        ("conv3x4", 0.0005, "conv3x4", "auto"),
    ],
)
def test_ablation_differs_from_cifar10_in_the_block_and_the_learning_rate(
    block, lrate, kind, highway, tmp_path
):
    config = flags_of("train_ablation.sh", block, "--gpus", "0", tmp_path=tmp_path, cwd="/")
    assert (config.block, config.highway, config.gpus) == (kind, highway, 0)
    assert (config.lrate, config.lrate_decay, config.lrate_patience) == (lrate, 1, 10)
    assert config.use_checkpoint and config.exp_name == f"ablation_{block}_seed1234"
    others = "block highway gpus lrate lrate_decay lrate_patience use_checkpoint exp_name".split()
    cifar = flags_of("train_cifar.sh", tmp_path=tmp_path).to_dict()
    assert {name for name, value in config.to_dict().items() if value != cifar[name]} <= {*others}


def test_ablation_of_everything_and_of_what_there_is_not(tmp_path):
    everything = bash("train_ablation.sh")
    names = re.findall(r"--exp_name ablation_(\S+)_seed1234", everything.stdout)
    highway = [f"{kind}-highway" for kind in BLOCKS[2:]]
    assert sorted(names) == sorted([*BLOCKS, *highway]), everything.stderr
    wrong = bash("train_ablation.sh", "conv7")
    assert wrong.returncode == 2 and not wrong.stdout
    assert "there is no block conv7; blocks are sdn conv3" in wrong.stderr
    for seed in (["--random_seed", "7"], ["--random_seed=7"]):
        other = bash("train_ablation.sh", "conv5", *seed)
        assert "--exp_name ablation_conv5_seed7 " in other.stdout, "another seed is another run"
    named = bash("train_ablation.sh", "conv5", "--exp_name", "x")
    assert named.returncode == 2 and "--exp_name is chosen" in named.stderr and not named.stdout


def test_3dshapes_is_the_paper_s_experiment(tmp_path):
    """5 weights, 2 decoders, 10 seeds; its flags are those of the experiment."""
    done = bash("train_3dshapes.sh", "--betas", "1", "--iters", "5", cwd="/")
    assert done.stdout == "-m experiments.disentanglement --betas 1 --iters 5\n", done.stderr
    flags = disentanglement.make_parser().parse_args([])
    assert flags.betas == [1, 32, 100, 300, 500] and flags.seeds == list(range(10))
    assert flags.decoders == ["cnn", "sdn"] and flags.jobs == 1 and flags.levels is None
    header = (REPOSITORY / "train_3dshapes.sh").read_text()
    assert "expected: unknown" in header and "hardware" in header


def test_the_quickstart_promises_what_the_readme_promises():
    script = (REPOSITORY / "quickstart.sh").read_text()
    promises = re.findall(r"promised=([\d.]+) within=([\d.]+)", script)
    assert len(promises) == 2
    readme = (REPOSITORY / "README.md").read_text()
    for promised, within in promises:
        assert f"**{promised} bits/dim** within ±{within}" in readme


@pytest.mark.parametrize(
    ("what", "name", "bits", "status"),
    [("", "quickstart", 0.02, 0), ("photos", "photos", -0.1, 0), ("photos", "photos", 0.2, 1)],
)
def test_the_quickstart_fails_if_its_promise_is_missed(tmp_path, what, name, bits, status):
    script = (REPOSITORY / "quickstart.sh").read_text()
    promised = float(re.findall(r"promised=([\d.]+)", script)[name == "photos"])
    for file in ("quickstart.sh", "setup.sh"):
        (tmp_path / file).write_text((REPOSITORY / file).read_text())
    (tmp_path / f"figs/{name}").mkdir(parents=True)
    result = {"elbo": {"bits_per_dim": promised + bits}}
    (tmp_path / f"figs/{name}/results.json").write_text(json.dumps(result))
    python = tmp_path / "python"  # shows what it is to run, but for the verdict
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\necho "$@"\n')
    python.chmod(0o755)
    done = bash(tmp_path / "quickstart.sh", *what.split(), python=python, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert ("NOT as promised" in done.stdout) is bool(status)
    lines = done.stdout.splitlines()
    flags = next(line.split()[1:] for line in lines if line.startswith("train.py"))
    config = train.parse(flags)
    assert config.exp_name == name and config.make_checkpoint and config.use_checkpoint


def test_the_quickstart_knows_its_data():
    done = bash("quickstart.sh", "films")
    assert done.returncode == 2 and "digits or photos, not films" in done.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fits_its_sizes_and_given_flags_win(preset):
    config = train.parse(["--preset", preset, "--h_size", "8", "--sdn_nfeat_0", "6"])
    assert (config.h_size, config.depth) == (8, PRESETS[preset]["depth"])
    for size in (64, (96, 128), 256):
        assert build_model(config, size, 1).latent_shapes
    with pytest.raises(ConfigError, match="--preset is for"):
        train.parse(["--preset", preset, "--task", "disentanglement"])
