"""train.py as a user runs it: training, averages, resuming, several processes, and how it says what
is wrong."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil

import pytest
import torch
from helpers import REPOSITORY, TINY, assert_one_line_error, csv_rows, resumable, run

import train
from lib.checkpoint import read_checkpoint
from lib.config import ConfigError, TrainConfig
from lib.flags import flag_table
from lib.training.resume import step_checkpoints


def test_a_run_leaves_metrics_pictures_and_a_safe_checkpoint(finished):
    steps, epochs = (
        csv_rows(finished / f"checkpoints/tiny/{name}.csv") for name in ("steps", "epochs")
    )
    assert [int(row["step"]) for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        parts = float(row["distortion"]) + float(row["kl_0"]) + float(row["kl_1"])
        assert float(row["neg_elbo"]) == pytest.approx(parts, rel=1e-4)
        assert float(row["rate"]) == pytest.approx(
            float(row["kl_0"]) + float(row["kl_1"]), rel=1e-4
        )
        assert float(row["grad_norm"]) > 0 and float(row["images_per_second"]) > 0
        assert float(row["lr"]) == 0.002
    assert [int(row["step"]) for row in epochs] == [6], (
        "a run that ends inside an epoch validates once more"
    )
    assert (
        math.isfinite(float(epochs[0]["val_neg_elbo"])) and float(epochs[0]["peak_memory_mib"]) > 0
    )
    for name in ("samples", "reconstructions"):
        assert (finished / f"figs/tiny/{name}_0000006.png").stat().st_size > 0
    for name in ("best", "last"):
        checkpoint = read_checkpoint(finished / f"checkpoints/tiny/{name}.ckpt")
        assert checkpoint["global_step"] == 6
        assert checkpoint["hyper_parameters"]["sdn_nfeat_0"] == 6
        assert checkpoint["provenance"]["torch"] == str(torch.__version__)
        assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", checkpoint["provenance"]["commit"])


def test_the_average_follows_the_weights(tmp_path, images):
    """With decay 0 the average is the weights themselves; with 0.5 it is not, and it is what
    evaluation uses."""
    for decay in ("0", "0.5"):
        done = run(
            "train.py", *TINY, "--root", images, "--exp_name", decay, "--iters", 3,
            "--make_checkpoint",
            "--output_dir", tmp_path, "--ema_coef", decay,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        state = read_checkpoint(tmp_path / f"checkpoints/{decay}/last.ckpt")["state_dict"]
        assert state["average.n_averaged"] == 3
        names = [key.removeprefix("model.") for key in state if key.startswith("model.")]
        same = [
            torch.equal(state[f"model.{name}"], state[f"average.module.{name}"]) for name in names
        ]
        frozen = [name for name in names if name.startswith("ladder_layers.1.up_b")]
        assert all(same) if decay == "0" else sum(same) == len(frozen)


def test_the_learning_rate_is_halved_without_progress(tmp_path, images):
    """With a rate that moves nothing, after each two validations but the first; a stop in between
    changes nothing."""
    common = [
        *TINY,
        "--root",
        images,
        "--make_checkpoint",
        "--use_checkpoint",
        "--output_dir",
        tmp_path,
    ]
    common += ["--lrate", 1e-30, "--lrate_decay", 1, "--lrate_patience", 2, "--epoch_images", 8]
    for name, epochs in (("whole", 6), ("stopped", 2), ("stopped", 6)):
        done = run("train.py", *common, "--exp_name", name, "--max_epochs", epochs)
        assert done.returncode == 0, done.stderr
    assert "2 validations without a better -ELBO; the learning rate is 2.5e-31" in done.stderr
    whole, stopped = (
        csv_rows(tmp_path / f"checkpoints/{name}/epochs.csv") for name in ("whole", "stopped")
    )
    assert [float(row["lr"]) for row in whole] == [1e-30, 1e-30, 1e-30, 5e-31, 5e-31, 2.5e-31]
    assert [(row["step"], row["lr"]) for row in whole] == [
        (row["step"], row["lr"]) for row in stopped
    ]


def test_a_run_that_is_over_keeps_its_description(tmp_path, images):
    common = [
        *TINY,
        "--root",
        images,
        "--make_checkpoint",
        "--use_checkpoint",
        "--output_dir",
        tmp_path,
        "--iters",
        1,
    ]
    texts = []
    for figsize in (2, 1):
        assert run("train.py", *common, "--figsize", figsize).returncode == 0
        texts.append((tmp_path / "checkpoints/sdn/run.json").read_text())
    assert texts[0] == texts[1] and '"figsize": 2' in texts[0]


def test_a_halving_learning_rate_is_refused_while_beta_rises():
    with pytest.raises(ConfigError, match="--lrate_patience needs --beta_rate 1"):
        TrainConfig(lrate_patience=2, beta_rate=0.1).validate()


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_never_stopping(tmp_path, images, workers):
    """3 epochs at once, and 1 epoch followed by 2 more: the same steps, learning rates, weights and
    average."""
    common = [
        *TINY,
        "--root",
        images,
        "--make_checkpoint",
        "--output_dir",
        tmp_path,
        "--lrate_decay",
        0.5,
    ]
    common += ["--num_workers", workers]
    assert run("train.py", *common, "--exp_name", "whole", "--max_epochs", 3).returncode == 0
    assert run("train.py", *common, "--exp_name", "parts", "--max_epochs", 1).returncode == 0
    done = run("train.py", *common, "--exp_name", "parts", "--max_epochs", 3, "--use_checkpoint")
    assert done.returncode == 0, done.stderr
    assert "--max_epochs is now 3, was 1" in done.stderr
    whole, parts = (tmp_path / "checkpoints" / name for name in ("whole", "parts"))
    for file in ("steps.csv", "epochs.csv"):
        columns = ("step", "epoch", "lr", "neg_elbo" if file == "steps.csv" else "val_neg_elbo")
        a, b = (
            [[row[c] for c in columns] for row in csv_rows(folder / file)]
            for folder in (whole, parts)
        )
        assert a == b, file
    a, b = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (whole, parts))
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_resumed_run_takes_the_learning_rate_of_its_flags(tmp_path, images):
    common = [
        *TINY,
        "--root",
        images,
        "--make_checkpoint",
        "--output_dir",
        tmp_path,
        "--lrate_decay",
        0.5,
    ]
    assert run("train.py", *common, "--max_epochs", 1).returncode == 0
    done = run("train.py", *common, "--max_epochs", 3, "--use_checkpoint", "--lrate", 0.001)
    assert done.returncode == 0, done.stderr
    assert "--lrate is now 0.001, was 0.002" in done.stderr
    rates = [float(row["lr"]) for row in csv_rows(tmp_path / "checkpoints/sdn/steps.csv")]
    assert rates == [0.002] * 8 + [0.0005] * 8 + [0.00025] * 8


def test_two_processes_train_together(tmp_path, images):
    done = run(
        "train.py", *TINY, "--root", images, "--exp_name", "pair", "--iters", 4,
        "--num_processes", 2,
        "--make_checkpoint", "--output_dir", tmp_path, "--accumulate_grad_batches", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "checkpoints/pair"
    assert [int(row["step"]) for row in csv_rows(folder / "steps.csv")] == [1, 2, 3, 4]
    last = ["--checkpoint", folder / "last.ckpt", "--seed", 1234]
    alone = run("evaluate.py", *last, "--elbo", "--output_dir", tmp_path)
    assert alone.returncode == 0, alone.stderr
    mean = float(re.search(r"-ELBO: ([\d.]+)", alone.stdout)[1])
    assert float(csv_rows(folder / "epochs.csv")[-1]["val_neg_elbo"]) == pytest.approx(
        mean, abs=1e-4
    ), "validation over two ranks counts every image once"


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp"],
        ["--precision", "bf16-mixed"],
        ["--precision", "64-true"],
        ["--sdn_max_scale", "0"],
        ["--obs_model", "DL", "--nbits", "5"],
        ["--post_model", "IAF", "--accumulate_grad_batches", "2"],
        ["--analytic_kl", "--backend", "reference", "--border", "keep"],
        ["--ds_list", "--profiler_mode"],
        [
            "--num_workers",
            "2",
            "--check_val_every_n_epoch",
            "5",
            "--max_epochs",
            "1",
            "--batch",
            "16",
        ],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_options_run(flags, tmp_path, images):
    done = run("train.py", *TINY, "--root", images, "--iters", 2, "--output_dir", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "no weights of this run are kept" in done.stderr
    assert not list(tmp_path.rglob("*.ckpt"))
    assert math.isfinite(
        float(csv_rows(tmp_path / "checkpoints/sdn/epochs.csv")[-1]["val_neg_elbo"])
    )
    if "--amp" in flags:
        assert "training runs in bf16-mixed" in done.stderr
    if "--profiler_mode" in flags:
        assert "run_training_batch" in done.stderr
        assert "--profiler_mode: 2 batches are too few" in done.stderr


def test_a_profile_of_steps(tmp_path, images):
    done = run(
        "train.py",
        *TINY,
        "--root",
        images,
        "--iters",
        7,
        "--output_dir",
        tmp_path,
        "--profiler_mode",
    )
    assert done.returncode == 0, done.stderr
    table = done.stderr[done.stderr.index("3 batches on cpu:") :].splitlines()
    names = [line.split()[0] for line in table[2:14]]
    assert "sdn::sweep_backward_v1" in names and any(name.startswith("aten::") for name in names)
    shares = [float(line.split()[-1]) for line in table[2:14]]
    assert shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 100.1
    allocated = table.index(next(line for line in table if line.startswith("allocates more")))
    assert float(table[allocated + 1].split()[-1]) > 0
    assert any(re.fullmatch(r"peak memory of this process so far: \d+ MiB", line) for line in table)


WRONG_FLAGS = [
    (["--hsize", "3"], "unrecognized arguments: --hsize"),
    (["--depth", "two"], "argument --depth: invalid int value: 'two'"),
    (["--depth", "0"], "--depth must be at least 1; got 0"),
    (["--ds_list", "2", "7"], "--ds_list entries must lie in 0 ... 1 (--depth 2); got [2, 7]"),
    (["--sdn_num_dirs", "5"], "--sdn_num_dirs must be at most 4; got 5"),
    (["--sdn_num_dirs", "0"], "or --sdn_max_scale 0 (no SDN)"),
    (["--sdn_min_scale", "64"], "--sdn_min_scale 64 is above --sdn_max_scale 32"),
    (["--nbits", "9"], "--nbits must be 1 to 8; got 9"),
    (["--lrate", "0"], "--lrate must be above 0"),
    (["--lrate_decay", "1.5"], "--lrate_decay must be above 0 and at most 1"),
    (["--ema_coef", "1"], "--ema_coef must be at least 0 and below 1"),
    (["--obs_model", "MSE"], "argument --obs_model: invalid choice: 'MSE'"),
    (["--amp", "--precision", "32-true"], "--amp and --precision exclude each other"),
    (["--analytic_kl", "--post_model", "IAF"], "--analytic_kl needs --post_model IsoGaussian"),
    (["--exp_name", "a/b"], "--exp_name must be a plain folder name; got a/b"),
    (
        ["--dataset", "MNIST"],
        "--dataset must be one of 3DShapes, CelebAHQ256, CIFAR10, Digits8, ImageNet32, Photos32, ",
    ),
    (["--gpus", "99"], "--gpus 99: this machine has"),
    (["--num_processes", "2", "--gpus", "1"], "--num_processes is for the CPU"),
    (["--task", "classification"], "argument --task: invalid choice: 'classification'"),
    (
        ["--task", "disentanglement"],
        "--depth, --ds_list, --downsample_first, --h_size: without effect on --task",
    ),
    (["--lrate", "inf"], "--lrate must be a finite number; got inf"),
    (
        ["--depth", "9", "--ds_list", "1", "2", "3", "4", "5", "--z_size", "0"],
        "--z_size must be at least 1",
    ),
]


@pytest.mark.parametrize(
    ("flags", "message"), WRONG_FLAGS, ids=[" ".join(flags) for flags, _ in WRONG_FLAGS]
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--output_dir", str(tmp_path), *flags])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: error: ") and message in line
    assert not list(tmp_path.iterdir()), "nothing is touched before the flags are right"


def test_missing_data_say_which_command_gets_them(tmp_path):
    for name, command in (
        ("ImageNet32", "get_imagenet_data.sh"),
        ("CelebAHQ256", "get_celeb_data.sh"),
    ):
        done = run(
            "train.py", *TINY, "--dataset", name, "--root", tmp_path, "--output_dir", tmp_path
        )
        assert_one_line_error(done, "train.py: error: ", command)


def test_an_experiment_is_neither_overwritten_nor_mixed_up(finished, images):
    before = (finished / "checkpoints/tiny/last.ckpt").read_bytes()
    again = [*TINY, "--root", images, "--exp_name", "tiny", "--output_dir", finished]
    done = run("train.py", *again, "--make_checkpoint")
    assert_one_line_error(done, "holds a run already", "--use_checkpoint", "--exp_name")
    for flags, message in (
        (["--h_size", 16], "is of another model: --h_size 16 (there 8)"),
        (["--dataset", "Photos32"], "--dataset Photos32 (there ImageNet32)"),
    ):
        other = run("train.py", *again, "--use_checkpoint", *flags)
        assert_one_line_error(other, message, "--exp_name")
    assert (finished / "checkpoints/tiny/last.ckpt").read_bytes() == before


def test_a_run_goes_on_from_the_best_checkpoint_if_it_is_the_only_one(finished, images, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints/tiny"
    for path in (folder / "last.ckpt", *step_checkpoints(folder)):
        path.unlink()
    done = run("train.py", *resumable(images, tmp_path, "--exp_name", "tiny", "--iters", 8))
    assert done.returncode == 0 and "starts anew" not in done.stderr, done.stderr
    assert [int(row["step"]) for row in csv_rows(folder / "steps.csv")] == list(range(1, 9))
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 8


def test_logs_of_a_run_without_a_checkpoint_are_not_overwritten(tmp_path, images):
    """Whether or not that run is asked to go on; the same run before its first checkpoint is."""
    once = [*TINY, "--root", images, "--iters", 1, "--output_dir", tmp_path]
    assert run("train.py", *once).returncode == 0
    steps, description = (
        tmp_path / f"checkpoints/sdn/{name}" for name in ("steps.csv", "run.json")
    )
    before = steps.read_bytes(), description.read_bytes()
    assert_one_line_error(run("train.py", *once), "holds a run already")
    for flags in ([], ["--random_seed", 7], ["--make_checkpoint", "--h_size", 16]):
        done = run("train.py", *once, "--use_checkpoint", *flags)
        assert_one_line_error(done, "holds the logs of a run without a checkpoint", "--exp_name")
    assert (steps.read_bytes(), description.read_bytes()) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, images):
    flags = resumable(images, tmp_path, "--iters", 2)
    assert run("train.py", *flags).returncode == 0
    folder = tmp_path / "checkpoints/sdn"
    rows = [row["neg_elbo"] for row in csv_rows(folder / "steps.csv")]
    for path in folder.glob("*.ckpt"):
        path.unlink()
    done = run("train.py", *flags)
    assert done.returncode == 0 and "so this run starts anew" in done.stderr, done.stderr
    assert [row["neg_elbo"] for row in csv_rows(folder / "steps.csv")] == rows


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_data_are_one_line_from_workers_too(tmp_path, workers):
    lmdb = pytest.importorskip("lmdb")
    for split in ("train", "validation"):
        (tmp_path / "ImageNet32").mkdir(exist_ok=True)
        environment = lmdb.open(str(tmp_path / f"ImageNet32/{split}.lmdb"), map_size=2**20)
        with environment, environment.begin(write=True) as transaction:
            for index in range(8):
                transaction.put(str(index).encode(), bytes(3072 if index != 2 else 7))
    done = run(
        "train.py", *TINY, "--root", tmp_path, "--output_dir", tmp_path, "--num_workers", workers
    )
    assert_one_line_error(done, "train.py: error: ", "image 2 has 7 bytes", "get_imagenet_data.sh")


def test_too_few_images_are_one_line(tmp_path, images):
    done = run(
        "train.py",
        *TINY,
        "--root",
        images,
        "--output_dir",
        tmp_path,
        "--batch",
        17,
        "--num_processes",
        2,
    )
    assert_one_line_error(
        done, "32 training images", "each of 2 processes: use a batch of at most 16"
    )
    assert done.stderr.count("error:") == 1


def test_a_damaged_checkpoint_is_not_resumed(finished, tmp_path, images):
    folder = tmp_path / "checkpoints/tiny"
    folder.mkdir(parents=True)
    whole = (finished / "checkpoints/tiny/last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    flags = ["--root", images, "--exp_name", "tiny", "--output_dir", tmp_path, "--use_checkpoint"]
    done = run("train.py", *TINY, *flags)
    assert_one_line_error(done, "last.ckpt is not a checkpoint, or is cut off")


def test_use_checkpoint_without_a_checkpoint_starts_anew(tmp_path, images):
    flags = ["--root", images, "--iters", 1, "--output_dir", tmp_path, "--use_checkpoint"]
    done = run("train.py", *TINY, *flags)
    assert done.returncode == 0, done.stderr
    assert "so this run starts anew" in done.stderr


def test_help_groups_the_flags_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in text
        assert f"{field.metadata['group']}:" in text
    assert "(default: 0.002; disentanglement: 0.001)" in " ".join(text.split())


def test_documented_table_of_flags_matches_the_parser():
    page = (REPOSITORY / "docs/training.md").read_text()
    assert flag_table() in page, (
        'paste what `python -c "from lib.flags import flag_table; print(flag_table())"` prints'
    )


def test_config_survives_a_checkpoint():
    config = TrainConfig(ds_list=[1], depth=2, gpus=None)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown fields: old"):
        TrainConfig.from_dict(config.to_dict() | {"old": 1})
