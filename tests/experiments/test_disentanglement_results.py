"""Table 2 and Figures 7 and 12 from the files of runs: numbers, units, what is missing, what is
damaged."""

from __future__ import annotations

import json
import math
import re
import statistics

import numpy as np
import pytest
from helpers import assert_one_line_error, csv_rows, run
from PIL import Image

from experiments import disentanglement_results as results
from experiments.naming import Run

NATS = 12288 * math.log(2)  # per bit/dim of a 64x64 image
HEAD = [
    "step",
    "epoch",
    "neg_elbo",
    "distortion",
    "rate",
    "beta",
    "beta_kl",
    *(f"kl_{i}" for i in range(10)),
]
HEAD += ["grad_norm", "lr", "loss_scale", "images_per_second"]
LEVELS = [10, 10, 10, 8, 4, 15]


def trained(
    folder,
    run: Run,
    steps: int = 8,
    distortion=lambda step: 60_000 / step,
    rate=lambda step: 10.0 + step,
):
    """Writes steps.csv of a run whose β rises over half of its steps."""
    lines = [",".join(HEAD)]
    for step in range(1, steps + 1):
        beta, d, r = run.beta * min(1, 2 * step / steps), distortion(step), rate(step)
        row = [step, 0, d + r, d, r, beta, beta * r, *[r / 10] * 10, 1.5, 0.001, "", 99.5]
        lines.append(",".join(map(str, row)))
    path = folder / "checkpoints" / run.folder / "steps.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return path


def evaluated(folder, run: Run, elbo=(), **changes):
    """Writes results.json of a run; numbers that no two seeds, decoders and β share."""
    number = run.seed + 3 * math.sqrt(run.beta) / 40 + (run.decoder == "sdn") / 3
    parts = {"distortion": 0.4 + number / 100, "rate": 0.004 + number / 1000}
    scores = {
        "beta_vae": {"score": 0.9 - number / 20, "train_accuracy": 1},
        "factor_vae": {"score": 0.6 + number / 20},
    }
    entries = {
        "elbo": parts
        | {"bits_per_dim": sum(parts.values()), "rate_per_layer": [0.1], "images": 10, "step": 8}
    }
    entries["elbo"] |= dict(elbo)
    entries["disentanglement"] = {"scores": scores, "levels": LEVELS, "step": 8} | changes
    path = folder / "figs" / run.folder / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(entries))
    return path


def gathered(folder, capsys, name="3dshapes"):
    """Rows of runs.csv and of table.csv, and what was said on stdout and on stderr."""
    results.main(["--name", name, "--output_dir", str(folder)])
    said = capsys.readouterr()
    return (
        *(csv_rows(folder / "figs" / name / file) for file in ("runs.csv", "table.csv")),
        said.out,
        said.err,
    )


