"""train_3dshapes.sh: every run is trained and evaluated once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, csv_rows, run

from experiments import disentanglement
from experiments.naming import Run
from lib.checkpoint import read_checkpoint

SMALL = (
    "--name few --dataset Shapes3DRendered --batch 4 --z_size 2 --sdn_nfeat_0 3 --epoch_images 16 --val_images 4 "
    "--iters 8 --num_workers 0 --gpus 0 --logger none --figsize 2 --limit 4 --levels 2 2 2 2 2 2 --metrics mig"
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
        assert results["elbo"]["images"] == 4 and list(results["disentanglement"]["scores"]) == ["mig"]
        assert re.search(rf"\[[12]/2\] {name}: trained in .* min, -ELBO \d+ nats, mig [\d.]+\n", done.stdout)
    assert len(csv_rows(folder / "figs/few/runs.csv")) == 2
    assert {"figure7.png", "figure12.png", "table.csv"} <= {path.name for path in (folder / "figs/few").iterdir()}


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
    assert re.search(r"\[1/1\] few_cnn_beta4_seed3: -ELBO \d+ nats, mig [\d.]+, sap [\d.]+\n", done.stdout)
    commands = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("$ ")]
    assert commands == ["train.py", "evaluate.py", "evaluate.py"]


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on(tmp_path):
    """SIGTERM after the first checkpoint: its children end too, and the runs end as if nothing had been."""
    flags = [*SMALL, *TWO, "--decoders", "cnn", "--output_dir", str(tmp_path), "--iters", "400"]
    command = [sys.executable, "-m", "experiments.disentanglement", *flags]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
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
    assert steps(tmp_path, "few_cnn_beta4_seed3") == list(range(1, stopped + 5))


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
    (["--dataset", "Photos32"], "--dataset Photos32 has no factors: use 3DShapes or Shapes3DRendered"),
    (["--name", "a/b"], "an experiment's name is not empty and has no slash"),
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
    flags = [*SMALL, "--dataset", "3DShapes", "--root", str(tmp_path / "none"), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        disentanglement.main(flags)
    assert "get_3dshapes_data.sh" in capfd.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_runs_share_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = [disentanglement.environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert given == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert disentanglement.environment(1, 3) == {"CUDA_VISIBLE_DEVICES": "7"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert disentanglement.environment(0, 3) == {"OMP_NUM_THREADS": "2"}
    assert disentanglement.environment(0, 1) == {}


def test_finished_seeds_can_be_compared_early(monkeypatch):
    flags = disentanglement.make_parser().parse_args(["--betas", "1", "9", "--seeds", "0", "1", "1"])
    monkeypatch.setattr(disentanglement, "get_dataset", lambda *given: disentanglement_scenes())
    experiment = disentanglement.prepare(flags, ["--gpus", "0"])
    assert experiment.runs == [
        Run("3dshapes", decoder, beta, seed) for seed in (0, 1) for beta in (1.0, 9.0) for decoder in ("cnn", "sdn")
    ]
    assert experiment.train_flags[-2:] == ["--beta_rate", "1e-05"], "the paper's warm-up of 100,000 steps"
    assert experiment.config.dataset == "3DShapes" and experiment.config.iters == 300_000


def disentanglement_scenes():
    from data.shapes3d import Scenes

    return Scenes("validation")
