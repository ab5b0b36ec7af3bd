"""train_3dshapes.sh: every run is trained and evaluated once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPOSITORY, csv_rows, run

from experiments import disentanglement
from experiments.naming import Run
from lib.checkpoint import read_checkpoint
from lib.files import LOCK, locked

SMALL = (
    "--name few --dataset Shapes3DRendered --batch 4 --z_size 2 --sdn_nfeat_0 3 --epoch_images 16 "
    "--val_images 4 --iters 8 --num_workers 0 --gpus 0 --logger none --figsize 2 --limit 4 "
    "--levels 2 2 2 2 2 2 --metrics mig"
).split()
TWO = ["--betas", "4", "--seeds", "3"]


def steps(folder: Path, name: str) -> list[int]:
    return [int(row["step"]) for row in csv_rows(folder / f"checkpoints/{name}/steps.csv")]


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    done = run("-m experiments.disentanglement", *SMALL, *TWO, "--jobs", 2, "--output_dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_all_runs_are_trained_evaluated_and_gathered(carried_out):
    folder, done = carried_out
    for decoder, parts in (("cnn", 0), ("sdn", 3)):
        name = f"few_{decoder}_beta4_seed3"
        assert steps(folder, name) == list(range(1, 9))
        config = read_checkpoint(folder / f"checkpoints/{name}/last.ckpt")["hyper_parameters"]
        assert (config["beta_final"], config["random_seed"], config["z_size"]) == (4, 3, 2)
        assert config["beta_rate"] == 0.375, "beta rises over the first third of the iterations"
        weights = read_checkpoint(folder / f"checkpoints/{name}/last.ckpt")["state_dict"]
        sweeps = [weight for key, weight in weights.items() if key.endswith("weight_hh")]
        assert [weight.shape[1] for weight in sweeps] == [parts] * bool(parts)
        results = json.loads((folder / f"figs/{name}/results.json").read_text())
        assert results["elbo"]["step"] == results["disentanglement"]["step"] == 8
        assert results["elbo"]["images"] == 4 and list(results["disentanglement"]["scores"]) == [
            "mig"
        ]
        assert re.search(
            rf"\[[12]/2\] {name}: trained in .* min, -ELBO \d+ nats, mig [\d.]+\n", done.stdout
        )
    assert len(csv_rows(folder / "figs/few/runs.csv")) == 2
    assert {"figure7.png", "figure12.png", "table.csv"} <= {
        path.name for path in (folder / "figs/few").iterdir()
    }


def test_what_is_finished_is_skipped(carried_out):
    folder, _ = carried_out
    files = {path: path.read_bytes() for path in folder.rglob("*.ckpt")}
    again = run("-m experiments.disentanglement", *SMALL, *TWO, "--output_dir", folder)
    assert again.returncode == 0, again.stderr
    assert "2 of 2 runs are finished already" in again.stdout and "trained" not in again.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*.ckpt")} == files


def test_more_metrics_do_not_train_again(carried_out):
    folder, _ = carried_out
    log = folder / "checkpoints/few_cnn_beta4_seed3/log.txt"
    flags = [*SMALL, "sap", "--betas", 4, "--seeds", 3, "--decoders", "cnn"]
    done = run("-m experiments.disentanglement", *flags, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"\[1/1\] few_cnn_beta4_seed3: -ELBO \d+ nats, mig [\d.]+, sap [\d.]+\n", done.stdout
    )
    commands = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("$ ")]
    assert commands == ["train.py", "evaluate.py", "evaluate.py"]


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on(tmp_path):
    """SIGTERM after the first checkpoint: its children end too, and the runs end as if nothing had
    been."""
    flags = [
        *SMALL,
        *TWO,
        "--decoders",
        "cnn",
        "--output_dir",
        str(tmp_path),
        "--beta_rate",
        "0.1",
        "--iters",
        "400",
    ]
    command = [sys.executable, "-m", "experiments.disentanglement", *flags]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    last = tmp_path / "checkpoints/few_cnn_beta4_seed3/last.ckpt"
    until = time.monotonic() + 300
    while not last.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted: the same command goes on" in errors, errors
    assert "Traceback" not in errors
    stopped = read_checkpoint(last)["global_step"]
    assert 4 <= stopped < 400
    size = last.stat().st_mtime_ns
    time.sleep(1)
    assert last.stat().st_mtime_ns == size, "no child trains on"

    flags[flags.index("400")] = str(stopped + 4)
    done = run("-m experiments.disentanglement", *flags)
    assert done.returncode == 0, done.stderr
    assert f"trained from step {stopped} in" in done.stdout
    rows = csv_rows(tmp_path / "checkpoints/few_cnn_beta4_seed3/steps.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, stopped + 5))
    assert [float(row["beta"]) for row in rows] == pytest.approx(
        [min(4, 0.4 * step) for step in range(stopped + 4)]
    )


def test_runs_of_other_settings_are_not_mixed_in(carried_out, capfd):
    folder, _ = carried_out
    for flags, told in (
        (
            ["--batch", "8"],
            "was trained with --batch 4 (now 8): give these to go on, or another --name",
        ),
        (["--iters", "60"], "was trained with --beta_rate 0.375 (now 0.05)"),
        (
            ["--obs_model", "DML", "--nbits", "5"],
            "was trained with --obs_model DL (now DML), --nbits 8 (now 5)",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            disentanglement.main([*SMALL, *TWO, "--output_dir", str(folder), *flags])
        assert stop.value.code == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert "_beta4_seed3/last.ckpt" in line and told in line


def test_what_counts_as_finished(carried_out, tmp_path):
    """Not the results of weights that are gone, and not an ELBO and scores of different weights."""
    folder, _ = carried_out
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    flags, train_flags = disentanglement.make_parser().parse_known_args(
        [*SMALL, *TWO, "--output_dir", str(copy)]
    )
    experiment = disentanglement.prepare(flags, train_flags)
    cnn, sdn = experiment.runs
    assert all(disentanglement.is_evaluated(experiment, run) for run in (cnn, sdn))
    experiment.weights(cnn).unlink()
    assert not disentanglement.is_evaluated(experiment, cnn)
    path = copy / "figs" / sdn.folder / "results.json"
    results = json.loads(path.read_text())
    results["elbo"]["weights"] = "0" * 12
    path.write_text(json.dumps(results))
    assert not disentanglement.is_evaluated(experiment, sdn)


@pytest.mark.parametrize("lock", [disentanglement.LOCK, LOCK])
def test_a_run_of_another_process_is_left_to_it(lock, tmp_path, capfd):
    """Of another experiment, or of a train.py whose experiment was killed."""
    folder = tmp_path / "checkpoints/few_cnn_beta4_seed3"
    folder.mkdir(parents=True)
    flags, train_flags = disentanglement.make_parser().parse_known_args(
        [*SMALL, *TWO, "--decoders", "cnn", "--output_dir", str(tmp_path)]
    )
    with locked(folder / lock, ""):
        assert disentanglement.carry_out(disentanglement.prepare(flags, train_flags), 1) == [], (
            "that is no failure"
        )
    assert (
        "[0/1] few_cnn_beta4_seed3: left to another process, which is at it"
        in capfd.readouterr().out
    )
    assert list(folder.iterdir()) == []


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    broken = tmp_path / "checkpoints/few_cnn_beta4_seed3"
    broken.mkdir(parents=True)
    (broken / "last.ckpt").write_bytes(b"not a checkpoint")
    done = run("-m experiments.disentanglement", *SMALL, *TWO, "--output_dir", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "train_3dshapes.sh: error: 1 runs failed: few_cnn_beta4_seed3" in done.stderr
    assert re.search(r"few_cnn_beta4_seed3: failed: .*last.ckpt is not a checkpoint", done.stdout)
    assert "few_sdn_beta4_seed3: trained in" in done.stdout
    assert (broken / "last.ckpt").read_bytes() == b"not a checkpoint"


WRONG = [
    (["--beta_final", "3"], "--beta_final is set by the experiment: use --betas"),
    (["--exp_name", "x"], "--exp_name is set by the experiment: use --name"),
    (["--sdn_max_scale", "0"], "--sdn_max_scale is set by the experiment: use --decoders"),
    (["--iterations", "3"], "unrecognized arguments: --iterations"),
    (["--depth", "3"], "--depth: without effect on --task disentanglement"),
    (["--betas", "-1"], "beta is finite, not negative"),
    (["--betas", "nan"], "beta is finite, not negative"),
    (["--jobs", "0"], "--jobs must be at least 1; got 0"),
    (["--limit", "0"], "--limit must be at least 1; got 0"),
    (["--beta_rate", "2"], "--beta_rate must be above 0 and at most 1"),
    (["--levels", "2", "2"], "--levels must be 6 numbers from 2 to"),
    (
        ["--dataset", "Photos32"],
        "--dataset Photos32 has no factors: use 3DShapes or Shapes3DRendered",
    ),
    (["--name", "a/b"], "an experiment's name is not empty and has no slash"),
    (
        ["--epoch_images", "3"],
        "--epoch_images gives an epoch 3 training images, fewer than one batch of 4",
    ),
    (["--seeds", "99999999999"], "--random_seed must be below 2^32"),
    (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x: Not a directory"),
    (["--decoders", "mlp"], "argument --decoders: invalid choice: 'mlp'"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_wrong_flags_are_one_line(flags, message, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        disentanglement.main([*SMALL, "--output_dir", str(tmp_path), *flags])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.match(r"train(_3dshapes.sh|\.py): error: ", line) and message in line
    assert not list(tmp_path.iterdir())


def test_missing_data_are_said_before_the_first_run(tmp_path, capfd):
    flags = [
        *SMALL,
        "--dataset",
        "3DShapes",
        "--root",
        str(tmp_path / "none"),
        "--output_dir",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit) as stop:
        disentanglement.main(flags)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "get_3dshapes_data.sh" in line
    assert not (tmp_path / "checkpoints").exists()


def test_runs_share_the_hardware(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = [
        disentanglement.environment(slot, 3, gpus=2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)
    ]
    assert given == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert disentanglement.environment(1, 3, gpus=2) == {"CUDA_VISIBLE_DEVICES": "7"}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert disentanglement.environment(0, 3, gpus=0) == {"OMP_NUM_THREADS": "2"}
    assert (
        disentanglement.environment(0, 1, gpus=0) == disentanglement.environment(0, 3, gpus=1) == {}
    )


def test_finished_seeds_can_be_compared_early(tmp_path):
    flags = disentanglement.make_parser().parse_args(
        ["--betas", "1", "9", "--seeds", "0", "1", "1"]
    )
    experiment = disentanglement.prepare(
        flags, ["--gpus", "0", "--dataset", "Shapes3DRendered", "--output_dir", str(tmp_path)]
    )
    assert experiment.runs == [
        Run("3dshapes", decoder, beta, seed)
        for seed in (0, 1)
        for beta in (1.0, 9.0)
        for decoder in ("cnn", "sdn")
    ]
    assert experiment.train_flags[-2:] == ["--beta_rate", "1e-05"], (
        "the paper's warm-up of 100,000 steps"
    )
    assert experiment.config.iters == 300_000