def is_drawn(path) -> bool:
    """Whether a picture shows the colours of both decoders, below the legend."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    pixels = picture[picture.shape[0] // 5 :].reshape(-1, 3)
    colours = [
        [int(style["color"][i : i + 2], 16) for i in (1, 3, 5)] for style in results.STYLES.values()
    ]
    return all((pixels == colour).all(1).sum() > 200 for colour in colours)


@pytest.mark.parametrize("name", ["3dshapes", "a_b", "a_cnn_beta1_seed2"])
@pytest.mark.parametrize("beta, text", [(1, "1"), (0.5, "0.5"), (500, "500"), (1e-5, "1e-05")])
def test_names_are_read_back(name, beta, text):
    one = Run(name, "sdn", beta, 12)
    assert one.folder == f"{name}_sdn_beta{text}_seed12"
    assert Run.parse(one.folder) == one


@pytest.mark.parametrize(
    "folder",
    "3dshapes 3dshapes_rnn_beta1_seed0 3dshapes_cnn_beta1_seed 3dshapes_cnn_beta1.0_seed0 "
    "3dshapes_cnn_betainf_seed0 3dshapes_cnn_beta1_seed00 _cnn_beta1_seed0 "
    "3dshapes_cnn_beta1_seed0_old 3dshapes_cnn_betax_seed0".split(),
)
def test_other_folders_are_no_runs(folder):
    assert Run.parse(folder) is None


@pytest.mark.parametrize(
    "fields",
    [("", "cnn", 1, 0), ("a", "rnn", 1, 0), ("a", "cnn", 1.2345678, 0), ("a", "cnn", 1, -1)],
)
def test_runs_that_no_name_could_tell_are_refused(fields):
    with pytest.raises(ValueError):
        Run(*fields)


def test_tables_hold_the_numbers_of_the_runs(tmp_path, capsys):
    runs = [
        Run("my_shapes", decoder, beta, seed)
        for decoder in ("sdn", "cnn")
        for beta in (100.0, 1.0)
        for seed in (0, 1)
    ]
    runs.append(Run("my_shapes", "cnn", 32.0, 7))
    for one in [*runs, Run("shapes", "cnn", 1.0, 0)]:
        trained(tmp_path, one)
        evaluated(tmp_path, one)
    rows, table, out, err = gathered(tmp_path, capsys, "my_shapes")

    assert err == ""
    assert {row["run"] for row in rows} == {one.folder for one in runs} and len(rows) == len(runs)
    for row in rows:
        source = json.loads((tmp_path / "figs" / row["run"] / "results.json").read_text())
        elbo, scores = source["elbo"], source["disentanglement"]["scores"]
        expected = {
            "elbo": -elbo["bits_per_dim"] * NATS,
            "log_likelihood": -elbo["distortion"] * NATS,
        }
        expected |= {"kl": elbo["rate"] * NATS, "beta_kl": float(row["beta"]) * elbo["rate"] * NATS}
        expected |= {
            "neg_elbo_bits_per_dim": elbo["bits_per_dim"],
            "beta_vae": scores["beta_vae"]["score"],
        }
        expected |= {"factor_vae": scores["factor_vae"]["score"], "steps": 8, "images": 10}
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected)
        assert float(row["elbo"]) == pytest.approx(float(row["log_likelihood"]) - float(row["kl"]))
        assert Run.parse(row["run"]) == Run(
            "my_shapes", row["decoder"], float(row["beta"]), int(row["seed"])
        )

    groups = [(float(line["beta"]), line["decoder"], int(line["seeds"])) for line in table]
    assert groups == [
        (1, "cnn", 2),
        (1, "sdn", 2),
        (32, "cnn", 1),
        (100, "cnn", 2),
        (100, "sdn", 2),
    ]
    for line in table:
        members = [
            row for row in rows if (row["beta"], row["decoder"]) == (line["beta"], line["decoder"])
        ]
        for quantity in [*results.QUANTITIES, "beta_vae", "factor_vae"]:
            values = [float(row[quantity]) for row in members]
            assert float(line[f"{quantity}_mean"]) == pytest.approx(statistics.mean(values))
            if len(values) > 1:
                difference = abs(
                    values[0] - values[1]
                )  # of two values, the deviation with ddof 1 is |a - b| / sqrt(2)
                assert float(line[f"{quantity}_std"]) == pytest.approx(difference / math.sqrt(2))
            else:
                assert line[f"{quantity}_std"] == ""

    markdown = (tmp_path / "figs/my_shapes/table.md").read_text()
    assert markdown in out
    cells = [
        [cell.strip() for cell in text.strip("|\n").split("|")] for text in markdown.splitlines()
    ]
    assert {len(row) for row in cells} == {10} and len(cells) == 2 + len(table)
    assert cells[2][:3] == ["1", "CNN", "2"]
    assert (
        cells[2][3] == f"−{-float(table[0]['elbo_mean']):.1f} ± {float(table[0]['elbo_std']):.1f}"
    )
    assert "±" not in " ".join(cells[4])
    for figure in ("figure7.png", "figure12.png"):
        assert is_drawn(tmp_path / "figs/my_shapes" / figure)
        assert str(tmp_path / "figs/my_shapes" / figure) in out


def test_other_metrics_are_added_and_gaps_named(tmp_path, capsys):
    first, second = (Run("3dshapes", "sdn", 1.0, seed) for seed in (0, 1))
    for one, scores in (
        (first, {"dci": {"score": 0.25}, "mig": {"score": 0.5}}),
        (second, {"mig": {"score": 0.75}}),
    ):
        trained(tmp_path, one)
        evaluated(tmp_path, one, scores=scores)
    rows, (line,), _, err = gathered(tmp_path, capsys)
    assert list(rows[0])[-4:] == ["beta_vae", "factor_vae", "mig", "dci"]
    assert rows[1]["dci"] == "" and (float(line["dci_mean"]), line["dci_std"]) == (0.25, "")
    assert (float(line["mig_mean"]), line["beta_vae_mean"]) == (0.625, "")
    (named,) = [text for text in err.splitlines() if "no dci" in text]
    assert second.folder in named and first.folder not in named and "1 of 2" in named


def test_runs_without_a_whole_evaluation_are_left_out_and_named(tmp_path, capsys):
    complete, nothing, half, mixed, redone = (
        Run("3dshapes", "cnn", 32.0, seed) for seed in range(5)
    )
    for one in (complete, nothing, half, mixed, redone):
        trained(tmp_path, one)
    evaluated(tmp_path, complete)
    evaluated(tmp_path, mixed, step=4)
    evaluated(tmp_path, redone, elbo={"weights": "3f9a"}, weights="77de")
    path = evaluated(tmp_path, half)
    path.write_text(json.dumps({"elbo": json.loads(path.read_text())["elbo"]}))
    rows, table, _, err = gathered(tmp_path, capsys)
    assert [row["run"] for row in rows] == [complete.folder] and [
        line["seeds"] for line in table
    ] == ["1"]
    (named,) = err.splitlines()
    assert "4 of 5 runs" in named and complete.folder not in named
    assert (
        f"{nothing.folder} (not evaluated)" in named
        and f"{half.folder} (no disentanglement)" in named
    )
    assert re.search(rf"{mixed.folder} \(.*step 8.*step 4\)", named)
    assert re.search(rf"{redone.folder} \(.*3f9a.*77de\)", named)


def test_runs_before_any_evaluation_have_learning_curves(tmp_path, capsys):
    for decoder in ("cnn", "sdn"):
        trained(tmp_path, Run("3dshapes", decoder, 1.0, 0))
    rows, table, out, err = gathered(tmp_path, capsys)
    assert rows == table == [] and "2 of 2 runs" in err
    assert is_drawn(tmp_path / "figs/3dshapes/figure12.png") and "figure7.png" not in out


def test_differences_between_runs_are_said(tmp_path, capsys):
    runs = [Run("3dshapes", "cnn", 1.0, seed) for seed in range(3)]
    trained(tmp_path, runs[0], steps=8)
    trained(tmp_path, runs[1], steps=6)
    evaluated(tmp_path, runs[0])
    evaluated(tmp_path, runs[1], elbo={"step": 6, "images": 9}, step=6, levels=[2, 2, 2, 2, 2, 2])
    evaluated(tmp_path, runs[2])
    (tmp_path / "checkpoints" / runs[2].folder).mkdir()
    lines = gathered(tmp_path, capsys)[3].splitlines()
    assert len(lines) == 5
    assert "1 of 3 runs have no learning curve" in lines[0] and runs[2].folder in lines[0]
    for line, values in zip(lines[1:], ("8 6", "8 6", "10 9", f"{LEVELS}|{[2] * 6}"), strict=True):
        first, second = values.split("|" if "|" in values else " ")
        assert (
            "the runs differ" in line
            and f"{first}: {runs[0].folder}" in line
            and f"{second}: {runs[1].folder}" in line
        )


def test_learning_curves_average_bins_and_keep_seeds_apart(tmp_path):
    logs = {}
    for seed, steps in ((0, 12), (1, 12), (2, 6)):
        one = Run("3dshapes", "sdn", 4.0, seed)
        path = trained(
            tmp_path,
            one,
            steps,
            lambda step, seed=seed: 100.0 * seed + step,
            lambda step: 2.0 * step,
        )
        logs[one] = results.read_steps(path)
    curves = results.learning_curves(logs, bins=4)
    assert curves.steps.tolist() == [2, 5, 8, 11]  # middles of 1 2 3, 4 5 6, ...
    values = curves.values[4.0, "sdn"]
    assert values.shape == (3, 4, 4)
    for seed in (0, 1):
        assert values[seed, 0] == pytest.approx(-(100 * seed + 3 * curves.steps))
        assert values[seed, 1] == pytest.approx(-(100 * seed + curves.steps))
        assert values[seed, 2] == pytest.approx(2 * curves.steps)
        raw = [4 * min(1, step / 6) * 2 * step for step in range(1, 13)]  # β rises until step 6
        assert values[seed, 3] == pytest.approx(np.reshape(raw, (4, 3)).mean(1))
    assert np.isnan(values[2, :, 2:]).all() and np.isfinite(values[2, :, :2]).all()
    mean, deviation = curves.spread(4.0, "sdn")
    assert mean[1] == pytest.approx([-102, -105, -58, -61])  # three seeds, then two
    assert deviation[1] == pytest.approx([100, 100, 100 / math.sqrt(2), 100 / math.sqrt(2)])
    assert set(curves.annealed) == {4.0}


def test_the_end_of_annealing_is_found(tmp_path):
    one = Run("3dshapes", "cnn", 300.0, 0)
    steps = results.read_steps(trained(tmp_path, one, 20))
    assert results.learning_curves({one: steps}).annealed == {300.0: 10}


def test_long_runs_have_at_most_two_hundred_bins(tmp_path):
    one = Run("3dshapes", "cnn", 1.0, 0)
    steps = results.read_steps(trained(tmp_path, one, 1001, rate=lambda step: 1.0))
    curves = results.learning_curves({one: steps})
    assert len(curves.steps) == 200
    assert curves.values[1.0, "cnn"][0, 2] == pytest.approx(np.ones(200))


@pytest.mark.parametrize(
    "removed, end", [(1, b""), (2, b""), (3, b""), (20, b""), (70, b""), (50, b"\r\n")]
)
def test_a_last_row_cut_by_a_kill_is_ignored(tmp_path, removed, end):
    path = trained(tmp_path, Run("3dshapes", "cnn", 1.0, 0))
    whole, text = results.read_steps(path), path.read_bytes()
    assert len(text.splitlines()[-1]) > 70
    path.write_bytes(text[:-removed] + end)
    assert (results.read_steps(path) == whole[:, :7]).all()


def test_limits_show_the_later_curve(tmp_path):
    steps = np.arange(1, 201)
    curve = 10_000 + 50_000 * np.exp(-steps) + 100 * np.cos(steps)
    diverged = np.where(steps == 150, 1e12, np.nan)
    low, high = results.limits(np.stack([curve, diverged]))
    assert 9_850 < low < 9_905 and 10_095 < high < 10_200
    assert results.limits(np.full((1, 10), np.nan))[0] < results.limits(np.full((1, 10), np.nan))[1]


def test_errors_are_one_line(tmp_path):
    module = "-m experiments.disentanglement_results"
    none = run(module, "--output_dir", tmp_path)
    assert_one_line_error(
        none, f"{tmp_path}/checkpoints/3dshapes_", "beta*_seed*", "bash train_3dshapes.sh"
    )
    assert_one_line_error(run(module, "--outputs", tmp_path), "--outputs")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"elbo": {"step": 1}, "disentanglement": {"step": 1}}']
)
def test_damaged_results_are_named(tmp_path, capsys, text):
    one = Run("3dshapes", "cnn", 1.0, 0)
    trained(tmp_path, one)
    path = evaluated(tmp_path, one)
    path.write_text(text)
    refused(tmp_path, capsys, path)


@pytest.mark.parametrize(
    "old, new",
    [(b"rate,", b"rat,"), (b"\r\n4,", b"\r\nx,"), (b"\r\n4,", b"\r\n3,"), (b"\n8,", b"\n8?,")],
)
def test_damaged_steps_are_named(tmp_path, capsys, old, new):
    path = trained(tmp_path, Run("3dshapes", "cnn", 1.0, 0))
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    refused(tmp_path, capsys, path)
    assert not (tmp_path / "figs").exists()


def refused(folder, capsys, path) -> None:
    with pytest.raises(SystemExit) as stop:
        results.main(["--output_dir", str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "error:" in line and str(path) in line
