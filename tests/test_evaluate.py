"""evaluate.py as a user runs it: numbers, pictures, and every way to be told what is wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import GOLDEN, run
from PIL import Image

import evaluate


def test_elbo_likelihood_and_samples(finished):
    arguments = ["--model", "tiny", "--output_dir", finished, "--limit", 5, "--batch", 4, "--seed", 3]
    tasks = ["--elbo", "--likelihood", "--importance_samples", 6, "--sampling", "--count", 4, "--temperatures", 0.5, 1]
    done = run("evaluate.py", *arguments, *tasks)
    assert done.returncode == 0, done.stderr
    results = json.loads((finished / "figs/tiny/results.json").read_text())
    assert results["elbo"]["images"] == results["likelihood"]["images"] == 5
    assert results["likelihood"]["samples"] == 6
    assert results["likelihood"]["bits_per_dim"] < results["elbo"]["bits_per_dim"]
    assert f"-ELBO: {results['elbo']['bits_per_dim']:.4f} +-" in done.stdout
    assert f"-log p(x): {results['likelihood']['bits_per_dim']:.4f} +-" in done.stdout
    assert results["elbo"]["step"] == 6 and results["elbo"]["seed"] == 3
    for temperature in ("0.50", "1.00"):
        grid = Image.open(finished / f"figs/tiny/samples_t{temperature}.png")
        assert grid.width == grid.height > 64
        single = finished / f"figs/tiny/samples_t{temperature}"
        assert [Image.open(path).size for path in sorted(single.iterdir())] == [(32, 32)] * 4

    best = finished / "checkpoints/tiny/best.ckpt"
    again = run("evaluate.py", "--checkpoint", best, *arguments[2:], "--elbo", "--batch", 2)
    assert again.returncode == 0, again.stderr
    second = json.loads((finished / "figs/tiny/results.json").read_text())
    assert second["elbo"]["bits_per_dim"] == pytest.approx(results["elbo"]["bits_per_dim"], rel=1e-5)
    assert second["likelihood"] == results["likelihood"], "other results stay"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --model --checkpoint is required"),
        (["--model", "a", "--checkpoint", "b"], "not allowed with argument"),
        (["--model", "a"], "nothing to do: ask for --elbo, --likelihood or --sampling"),
        (["--model", "a", "--elbo", "--batch", "0"], "--batch must be at least 1; got 0"),
        (["--model", "a", "--elbo", "--limit", "0"], "--limit must be at least 1; got 0"),
        (["--model", "a", "--sampling", "--temperatures", "-1"], "--temperatures must be 0 or more"),
        (["--model", "a", "--elbo", "--device", "tpu9"], "--device must be auto, cpu, cuda or cuda:N; got tpu9"),
        (["--model", "a", "--elbo", "--device", "mps"], "--device must be auto, cpu, cuda or cuda:N; got mps"),
        (["--model", "a", "--elbo", "--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--model", "absent", "--elbo"], "--model absent: none of"),
        (["--checkpoint", "absent.ckpt", "--elbo"], "no checkpoint at absent.ckpt"),
        (["--model", "a", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, *(["--output_dir", str(tmp_path)] if flags else [])])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("evaluate.py: error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_missing_data_are_one_line(finished, tmp_path, capfd):
    best = str(finished / "checkpoints/tiny/best.ckpt")
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--checkpoint", best, "--elbo", "--root", str(tmp_path), "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "bash data/ImageNet32/get_imagenet_data.sh" in capfd.readouterr().err.strip().splitlines()[-1]


def test_damaged_results_are_not_overwritten(finished, tmp_path, capfd):
    (tmp_path / "figs/tiny").mkdir(parents=True)
    (tmp_path / "figs/tiny/results.json").write_text("{")
    best = str(finished / "checkpoints/tiny/best.ckpt")
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--checkpoint", best, "--sampling", "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "results.json is damaged" in capfd.readouterr().err
    assert (tmp_path / "figs/tiny/results.json").read_text() == "{"


class NotPlain:
    pass


def test_files_that_are_no_checkpoint_are_one_line(finished, tmp_path, capfd):
    whole = (finished / "checkpoints/tiny/best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}, "hyper_parameters": NotPlain()}, tmp_path / "unsafe.ckpt")
    torch.save({"state_dict": {}, "global_step": 0}, tmp_path / "other.ckpt")
    shutil.copy(GOLDEN / "tiny_8bit.ckpt", tmp_path / "released.ckpt")
    checkpoint = torch.load(finished / "checkpoints/tiny/best.ckpt", weights_only=True)
    del checkpoint["state_dict"]["average.module.h"]
    torch.save(checkpoint, tmp_path / "lacking.ckpt")
    expected = {
        "cut": "is not a checkpoint, or is cut off",
        "text": "is not a checkpoint, or is cut off",
        "empty": "is not a checkpoint, or is cut off",
        "unsafe": "only tensors and plain values are loaded",
        "other": "is not a checkpoint of this project: it lacks hyper_parameters",
        "released": "was not written by this version of train.py: the stored configuration has unknown fields",
        "lacking": 'Missing key(s) in state_dict: "h"',
    }
    for name, message in expected.items():
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["--checkpoint", str(tmp_path / f"{name}.ckpt"), "--elbo", "--output_dir", str(tmp_path)])
        assert stop.value.code == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert line.startswith("evaluate.py: error: ") and f"{name}.ckpt" in line and message in line
    assert not (tmp_path / "figs").exists()
