"""Every flag of every command with nonsense for a value: one line on stderr, status 2, no file
touched. Whole commands of train.py and evaluate.py are what tests/stress/bad_input.py generates."""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
from endings import assert_refused, assert_told, ending_of, generated, leaving_files_alone
from helpers import TINY, TINY_BETA
from hypothesis import example, given
from hypothesis import strategies as st

import train
from data import download, histogram
from data.convert import shapes3d, tfrecords
from experiments import disentanglement, disentanglement_results
from lib import released
from lib.cli import one_line_errors
from lib.config import ConfigError, TrainConfig, flag_type
from lib.evaluation.options import check, make_parser
from tests.stress.bad_input import NONSENSE, valued

pytestmark = pytest.mark.slow

NONSENSE_VALUES = (
    st.sampled_from(NONSENSE)
    | st.text(st.characters(exclude_characters="/"), max_size=20)  # no way out of the test's folder
    | st.integers().map(str)
    | st.floats().map(str)
)
FLAGS = [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Relative paths lead into the test's own folder, which has a file in it."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def until_training(monkeypatch):
    """Everything happens but the training itself."""
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: None)


def values_of(name: str, count: int) -> list[list[str]]:
    """A flag with nonsense for its value, in so many ways."""
    chance = random.Random(name)
    return [
        valued(chance, name, chance.choice([int, float, str]), name in LISTS) for _ in range(count)
    ]


def check_train(here: Path, images: Path, arguments: list[str], tiny: list[str] = TINY) -> None:
    # Of a flag that is given twice the last counts.
    folder = tempfile.mkdtemp(dir=here)
    with leaving_files_alone(here, images):
        ending = ending_of(
            train.main, [*tiny, "--root", images, "--output_dir", folder, *arguments]
        )
    assert_told(ending, "train.py")
    assert not (here / "pwned").exists()


def parsed_or_refused(program: str, parse: Callable[[list[str]], object], arguments: list) -> None:
    with leaving_files_alone(Path.cwd()):
        ending = ending_of(parse, arguments)
    assert_told(ending, program)


def test_every_flag_of_train_takes_a_value_or_refuses_it_in_one_line(here):
    def parse(arguments: list[str]) -> None:
        with one_line_errors("train.py", ConfigError):
            train.parse(arguments)

    for name in FLAGS:
        for words in values_of(name, 12):
            parsed_or_refused("train.py", parse, [*TINY, *words])


def test_every_flag_of_evaluate_takes_a_value_or_refuses_it_in_one_line(here):
    parser = make_parser("")

    def parse(arguments: list[str]) -> None:
        with one_line_errors("evaluate.py", ConfigError):
            check(parser.parse_args(arguments))

    for name in EVALUATE_FLAGS:
        for words in values_of(name, 12):
            parsed_or_refused("evaluate.py", parse, ["--model", "x", "--elbo", *words])


@pytest.mark.parametrize("name", [f for f in FLAGS if flag_type(f)[0] in (int, float)])
def test_every_number_has_a_largest(name):
    """No flag takes a number that a computer cannot count to, or compute with."""
    kind, is_list = flag_type(name)
    for value in (2**63, -(2**63) - 1) if kind is int else (1e39, math.inf, -math.inf, math.nan):
        with pytest.raises(ConfigError, match=f"--{name} "):
            TrainConfig(**{name: [value] if is_list else value}).validate()


@pytest.mark.parametrize("value", ["--", "\0", "a\nb", "a\u2028b", "\x1b[31m", "\udcff"], ids=ascii)
@pytest.mark.parametrize("name", ["depth", "lrate", "dataset", "root", "output_dir", "exp_name"])
def test_values_that_are_no_plain_text_are_refused(name, value, here, images):
    """Also `--depth=--`, of which argparse makes an empty list."""
    arguments = [*TINY, "--root", images, "--output_dir", here / "out", f"--{name}={value}"]
    with leaving_files_alone(here, images):
        ending = ending_of(train.main, arguments)
    assert_refused(ending, "train.py")
    assert len(ending.err.splitlines()) == 1 and not (here / "out").exists()


SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 31, 32, 33, 64])


