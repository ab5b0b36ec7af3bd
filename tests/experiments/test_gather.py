"""Gathering runs: found by their files, seeds together, comparisons at equal steps and equal
time."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPOSITORY, TINY, assert_one_line_error, csv_rows, run
from PIL import Image

from experiments import claims, gather
from lib.config import TrainConfig


def write_run(
    folder, curve, *, seconds=60.0, parameters=1000, commit="a" * 40, neg_log_p=None, **flags
):
    """The files of a run with validations every 100 steps."""
    folder.mkdir(parents=True)
    config = TrainConfig.for_task(exp_name=folder.name, **flags).to_dict()
    text = json.dumps(
        {"parameters": parameters, "config": config, "commits": [commit], "provenance": {}}
    )
    (folder / "run.json").write_text(text)
    with (folder / "epochs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "epoch", "val_neg_elbo", "seconds"])
        writer.writeheader()
        rows = enumerate(curve, start=1)
        times = {"seconds": seconds}
        writer.writerows(
            {"step": 100 * i, "epoch": i - 1, "val_neg_elbo": value} | times for i, value in rows
        )
    if neg_log_p is not None:
        results = folder.parent.parent / "figs" / folder.name / "results.json"
        results.parent.mkdir(parents=True)
        results.write_text(json.dumps({"likelihood": {"bits_per_dim": neg_log_p}}))


@pytest.fixture
def runs(tmp_path):
    """Two seeds of an SDN-VAE, of which one ends with a worse value than its best, and a baseline
    that is at work."""
    folder = tmp_path / "checkpoints"
    common = dict(dataset="Photos32", iters=300)
    write_run(folder / "sdn_seed0", [6.0, 5.0, 4.0], random_seed=0, neg_log_p=3.9, **common)
    write_run(
        folder / "sdn_seed1",
        [6.5, 4.2, 4.5],
        random_seed=1,
        num_workers=7,
        commit="b" * 40,
        **common,
    )
    write_run(
        folder / "cnn_seed0",
        [7.0, 6.0],
        seconds=30,
        parameters=10,
        random_seed=0,
        sdn_max_scale=0,
        **common,
    )
    return folder


def test_seeds_are_one_row_with_mean_and_deviation(runs, tmp_path, capsys):
    more = ["--reach", 5, 1, "--at_steps", 200, "--at_minutes", 1]
    gather.main(list(map(str, [runs, "--output", tmp_path / "out", *more])))
    cnn, sdn = csv_rows(tmp_path / "out/table.csv")
    assert (sdn["name"], sdn["kind"]) == ("sdn", "SDN, 2 directions, scales up to 32") and cnn[
        "kind"
    ] == "IAF-VAE+"
    assert (sdn["seeds"], sdn["finished"], cnn["finished"], cnn["parameters"]) == (
        "2",
        "2",
        "0",
        "10",
    )
    assert float(sdn["neg_elbo_mean"]) == pytest.approx(4.1), "of the best validations, 4.0 and 4.2"
    assert float(sdn["neg_elbo_std"]) == pytest.approx(0.2 / 2**0.5) and cnn["neg_elbo_std"] == ""
    assert float(sdn["hours_mean"]) == pytest.approx(0.05)
    assert (sdn["steps_to_5_mean"], sdn["steps_to_1_mean"], cnn["steps_to_5_mean"]) == (
        "200.0",
        "",
        "",
    )
    assert float(sdn["neg_elbo_at_200_steps_mean"]) == pytest.approx(4.6)
    assert (float(sdn["neg_elbo_at_1_minutes_mean"]), float(cnn["neg_elbo_at_1_minutes_mean"])) == (
        6.25,
        6.0,
    )
    out = capsys.readouterr()
    assert (
        "| 4.100 ± 0.141 |" in out.out
        and "| 3.900 (1 of 2) |" in out.out
        and "1 (0 finished)" in out.out
    )
    assert "differ in commit" in out.err and (tmp_path / "out/table.md").read_text() in out.out
    by_run = {row["run"]: row for row in csv_rows(tmp_path / "out/runs.csv")}
    assert (
        by_run["sdn_seed1"]["best_step"] == "200" and by_run["cnn_seed0"]["state"] == "not finished"
    )
    assert Image.open(tmp_path / "out/curves_density_estimation_Photos32.png").width > 1000


def test_what_cannot_be_told_is_left_out_and_named(runs, tmp_path, capsys):
    (runs / "cnn_seed0/run.json").write_text("{")
    (runs / "sdn_seed1/epochs.csv").write_text("step,epoch,val_neg_elbo,seconds\n")
    (runs / "sdn_seed0/epochs.csv").open("a").write("400,3.")  # cut off by a kill
    gather.main([str(runs), "--output", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert (
        "cnn_seed0 is left out: damaged" in errors
        and "sdn_seed1 is left out: no validation yet" in errors
    )
    (row,) = csv_rows(tmp_path / "out/runs.csv")
    assert row["run"] == "sdn_seed0" and row["steps"] == "300"


def test_other_settings_are_another_row(runs, tmp_path):
    write_run(runs / "sdn_seed2", [6.0], random_seed=2, dataset="Photos32", iters=300, lrate=0.1)
    gather.main([str(runs), "--output", str(tmp_path / "out")])
    assert [row["seeds"] for row in csv_rows(tmp_path / "out/table.csv")] == ["1", "2", "1"]


@pytest.mark.parametrize("what", ["nothing", "no folder"])
def test_no_runs_are_one_line(what, tmp_path):
    folder = tmp_path if what == "nothing" else tmp_path / "none"
    done = run("-m experiments.gather", folder, "--output", tmp_path / "out", cwd=REPOSITORY)
    assert_one_line_error(done, "there are no runs of train.py in", "run.json")
    assert not (tmp_path / "out").exists()


def test_a_beta_vae_is_told_from_a_density_model():
    flags = dict(task="disentanglement", beta_final=32.0)
    assert gather.describe(TrainConfig.for_task(**flags)) == "β 32, SDN, 1 direction"
    assert gather.describe(TrainConfig.for_task(**flags, sdn_max_scale=0)) == "β 32, CNN"
    conv5 = TrainConfig.for_task(block="conv5", highway="on", sdn_max_scale=16)
    assert gather.describe(conv5) == "conv5 with highway, scales up to 16"


def test_a_real_run_is_found_and_goes_on_in_the_same_row(images, tmp_path):
    flags = [
        *TINY,
        "--root",
        images,
        "--output_dir",
        tmp_path,
        "--make_checkpoint",
        "--use_checkpoint",
    ]
    for iters in (2, 4):
        done = run("train.py", *flags, "--exp_name", "tiny_seed1234", "--iters", iters)
        assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "checkpoints/tiny_seed1234/run.json").read_text())
    assert (
        described["config"]["iters"] == 4
        and len(described["commits"]) == 1
        and described["parameters"] > 1000
    )
    done = run("-m experiments.gather", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (row,) = csv_rows(tmp_path / "out/runs.csv")
    assert (row["run"], row["state"], row["steps"]) == ("tiny_seed1234", "finished", "4")
    assert float(row["neg_elbo"]) > 0 and int(row["parameters"]) == described["parameters"]


def test_claims_are_judged_by_two_standard_errors(tmp_path, capsys):
    folder, common = tmp_path / "checkpoints", dict(dataset="Photos32", iters=100)
    values = {
        "low": (4.0, 4.1, 4.2),
        "near": (4.2, 4.3, 4.1),
        "high": (5.0, 5.1, 5.2),
        "single": (9.0,),
    }
    for name, of in values.items():
        for seed, value in enumerate(of):
            write_run(folder / f"{name}_seed{seed}", [value], random_seed=seed, **common)
    claims = [("low", "high"), ("high", "low"), ("low", "near"), ("low", "single")]
    flags = [text for claim in claims for text in ("--claim", *claim)]
    gather.main([str(folder), "--output", str(tmp_path / "out"), *flags])
    text = (tmp_path / "out/claims.md").read_text()
    assert text in capsys.readouterr().out
    for row in (  # the standard error: sqrt(2 * 0.1^2 / 3)
        "| low | high | -1.000 | 0.082 | <0.01 | holds |",
        "| high | low | +1.000 | 0.082 | <0.01 | refuted |",
        "| low | near | -0.100 | 0.082 | 0.29 | open |",
        "| low | single | -4.900 | - | - | open: it needs two seeds of each |",
    ):
        assert row in text


@pytest.mark.parametrize(("seeds", "rate"), [(3, 0.058), (5, 0.041), (10, 0.031)])
def test_the_rule_errs_as_often_as_it_is_said(seeds, rate):
    """Both arms have the same distribution: each way so many claims are judged wrongly."""
    values = np.random.default_rng(0).standard_normal((40_000, 2, seeds))
    differences = np.subtract(*values.mean(2).T)
    errors = np.sqrt(values.var(2, ddof=1).sum(1) / seeds)
    verdicts = [claims.verdict(*each) for each in zip(differences, errors, strict=True)]
    for wrong in ("holds", "refuted"):
        assert verdicts.count(wrong) / len(verdicts) == pytest.approx(rate, abs=0.004)


def test_what_changes_results_makes_another_row_and_what_does_not_does_not(tmp_path, capsys):
    common = dict(dataset="Photos32", iters=100)
    variants = [
        dict(),
        dict(gpus=2, batch=16),
        dict(gpus=8),
        dict(precision="bf16-mixed"),
        dict(grad_clip=1.0),
    ]
    for seed, flags in enumerate(variants):
        write_run(
            tmp_path / f"runs/x_seed{seed}", [4.0 + seed], random_seed=seed, **common, **flags
        )
    write_run(tmp_path / "copy/x_seed0", [4.0], random_seed=0, **common)
    gather.main([str(tmp_path), "--output", str(tmp_path / "out")])
    rows = csv_rows(tmp_path / "out/table.csv")
    assert [(row["seeds"], float(row["neg_elbo_mean"])) for row in rows] == [
        ("2", 4.5),
        ("1", 6),
        ("1", 7),
        ("1", 8),
    ]
    assert (
        "runs/x_seed0 is left out" in (errors := capsys.readouterr().err)
        and "copy/x_seed0 is the same run" in errors
    )


def test_a_likelihood_of_other_weights_is_left_out(runs, tmp_path, capsys):
    results = tmp_path / "figs/sdn_seed0/results.json"
    results.write_text(json.dumps({"likelihood": {"bits_per_dim": 3.9, "step": 100, "images": 64}}))
    gather.main([str(runs), "--output", str(tmp_path / "out")])
    assert all(row["neg_log_p"] == "" for row in csv_rows(tmp_path / "out/runs.csv"))
    assert "-log p(x) of" in (errors := capsys.readouterr().err) and "it is of step 100" in errors


def test_a_run_of_all_its_epochs_is_finished(tmp_path):
    write_run(tmp_path / "a", [4.0, 3.0], dataset="Photos32", max_epochs=2)
    write_run(tmp_path / "b", [4.0, 3.0], dataset="Photos32", max_epochs=3)
    gather.main([str(tmp_path), "--output", str(tmp_path / "out")])
    assert [row["state"] for row in csv_rows(tmp_path / "out/runs.csv")] == [
        "finished",
        "not finished",
    ]


def test_data_of_both_tasks_have_curves_of_their_own(tmp_path):
    for task in ("density_estimation", "disentanglement"):
        write_run(tmp_path / task, [4.0, 3.0], task=task, dataset="Shapes3DRendered", iters=200)
    gather.main([str(tmp_path), "--output", str(tmp_path / "out")])
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == [
        f"curves_{task}_Shapes3DRendered.png" for task in ("density_estimation", "disentanglement")
    ]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("run.json", '"density_estimation"', '"no task"'),
        ("epochs.csv", "200,", "nan,"),
        ("epochs.csv", "60.0", "inf"),
    ],
)
def test_nonsense_in_a_file_leaves_its_run_out(runs, tmp_path, capsys, file, old, new):
    path = runs / "sdn_seed0" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    gather.main([str(runs), "--output", str(tmp_path / "out")])
    assert "sdn_seed0 is left out: damaged" in capsys.readouterr().err


def test_a_claim_without_a_finite_value_is_one_line(tmp_path, capsys):
    for name in ("good", "bad"):
        write_run(
            tmp_path / name, [4.0 if name == "good" else math.nan], dataset="Photos32", iters=100
        )
    with pytest.raises(SystemExit) as ended:
        gather.main([str(tmp_path), "--output", str(tmp_path / "out"), "--claim", "good", "bad"])
    assert ended.value.code == 2 and "no -ELBO of it is finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [(("sdn", "absent"), "no run of this name"), (("sdn", "cnn"), "runs that are not finished")],
)
def test_a_claim_that_cannot_be_judged_is_one_line(runs, tmp_path, names, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gather.main([str(runs), "--output", str(tmp_path / "out"), "--claim", *names])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def claims_experiment(*arguments):
    command = ["bash", REPOSITORY / "experiments/claims.sh", *arguments]
    environment = os.environ | {"SDN_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.slow
def test_the_claims_experiment_runs_and_is_gathered(tmp_path):
    pytest.importorskip("skimage")
    small = ["--h_size", 8, "--sdn_nfeat_0", 4, "--iters", 2, "--val_images", 8, "--figsize", 1]
    done = claims_experiment(
        "--arms", "iaf sdn2-low", "--seeds", "3", "--output_dir", tmp_path, *small
    )
    assert done.returncode == 0, done.stdout
    assert sorted(line.split(":")[0] for line in done.stdout.splitlines()) == [
        "claims_iaf_seed3",
        "claims_sdn2-low_seed3",
    ]
    gather.main(
        [
            str(tmp_path),
            "--output",
            str(tmp_path / "out"),
            "--claim",
            "claims_iaf",
            "claims_sdn2-low",
        ]
    )
    rows = csv_rows(tmp_path / "out/runs.csv")
    assert [row["kind"] for row in rows] == ["IAF-VAE+", "SDN, 2 directions, scales up to 8"]
    assert all(float(row["neg_log_p"]) > 0 and row["state"] == "finished" for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "iaf sdn9"], "there is no arm sdn9"),
        (["--study", "all"], "--study is claims or reach; got all"),
        (["--study", "reach", "--arms", "iaf9"], "there is no arm iaf9"),
        (["--jobs", "0"], "--jobs must be at least 1; got 0"),
        (["--h_size", "8", "--seeds"], "--seeds needs a value"),
    ],
)
def test_wrong_flags_of_the_claims_experiment_are_refused(tmp_path, flags, message):
    done = claims_experiment("--output_dir", tmp_path / "out", *flags)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()
