"""From a folder of pictures to an evaluated model, with the entry scripts and nothing else."""

from __future__ import annotations

import json

import pytest
from helpers import run
from mixed_pictures import encoded, scene, write_mixed_folder

pytest.importorskip("lmdb")
SMALL_RUN = (
    "--iters 4 --depth 2 --ds_list 1 --h_size 8 --z_size 2 --mix_components 2 --sdn_nfeat_0 6 "
    "--sdn_num_dirs 1 --batch 8 --num_workers 0 --gpus 0 --logger none --figsize 2 "
    "--make_checkpoint --exp_name own"
).split()
EVALUATIONS = (
    "--elbo --sampling --reconstruction --interpolation --neighborhood --overfitting --latents "
    "--report --limit 6 --device cpu"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 24, 40)])
def test_a_mixed_folder_becomes_an_evaluated_model(tmp_path, channels, height, width):
    expected = write_mixed_folder(tmp_path / "mixed", plain=300)
    command = ["--name", "own", "--size", f"{height}x{width}", "--channels", channels]
    root = tmp_path / "data"
    convert = ["-m data.convert.images", tmp_path / "mixed", *command, "--root", root]
    refused = run(*convert)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "such as" not in refused.stdout and not (root / "own").exists()
    done = run(*convert, "--skip_damaged")
    assert done.returncode == 0, done.stderr
    description = json.loads((root / "own/dataset.json").read_text())
    assert {key: description[key] for key in expected} == expected
    assert description["shape"] == [channels, height, width]

    trained = run(
        "train.py", "--dataset", "own", "--root", root, "--output_dir", tmp_path, *SMALL_RUN
    )
    assert trained.returncode == 0, trained.stderr
    query = tmp_path / "query.png"
    query.write_bytes(encoded(scene(7, height, width)))
    evaluated = run(
        *("evaluate.py", "--model", "own", "--output_dir", tmp_path, *EVALUATIONS),
        *("--images", 0, 1, "--queries", query),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads((tmp_path / "figs/own/results.json").read_text())
    assert 0 < results["elbo"]["bits_per_dim"] < 20
    assert (tmp_path / "figs/own/report.html").stat().st_size > 10_000


def test_a_path_is_trained_on_and_a_model_samples_without_its_data(tmp_path):
    for number in range(60):
        name = tmp_path / f"pets/{number}.png"
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(encoded(scene(number, 20, 30)))
    command = [
        "--dataset",
        tmp_path / "pets",
        "--root",
        tmp_path / "data",
        "--output_dir",
        tmp_path,
    ]
    missing = run("train.py", *command, *SMALL_RUN)
    assert missing.returncode == 2 and "pictures need --image_size" in missing.stderr
    cannot = run("train.py", *command, *SMALL_RUN, "--image_size", 15, 20, "--channels", 1)
    assert cannot.returncode == 2 and "images of 15x20 cannot be halved 1 times" in cannot.stderr
    trained = run("train.py", *command, *SMALL_RUN, "--image_size", 16, 20, "--channels", 1)
    assert trained.returncode == 0, trained.stderr
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    sampled = run(
        *("evaluate.py", "--model", "own", "--output_dir", tmp_path, "--sampling", "--count", 4),
        *("--device", "cpu"),
    )
    assert sampled.returncode == 0, sampled.stderr
    command[1], command[3] = "pets-16x20-grey", tmp_path / "elsewhere"
    resumed = run("train.py", *command, *SMALL_RUN, "--use_checkpoint", "--iters", 6)
    assert resumed.returncode == 0, resumed.stderr
    other = run("train.py", *command, *SMALL_RUN, "--image_size", 32)
    assert other.returncode == 2 and "pets-16x20-grey has 1 x 16x20" in other.stderr