@generated(60)
@example(
    architecture=dict(depth=9, ds_list=[0, 1, 2, 3, 4, 5, 6, 7, 8])
)  # deeper than the image allows
@example(architecture=dict(depth=2, ds_list=[1, 1, 1]))
@example(architecture=dict(depth=1001))
@example(architecture=dict(h_size=2**20 + 1))
@example(architecture=dict(h_size=2**19))  # 10 TB of weights
@example(architecture=dict(sdn_nfeat_0=1, sdn_nfeat_diff=2**62, ds_list=[0, 1]))
@given(
    architecture=st.fixed_dictionaries(
        {},
        optional=dict(
            depth=st.integers(0, 6),
            ds_list=st.lists(st.integers(-1, 6), max_size=7),
            h_size=SIZES,
            z_size=SIZES,
            mix_components=SIZES,
            nbits=st.integers(0, 9),
            sdn_max_scale=SIZES,
            sdn_min_scale=SIZES,
            sdn_nfeat_0=SIZES,
            sdn_nfeat_diff=SIZES,
            sdn_num_dirs=st.integers(0, 5),
            post_model=st.sampled_from(["IAF", "IsoGaussian"]),
            obs_model=st.sampled_from(["DML", "DL"]),
            border=st.sampled_from(["zeros", "keep"]),
        ),
    )
)
def test_architectures_are_built_or_refused(here, images, until_training, architecture):
    """Every field is in its range or just out of it; it is their combination that may not be a
    model."""
    arguments = []
    for name, value in architecture.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    check_train(here, images, arguments)


@generated(20)
@given(
    flags=st.lists(
        st.sampled_from(
            "--task=disentanglement --task=density_estimation --dataset=Shapes3DRendered "
            "--dataset=ImageNet32 "
            "--dataset=CelebAHQ256 --dataset=3DShapes --analytic_kl --no-analytic_kl --amp "
            "--precision=64-true "
            "--precision=32-true --obs_model=DML --post_model=IAF --ds_list=1 --num_processes=2 "
            "--gpus=1 --num_nodes=3 "
            "--noise=image --noise=batch --use_checkpoint --make_checkpoint --sdn_max_scale=0 "
            "--sdn_num_dirs=0".split()
        ),
        min_size=1,
        max_size=6,
    )
)
def test_valid_flags_that_contradict_each_other(here, images, until_training, flags):
    check_train(here, images, flags, TINY_BETA)


EVALUATE_FLAGS = [action.dest for action in make_parser("")._actions if action.dest != "help"]
LISTS = "image_size ds_list temperatures images layers queries metrics levels".split()


COMMANDS = {
    "data.convert.tfrecords": (
        tfrecords.main,
        ["ImageNet32", "--source", "file", "--target", "new"],
    ),
    "data.convert.shapes3d": (shapes3d.main, ["check", "file"]),
    "data.histogram": (histogram.main, ["ImageNet32", "--root", "file", "--nbits", "8"]),
    "python -m lib.released": (released.main, ["file", "new.ckpt"]),
    "data.download": (download.main, ["http://127.0.0.1:9/x", "new", "--sha256", "0"]),
}


@pytest.mark.parametrize("program", COMMANDS)
@generated(14)
@given(data=st.data())
def test_other_commands_with_nonsense(program, here, data, monkeypatch):
    """One argument, be it a flag or its value, becomes nonsense, is left out or given twice."""
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)
    main, arguments = COMMANDS[program]
    place = data.draw(st.integers(0, len(arguments) - 1))
    instead = data.draw(
        st.one_of(
            st.just([]), NONSENSE_VALUES.map(lambda value: [value]), st.just([arguments[place]] * 2)
        )
    )
    before = set(here.iterdir())
    with leaving_files_alone(here):
        ending = ending_of(main, [*arguments[:place], *instead, *arguments[place + 1 :]])
        for path in set(here.iterdir()) - before:  # a download that was begun can be gone on with
            assert (
                program == "data.download"
                and path.name.endswith(".partial")
                and not path.read_bytes()
            )
            path.unlink()
    assert_refused(ending, program)


def experiment_flags() -> list[str]:
    def flags(parser: argparse.ArgumentParser) -> list[str]:
        return [
            action.dest
            for action in parser._actions
            if action.option_strings and action.dest != "help"
        ]

    return sorted({*flags(disentanglement.make_parser()), *flags(train.make_parser())})


@pytest.mark.parametrize("name", experiment_flags())
def test_the_experiment_with_a_nonsense_value(name, here, images, monkeypatch):
    """It checks everything before the first of its runs begins, of which none begins here."""
    monkeypatch.setattr(disentanglement, "carry_out", lambda *_: [])
    monkeypatch.setattr(disentanglement_results, "main", lambda *_: None)
    arguments = [*TINY_BETA[2:], "--root", images, "--output_dir", tempfile.mkdtemp(dir=here)]
    with leaving_files_alone(here, images):
        ending = ending_of(disentanglement.main, [*arguments, *values_of(name, 1)[0]])
    assert_told(
        ending, "train.py" if ending.err.startswith("train.py: error: ") else "train_3dshapes.sh"
    )
