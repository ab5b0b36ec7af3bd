"""The soak: a short one ends well, and it finds what it is there to find."""

from __future__ import annotations

import copy
import csv
import json
import math
import shutil

import pytest
import torch
from helpers import run

from lib.checkpoint import read_checkpoint, write_checkpoint
from tests.stress.runs_compared import differences
from tests.stress.soak import growth


@pytest.fixture
def twins(finished, tmp_path):
    """A folder with a run of 6 steps under two names, one and other."""
    for name in ("one", "other"):
        shutil.copytree(finished / "checkpoints/tiny", tmp_path / "checkpoints" / name)
        pictures = tmp_path / "figs" / name
        pictures.mkdir(parents=True)
        # Those of training: other tests may have evaluated the run.
        for picture in (finished / "figs/tiny").glob("*_0000006.png"):
            shutil.copy(picture, pictures)
    return tmp_path


def change_checkpoint(twins, change):
    path = twins / "checkpoints/other/last.ckpt"
    checkpoint = read_checkpoint(path)
    change(checkpoint)
    write_checkpoint(checkpoint, path)


def test_equal_runs_have_no_differences(twins):
    assert differences(twins, "one", "other") == []


@pytest.mark.parametrize("what", ["last bit of a weight", "sign of a zero", "dtype"])
def test_one_weight_that_differs_is_found(twins, what):
    def change(checkpoint):
        name, weight = next(
            (n, w)
            for n, w in checkpoint["state_dict"].items()
            if n.startswith("model.") and w.dim()
        )
        first = weight.flatten()[:1]
        if what == "sign of a zero":
            first.zero_()
            twin = copy.deepcopy(checkpoint)
            twin["state_dict"][name].flatten()[:1].neg_()
            write_checkpoint(twin, twins / "checkpoints/one/last.ckpt")
        elif what == "dtype":
            checkpoint["state_dict"][name] = weight.double()
        else:
            first.copy_(torch.nextafter(first, torch.tensor(math.inf)))

    change_checkpoint(twins, change)
    assert differences(twins, "one", "other") == ["last.ckpt: state_dict"]


def test_a_difference_in_the_optimizer_or_in_what_is_there_is_found(twins):
    def change(checkpoint):
        checkpoint["optimizer_states"][0]["state"][0]["exp_inf"].flatten()[-1] += 1
        del checkpoint["position"]

    change_checkpoint(twins, change)
    assert differences(twins, "one", "other") == [
        "last.ckpt: optimizer_states",
        "last.ckpt: position",
    ]
    (twins / "checkpoints/other/best.ckpt").unlink()
    assert "best.ckpt is missing" in differences(twins, "one", "other")


def test_differences_in_logs_and_pictures_are_found_but_times_may_differ(twins):
    path = twins / "checkpoints/other/steps.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def write_rows():
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    rows[1]["images_per_second"] = "1"
    write_rows()
    assert differences(twins, "one", "other") == []
    rows[1]["grad_norm"] += "1"
    write_rows()
    assert differences(twins, "one", "other") == ["steps.csv: from row 2 of 6 and 6"]
    picture, other = sorted((twins / "figs/other").iterdir())
    picture.write_bytes(picture.read_bytes() + b"\0")
    other.unlink()
    rows[1:] = []
    write_rows()
    expected = [
        "steps.csv: from row 2 of 6 and 1",
        f"picture {picture.name}",
        f"picture {other.name}",
    ]
    assert differences(twins, "one", "other") == expected


def test_growth_finds_a_leak_and_not_what_comes_at_the_start():
    warm = [500 + min(sample, 50) for sample in range(400)]
    assert growth(warm)["growth_mib"] == 0
    leaking = [mib + sample / 10 for sample, mib in enumerate(warm)]
    assert growth(leaking)["growth_mib"] == pytest.approx(20, abs=0.2)


@pytest.mark.slow
def test_a_short_soak_ends_well(tmp_path):
    output = tmp_path / "soak.json"
    flags = ("--quick", "--output", output)
    done = run("-m tests.stress.soak", *flags, timeout=1800, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    disturbed = result["disturbed"]
    for end in ("SIGKILL", "SIGKILL of a worker", "SIGTERM", "SIGINT"):
        assert disturbed[end] == 1, result
    assert disturbed["checkpoint cut off"] + disturbed["byte of a checkpoint changed"] >= 1
    assert (
        disturbed["starts"] == 5
        and sum(result["injected"].values()) > 0
        and result["pictures"] == 8
    )
    assert not list(tmp_path.glob("soak_*")), (
        "what it wrote is removed; of killed processes some small files stay"
    )
