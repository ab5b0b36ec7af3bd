"""Training the β-VAE: the schedule of β, what is logged, resuming, and flags of the task."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY, TINY, TINY_BETA, assert_one_line_error, csv_rows, run

import train
from lib.checkpoint import read_checkpoint
from lib.config import ConfigError, TrainConfig
from lib.DensityVAE import DensityVAE
from lib.models import build_model
from lib.nn import SDNLayer
from lib.training.checkpoints import Checkpoints
from lib.training.signals import StopSignals


def test_a_run_logs_the_parts_of_the_elbo_and_draws_grids(beta_run):
    folder = beta_run / "checkpoints/beta"
    steps, epochs = csv_rows(folder / "steps.csv"), csv_rows(folder / "epochs.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 9))
    assert [int(row["epoch"]) for row in steps] == [0] * 4 + [1] * 4, (
        "--epoch_images is the length of an epoch"
    )
    for number, row in enumerate(steps):
        values = {name: float(value) for name, value in row.items() if value}
        assert values["beta"] == 8 * min(1, 0.25 * number)
        assert values["rate"] == pytest.approx(sum(values[f"kl_{i}"] for i in range(3)), rel=1e-5)
        assert values["beta_kl"] == pytest.approx(values["beta"] * values["rate"], rel=1e-5)
        assert values["neg_elbo"] == pytest.approx(values["distortion"] + values["rate"], rel=1e-5)
        assert values["neg_elbo"] > 10_000, "nats for each image, not bits/dim"
    assert [int(row["step"]) for row in epochs] == [4, 8]
    last = {name: float(value) for name, value in epochs[-1].items() if value}
    assert last["val_neg_elbo"] == pytest.approx(
        last["val_distortion"] + last["val_rate"], rel=1e-5
    )
    assert last["val_beta_kl"] == pytest.approx(8 * last["val_rate"], rel=1e-5)
    names = ("samples", "reconstructions", "traversals", "interpolations")
    grids = {f"{name}_{step:07d}.png" for name in names for step in (4, 8)}
    assert {path.name for path in (beta_run / "figs/beta").glob("*_000000?.png")} == grids


def test_a_checkpoint_is_the_last_and_has_no_average(beta_run):
    """The best ELBO of an annealed β would be that of a small β."""
    folder = beta_run / "checkpoints/beta"
    assert sorted(path.name for path in folder.glob("*.ckpt")) == [
        "last.ckpt",
        "step_0000004.ckpt",
        "step_0000008.ckpt",
    ]
    checkpoint = read_checkpoint(folder / "last.ckpt")
    assert checkpoint["global_step"] == 8 and checkpoint["hyper_parameters"]["beta_final"] == 8
    assert all(name.startswith("model.") for name in checkpoint["state_dict"])


def test_resuming_equals_never_stopping(tmp_path, beta_run):
    """β goes on, and so do order and noise; accumulated batches make one step of β."""
    common = [
        *TINY_BETA,
        "--make_checkpoint",
        "--output_dir",
        tmp_path,
        "--accumulate_grad_batches",
        2,
    ]
    common += ["--beta_final", 8, "--beta_rate", 0.2]
    for name, iters in (("whole", 6), ("parts", 4), ("parts", 6)):
        done = run("train.py", *common, "--exp_name", name, "--iters", iters, "--use_checkpoint")
        assert done.returncode == 0, done.stderr
    whole, parts = (tmp_path / "checkpoints" / name for name in ("whole", "parts"))
    betas = [float(row["beta"]) for row in csv_rows(whole / "steps.csv")]
    assert betas == pytest.approx([8 * 0.2 * step for step in range(6)][:6])
    for column in ("step", "epoch", "beta", "neg_elbo", "beta_kl", "kl_0"):
        a, b = (
            [row[column] for row in csv_rows(folder / "steps.csv")] for folder in (whole, parts)
        )
        assert a == b, column
    a, b = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


OPTIONS = [
    [
        "--obs_model",
        "DML",
        "--mix_components",
        "2",
        "--nbits",
        "5",
        "--sdn_num_dirs",
        "2",
        "--free_bits",
        "0.5",
    ],
    ["--precision", "64-true", "--batch_val", "2", "--val_images", "3"],
    ["--amp", "--sdn_max_scale", "0", "--no-analytic_kl", "--z_size", "1"],
    ["--figsize", "1", "--num_processes", "2"],
    ["--val_images", "1"],
]


@pytest.mark.parametrize("flags", OPTIONS, ids=[" ".join(flags) for flags in OPTIONS])
def test_options_run(flags, tmp_path):
    done = run(
        "train.py", *TINY_BETA, "--iters", 2, "--output_dir", tmp_path, "--make_checkpoint", *flags
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "checkpoints/sdn"
    assert len(csv_rows(folder / "steps.csv")) == 2 and len(csv_rows(folder / "epochs.csv")) == 1
    pictures = {path.name.split("_")[0] for path in (tmp_path / "figs/sdn").iterdir()}
    several = not {"--figsize", "1"} <= set(flags) and flags != ["--val_images", "1"]
    assert pictures == {"samples", "reconstructions", "traversals"} | (
        {"interpolations"} if several else set()
    )
    config = read_checkpoint(folder / "last.ckpt")["hyper_parameters"]
    assert config["analytic_kl"] == ("--no-analytic_kl" not in flags)
    if "--z_size" in flags:
        done = run(
            "evaluate.py",
            "--model",
            "sdn",
            "--elbo",
            "--limit",
            2,
            "--latents",
            "--output_dir",
            tmp_path,
        )
        assert done.returncode == 0, done.stderr


def test_all_steps_up_to_a_checkpoint_are_logged(tmp_path):
    """Killed right after the checkpoint was written, with no validation until then."""
    code = (
        "import os, train; from lib.training.resume import RunProgress; "
        "die = lambda progress, trainer, *_: trainer.current_epoch == 1 and os._exit(9); "
        "RunProgress.on_train_epoch_start = die; train.main()"
    )
    command = [sys.executable, "-c", code, *TINY_BETA, "--make_checkpoint", "--iters", "8"]
    command += ["--check_val_every_n_epoch", "9", "--output_dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 9, done.stderr
    assert read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")["global_step"] == 4
    assert [int(row["step"]) for row in csv_rows(tmp_path / "checkpoints/sdn/steps.csv")] == [
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("metric", ["val/bpd", "val/neg_elbo"])
def test_the_best_result_of_an_earlier_version_is_known(metric):
    """Lightning's callback kept it; forgotten, the next validation would take the place of the best
    checkpoint."""
    name = f"ModelCheckpoint{{'monitor': '{metric}', 'mode': 'min', 'every_n_train_steps': 0}}"
    checkpoint = {"callbacks": {name: {"best_model_score": torch.tensor(3.5)}, "MetricsLog": {}}}
    checkpoints = Checkpoints(None, StopSignals())
    checkpoints.on_load_checkpoint(None, None, checkpoint)
    assert checkpoints.state_dict()["best_score"] == 3.5


def test_the_defaults_of_the_task_are_the_specifications():
    config = train.parse(["--task", "disentanglement"])
    expected = dict(
        dataset="3DShapes",
        z_size=10,
        batch=128,
        lrate=0.001,
        lrate_decay=1,
        iters=300_000,
        beta_rate=1e-5,
    )
    expected |= dict(
        obs_model="DL",
        nbits=8,
        post_model="IsoGaussian",
        analytic_kl=True,
        sdn_nfeat_0=200,
        free_bits=0,
    )
    assert {name: getattr(config, name) for name in expected} == expected
    assert train.parse(["--task", "disentanglement", "--batch", "8"]).batch == 8
    assert train.parse([]) == TrainConfig(), "the other task's defaults are the fields'"
    model = build_model(config, 64)
    (layer,) = [module for module in model.modules() if isinstance(module, SDNLayer)]
    assert layer.sdn_correction_stage[0].direction == 0 and model.analytic_kl
    for cnn in (
        ["--sdn_max_scale", "0"],
        ["--sdn_max_scale", "16"],
        ["--sdn_min_scale", "64", "--sdn_max_scale", "64"],
    ):
        model = build_model(train.parse(["--task", "disentanglement", *cnn]), 64)
        assert not [module for module in model.modules() if isinstance(module, SDNLayer)]
    assert isinstance(
        build_model(TrainConfig(depth=1, ds_list=[], h_size=4, sdn_nfeat_0=2), 32), DensityVAE
    )


WRONG_FLAGS = [
    (["--depth", "3"], "--depth: without effect on --task disentanglement, leave it out"),
    (["--h_size", "200", "--ema_coef", "0.9"], "--h_size, --ema_coef: without effect"),
    (["--post_model", "IAF"], "--task disentanglement needs --post_model IsoGaussian; got IAF"),
    (["--beta_rate", "0"], "--beta_rate must be above 0 and at most 1; got 0.0"),
    (["--beta_rate", "-0.1"], "--beta_rate must be above 0 and at most 1"),
    (["--beta_rate", "100000"], "--beta_rate must be above 0 and at most 1"),
    (["--beta_rate", "nan"], "--beta_rate must be a finite number; got nan"),
    (["--beta_final", "-1"], "--beta_final must be 0 or more; got -1.0"),
    (["--beta_final", "inf"], "--beta_final must be a finite number; got inf"),
    (["--epoch_images", "-1"], "--epoch_images must be 0 or more; got -1"),
    (["--dataset", "Photos32"], "the model is for images of 64x64, got 32x32"),
]


@pytest.mark.parametrize(
    ("flags", "message"), WRONG_FLAGS, ids=[" ".join(flags) for flags, _ in WRONG_FLAGS]
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY_BETA, "--output_dir", str(tmp_path), *flags])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_an_epoch_too_short_for_a_batch_is_one_line(tmp_path):
    done = run("train.py", *TINY_BETA, "--output_dir", tmp_path, "--epoch_images", 3)
    assert_one_line_error(
        done, "--epoch_images gives an epoch 3 training images, fewer than one batch of 4"
    )


def test_a_beta_that_is_not_reached_is_said(tmp_path):
    done = run("train.py", *TINY_BETA, "--output_dir", tmp_path, "--iters", 2, "--beta_rate", 0.01)
    assert done.returncode == 0, done.stderr
    assert (
        "note: with --beta_rate 0.01 beta is at 0.02 of --beta_final after all --iters"
        in done.stderr
    )


def test_missing_data_say_which_command_gets_them(tmp_path):
    done = run(
        "train.py",
        *TINY_BETA,
        "--dataset",
        "3DShapes",
        "--root",
        tmp_path,
        "--output_dir",
        tmp_path,
    )
    assert_one_line_error(done, "get_3dshapes_data.sh")


def test_the_density_vae_takes_a_beta_too(tmp_path, images):
    flags = [
        "--root",
        images,
        "--output_dir",
        tmp_path,
        "--iters",
        3,
        "--beta_final",
        2,
        "--beta_rate",
        0.5,
    ]
    done = run("train.py", *TINY, *flags)
    assert done.returncode == 0, done.stderr
    rows = csv_rows(tmp_path / "checkpoints/sdn/steps.csv")
    assert [float(row["beta"]) for row in rows] == [0, 1, 2]


def test_an_unknown_task_is_named():
    with pytest.raises(
        ConfigError, match="--task must be one of density_estimation, disentanglement; got x"
    ):
        TrainConfig.for_task(task="x")


def test_an_output_folder_that_cannot_be_is_one_line():
    done = run("train.py", *TINY_BETA, "--output_dir", "/dev/null/x", "--make_checkpoint")
    assert_one_line_error(done, "train.py: error: ", "Not a directory: '/dev/null/x")
