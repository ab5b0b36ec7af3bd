"""Checkpoint files: whole or not at all, checked for damage, the last few and the best; what a full
disk costs."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from endings import leaving_files_alone
from helpers import REPOSITORY, assert_one_line_error, csv_rows, resumable, run

import train
from lib.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from lib.files import exclusive_folder, link_or_copy, whole_file
from lib.training.metrics_log import CsvFile
from lib.training.resume import Position, newest_checkpoint, step_checkpoints

CONTENT = {"state_dict": {"w": torch.arange(1000.0)}, "hyper_parameters": {}, "global_step": 3}


def seal(path: Path) -> None:
    """Adds what earlier versions put at the end of a checkpoint: its SHA-256 as the archive's
    comment."""
    content = path.read_bytes()[:-2]
    comment = b"sha256=" + hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content + len(comment).to_bytes(2, "little") + comment)


@pytest.mark.parametrize("sealed", [False, True])
def test_every_changed_byte_of_a_tensor_is_noticed(tmp_path, sealed):
    """No change of another byte gives other content; files of earlier versions are read, too."""
    path = tmp_path / "x.ckpt"
    write_checkpoint(CONTENT | {"sealed": True} if sealed else CONTENT, path)
    if sealed:
        seal(path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], CONTENT["state_dict"]["w"])
    whole = path.read_bytes()
    tensor = CONTENT["state_dict"]["w"].numpy().tobytes()
    begin = whole.index(tensor)
    data = range(begin, begin + len(tensor))
    unnoticed = []
    for place in [*data[::41], data[-1], *range(0, begin, 3), *range(data[-1] + 1, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            content = read_checkpoint(path)
        except CheckpointError as error:
            assert re.search(r"x\.ckpt is (damaged|not a checkpoint)", str(error))
            continue
        assert torch.equal(content["state_dict"]["w"], CONTENT["state_dict"]["w"]), place
        assert content["global_step"] == 3 and content["hyper_parameters"] == {}
        unnoticed.append(place)
    assert not set(data) & set(unnoticed)


def test_a_checkpoint_that_is_cut_off_anywhere_is_noticed(tmp_path):
    path = tmp_path / "x.ckpt"
    write_checkpoint(CONTENT, path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 97), *range(len(whole) - 90, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"x\.ckpt is (damaged|not a checkpoint)"):
            read_checkpoint(path)


def test_a_checkpoint_is_a_file_of_torch(tmp_path):
    """torch reads ours, and ours are read however torch.save wrote them."""
    write_checkpoint(CONTENT, tmp_path / "x.ckpt")
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "x.ckpt", weights_only=True, mmap=mmap)
        assert torch.equal(loaded["state_dict"]["w"], CONTENT["state_dict"]["w"])
    for as_zip in (True, False):
        torch.save(CONTENT, tmp_path / "y.ckpt", _use_new_zipfile_serialization=as_zip)
        assert read_checkpoint(tmp_path / "y.ckpt")["global_step"] == 3


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_link_or_copy_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")

    def no_links(*paths: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "new" and not (tmp_path / "a").samefile(tmp_path / "c")


def test_a_folder_is_for_one_process(tmp_path):
    with exclusive_folder(tmp_path / "new/run", "in use"):
        folder = f"Path({str(tmp_path / 'new/run')!r})"
        other = f"from lib.files import *; exclusive_folder({folder}, 'in use').__enter__()"
        done = subprocess.run(
            [sys.executable, "-c", other], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.stderr.endswith("BlockingIOError: in use\n")
    assert not list(tmp_path.iterdir()), "nothing remains of a folder that stayed empty"


def test_children_do_not_hold_the_folder_of_a_dead_process(tmp_path):
    """Loader workers live on for seconds after their process was killed."""
    code = f"""
import os, time
from pathlib import Path
from lib.files import exclusive_folder
with exclusive_folder(Path({str(tmp_path)!r}), "in use"):
    if os.fork():
        time.sleep(1)
        os._exit(0)
    time.sleep(30)
