"""Progress: a bar in a terminal, lines in a log."""

from __future__ import annotations

import io
import re
import sys
from types import SimpleNamespace

import pytest
from endings import ending_of
from helpers import resumable
from pytorch_lightning.callbacks import TQDMProgressBar

import train
from lib import progress as module
from lib.progress import progress
from lib.training.progress import ProgressLines, progress_callback


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert list(progress(range(3), desc="work")) == [0, 1, 2]
    assert sys.stderr.getvalue().count("\r") > 1 and "3/3" in sys.stderr.getvalue()
    assert isinstance(progress_callback(), TQDMProgressBar)


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_a_log_gets_lines(monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    assert isinstance(progress_callback(), ProgressLines)
    assert list(progress(range(3), desc="work")) == [0, 1, 2]
    assert capsys.readouterr().err == "", "short work is nothing to write about"
    monkeypatch.setattr(module, "INTERVAL", 0)
    assert list(progress(range(3), desc="work", miniters=1)) == [0, 1, 2]
    written = capsys.readouterr().err
    assert "\r" not in written and written.endswith("\n")
    assert [line.split("|")[0] for line in written.splitlines()[:2]] == ["work:   0%", "work:  33%"]


def test_a_log_of_training_says_how_far_it_is(tmp_path, images, monkeypatch):
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (0.0,))
    more = ["--iters", 100, "--max_epochs", 2, "--epoch_images", 8]
    done = ending_of(train.main, resumable(images, tmp_path, *more))
    assert done.status == 0 and "\r" not in done.out + done.err, done
    lines = [line for line in done.out.splitlines() if " of 4, epoch " in line]
    pattern = (
        r"step (\d) of 4, epoch (\d): -ELBO -?[\d.]+ bits/dim, [\d.]+ images/s, (\d:\d\d:\d\d) left"
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    assert all(found), lines
    assert [match[1] + match[2] for match in found] == ["10", "20", "31", "41"]
    assert found[-1][3] == "0:00:00"
    assert "step 2: validation, batch 1 of 2" in done.out


def test_a_log_of_a_short_run_has_no_lines_of_progress(tmp_path, images):
    done = ending_of(train.main, resumable(images, tmp_path, "--iters", 2))
    assert done.status == 0 and " of 2, epoch " not in done.out


def test_other_processes_than_the_first_are_silent(capsys):
    lines = ProgressLines(interval=0)
    lines.setup(SimpleNamespace(is_global_zero=False), None, "fit")
    trainer = SimpleNamespace(global_step=0, world_size=2, sanity_checking=False)
    lines.on_train_start(trainer, None)
    lines.on_train_batch_end(trainer, None, {}, [[0]], 0)
    lines.on_validation_batch_end(trainer, None, {}, [[0]], 0)
    assert capsys.readouterr().out == ""