"""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    with exclusive_folder(tmp_path, "in use"):
        assert time.monotonic() - begin < 20, "the child is still there"


@pytest.mark.parametrize(
    ("batch", "accumulate", "batches", "validate", "expected"),
    [
        (8, 1, 5, False, 24),
        (8, 3, 5, False, 24),
        (4, 1, 10, False, 24),
        (16, 1, 3, False, 16),
        (5, 1, 9, False, 20),
        (8, 2, 5, False, 16),
        (8, 1, 3, False, 16),
        (48, 1, 2, False, 0),
        (8, 1, 3, True, 24),
        (16, 1, 2, True, 16),
        (48, 1, 1, True, 48),
    ],
)
def test_a_run_goes_on_at_a_whole_step(batch, accumulate, batches, validate, expected):
    """With another global batch, accumulation or length of an epoch: not behind where it was, and a
    step is ahead."""
    assert Position(2, 24, validate).on_grid(batch, accumulate, batches) == Position(
        2, expected, validate
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory, images):
    """A finished run of 10 steps, 8 to an epoch, that keeps three checkpoints beside the best."""
    folder = tmp_path_factory.mktemp("kept")
    more = ["--iters", 10, "--checkpoint_every_n_steps", 3, "--keep_last", 3]
    done = run("train.py", *resumable(images, folder, *more))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_last_and_the_best_are_kept(kept):
    folder = kept / "checkpoints/sdn"
    paths = step_checkpoints(folder)
    assert [path.name for path in paths] == [
        "step_0000010.ckpt",
        "step_0000008.ckpt",
        "step_0000006.ckpt",
    ]
    assert paths[0].samefile(folder / "last.ckpt")
    validations = [
        (float(row["val_neg_elbo"]), int(row["step"])) for row in csv_rows(folder / "epochs.csv")
    ]
    assert read_checkpoint(folder / "best.ckpt")["global_step"] == min(validations)[1]
    assert [read_checkpoint(path)["position"] for path in paths] == [
        {"epoch": 1, "images": 8, "validate": False},
        {"epoch": 1, "images": 0, "validate": False},
        {"epoch": 0, "images": 24, "validate": False},
    ]
    others = sorted(path.name for path in folder.iterdir() if path.suffix != ".ckpt")
    assert others == ["epochs.csv", "run.json", "steps.csv"]


def test_the_one_before_a_damaged_checkpoint_is_used(kept, tmp_path, images, capfd):
    shutil.copytree(kept / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints/sdn"
    for path in (folder / "last.ckpt", *step_checkpoints(folder)[:2]):
        path.write_bytes(path.read_bytes()[:-1000])
    found, content = newest_checkpoint(folder)
    assert (found.name, content["global_step"]) == ("step_0000006.ckpt", 6)
    errors = capfd.readouterr().err
    assert (
        errors.count("trying the one before it") == 2
        and "step_0000010.ckpt is not a checkpoint" in errors
    )
    train.main(resumable(images, tmp_path, "--iters", 9))
    assert [int(row["step"]) for row in csv_rows(folder / "steps.csv")] == list(range(1, 10))


def test_only_damaged_checkpoints_are_an_error(kept, tmp_path, images):
    shutil.copytree(kept / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints/sdn").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1000])
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints/sdn").iterdir()}
    done = run("train.py", *resumable(images, tmp_path, "--iters", 12))
    assert_one_line_error(
        done, "step_0000010.ckpt is not a checkpoint, or is cut off", "more are damaged, too"
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints/sdn").iterdir()}


def test_a_second_run_in_a_folder_is_refused(kept, images):
    folder = kept / "checkpoints/sdn"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with exclusive_folder(folder, ""):
        done = run("train.py", *resumable(images, kept, "--iters", 12))
    assert_one_line_error(done, "is in use by another run", "--exp_name")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fewer_epochs_than_there_are_is_one_line(kept, tmp_path, images):
    shutil.copytree(kept / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/sdn/step_0000011.ckpt"
    content = read_checkpoint(step_checkpoints(path.parent)[0])
    write_checkpoint(content | {"epoch": 5}, path)
    done = run("train.py", *resumable(images, tmp_path, "--max_epochs", 3))
    assert_one_line_error(done, "--max_epochs 3: ", "step_0000011.ckpt has 5 epochs already")


def without(content: dict, name: str) -> dict:
    return {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: without(c, "loops"), "cannot be trained on: loops missing or damaged"),
        (lambda c: c | {"position": 3}, "cannot be trained on: position missing or damaged"),
        (
            lambda c: c | {"state_dict": without(c["state_dict"], "model.h")},
            "model.h is missing or has another shape",
        ),
    ],
)
def test_a_checkpoint_that_lacks_something_is_one_line(kept, tmp_path, images, change, message):
    path = tmp_path / "checkpoints/sdn/last.ckpt"
    write_checkpoint(change(read_checkpoint(step_checkpoints(kept / "checkpoints/sdn")[0])), path)
    assert_one_line_error(run("train.py", *resumable(images, tmp_path, "--iters", 12)), message)


def changed(checkpoint: dict, *keys: object, to: object = None) -> dict:
    """A copy of a checkpoint with another value at some depth."""
    inner = checkpoint = copy.deepcopy(checkpoint)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return checkpoint


PROGRESS = ("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress")
GROUP = ("optimizer_states", 0, "param_groups")


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("optimizer_states", 0, "state"), {}, "holds no moments after 10 steps"),
        (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(3), "of that shape"),
        (("optimizer_states", 0, "state", 0, "exp_inf"), torch.tensor(0.5), "of that shape"),
        (("optimizer_states",), [], "optimizer_states holds 0 entries"),
        (GROUP, None, "param_groups"),
        ((*GROUP, 0, "lr"), "0.1", "['lr'] is '0.1'"),
        ((*GROUP, 0, "betas"), (0.9,), "betas"),
        ((*GROUP, 0, "params"), [0], "of other parameters"),
        (("lr_schedulers", 0, "base_lrs"), [None], "base_lrs"),
        (("lr_schedulers", 0, "step"), 1, "'step', which is no setting"),
        (("loops", "fit_loop"), None, "loops['fit_loop'] is None"),
        ((*PROGRESS, "optimizer", "step", "total", "completed"), 3, "global_step"),
        (("loops", "fit_loop", "epoch_progress", "current", "ready"), "2", "'ready'] is '2'"),
        (("callbacks", "SkipNonFinite"), {}, "lacks recent"),
        (("callbacks", "Checkpoints", "best_score"), "x", "best_score"),
        (("callbacks", 7), {}, "callbacks"),
        (("position", "images"), -5, "position"),
        (("position", "x"), 1, "position"),
        (("since_validation", "steps"), "0", "since_validation['steps']"),
        (("lrate_factor",), 7.0, "lrate_factor"),
        (("best_validation",), float("nan"), "best_validation"),
        (("pytorch-lightning_version",), "x", "pytorch-lightning_version"),
        (("global_step",), -1, "global_step"),
        (("state_dict", "model.h"), None, "model.h"),
    ],
    ids=str,
)
def test_a_checkpoint_made_by_hand_is_refused_before_training(
    kept, tmp_path, images, capfd, keys, value, named
):
    """Whatever of it is of another kind: nothing is trained, and no file is touched."""
    original = read_checkpoint(step_checkpoints(kept / "checkpoints/sdn")[0])
    write_checkpoint(changed(original, *keys, to=value), tmp_path / "checkpoints/sdn/last.ckpt")
    with leaving_files_alone(tmp_path), pytest.raises(SystemExit) as stop:
        train.main(resumable(images, tmp_path, "--iters", 12))
    last = capfd.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "train.py: error: " in last and named in last, last
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["last.ckpt"]


def test_moments_that_are_not_finite_are_refused(kept, tmp_path, images, capfd):
    content = read_checkpoint(step_checkpoints(kept / "checkpoints/sdn")[0])
    content["optimizer_states"][0]["state"][0]["exp_avg"].view(-1)[0] = float("nan")
    write_checkpoint(content, tmp_path / "checkpoints/sdn/last.ckpt")
    with pytest.raises(SystemExit):
        train.main(resumable(images, tmp_path, "--iters", 12))
    assert "['exp_avg'] is not finite" in capfd.readouterr().err


def test_every_step_skipped_leaves_no_moments_and_goes_on(kept, tmp_path, images):
    content = read_checkpoint(step_checkpoints(kept / "checkpoints/sdn")[0])
    content["optimizer_states"][0]["state"] = {}
    content["callbacks"]["SkipNonFinite"]["recent"] = [True] * 10
    write_checkpoint(content, tmp_path / "checkpoints/sdn/last.ckpt")
    train.main(resumable(images, tmp_path, "--iters", 11, "--max_skipped", 50))
    assert read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")["global_step"] == 11


def limited(limit: int, *arguments: str) -> subprocess.CompletedProcess:
    """train.py with no file larger than `limit` bytes: writing fails as on a full disk."""
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_a_full_disk_costs_neither_the_run_nor_older_checkpoints(kept, tmp_path, images):
    shutil.copytree(kept / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints/sdn"
    before = {path.name: path.read_bytes() for path in folder.glob("*.ckpt")}
    done = limited(100_000, *resumable(images, tmp_path, "--iters", 20, "--keep_last", 3))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        "note: no checkpoint of step 16: " in done.stderr
        and "those before it are whole" in done.stderr
    )
    assert done.stderr.splitlines()[-1].startswith("train.py: error: ")
    assert {path.name: path.read_bytes() for path in folder.glob("*.ckpt")} == before
    assert not list(folder.glob("*.partial"))
    assert [int(row["step"]) for row in csv_rows(folder / "steps.csv")] == list(range(1, 21)), (
        "training went on"
    )
    done = run("train.py", *resumable(images, tmp_path, "--iters", 20))
    assert done.returncode == 0, done.stderr
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 20


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "emptied"])
def test_a_log_that_goes_while_it_is_written_begins_again(tmp_path, capfd, removed):
    path = tmp_path / "run/steps.csv"
    file = CsvFile(path, ["step", "value"], 0)
    file.append([dict(step=step, value="x" * 100) for step in range(1, 4)])
    if removed:
        shutil.rmtree(path.parent)
    else:
        os.truncate(path, 0)
    file.append([dict(step=4, value=1)])
    file.append([dict(step=5, value=2)])
    assert csv_rows(path) == [dict(step="4", value="1"), dict(step="5", value="2")]
    assert capfd.readouterr().err.count("steps.csv was removed or cut; it begins again") == 1


LOG = b"step,value\r\n1,a\r\n2,b\r\n3,c\r\n4,d\r\n"


@pytest.mark.parametrize(
    ("content", "steps", "damaged"),
    [
        (LOG, [1, 2, 3], False),
        (LOG[:-4], [1, 2, 3], False),  # cut by a kill
        (LOG[: LOG.index(b"4")] + bytes(1000), [1, 2, 3], False),  # by a power cut
        (b"", [], False),
        (LOG.replace(b"b", b"\xff"), [1, 2, 3], True),
        (LOG.replace(b"2,b", bytes(3)), [1, 3], True),
        (bytes(1095) + LOG[LOG.index(b"2") :], [], True),
        (LOG[LOG.index(b"1") :], [], True),
        (LOG.replace(b"2,b", b"2"), [1, 3], True),
        (LOG.replace(b"2,b", b"2,b,c"), [1, 3], True),
        (LOG.replace(b"2,b", b"two,b"), [1, 3], True),
        (LOG.replace(b"b", b"b" * 200_000), [1], True),
        (b"hello\nworld\n", [], True),
    ],
)
def test_a_damaged_log_is_set_aside_and_what_can_be_read_is_kept(
    tmp_path, capfd, content, steps, damaged
):
    path = tmp_path / "steps.csv"
    path.write_bytes(content)
    CsvFile(path, ["step", "value"], resume_step=3)
    assert [int(row["step"]) for row in csv_rows(path)] == steps
    aside = tmp_path / "steps.csv.damaged1"
    assert aside.exists() == damaged == ("is damaged; it is now" in capfd.readouterr().err)
    assert not damaged or aside.read_bytes() == content


def test_rows_that_do_not_fit_on_the_disk_are_written_later(tmp_path, capfd):
    """Its limit is that of the file system: a small one is not to be had without privileges."""
    code = f"""
import resource, signal
from pathlib import Path
from lib.training.metrics_log import CsvFile
file = CsvFile(Path({str(tmp_path / "x.csv")!r}), ["step", "value"], 0)
file.append([dict(step=0, value=1)])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
for step in range(1, 40):
    file.append([dict(step=step, value="x" * 5)])
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
file.append([dict(step=40, value=2)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("its rows wait until it can") == 1
    assert [int(row["step"]) for row in csv_rows(tmp_path / "x.csv")] == list(range(41))
