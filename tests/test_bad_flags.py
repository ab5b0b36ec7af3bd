"""Every flag of every command with nonsense for a value: one line on stderr, status 2, no file
touched."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
from endings import assert_refused, assert_told, ending_of, generated, leaving_files_alone
from helpers import TINY, TINY_BETA
from hypothesis import example, given
from hypothesis import strategies as st

import evaluate
import train
from data import download, histogram
from data.convert import shapes3d, tfrecords
from experiments import disentanglement, disentanglement_results
from lib import released
from lib.config import TrainConfig
from lib.evaluation.options import make_parser

pytestmark = pytest.mark.slow

NUMBERS = "0 -1 -0 1 2 3 1.5 1e-400 1e400 -1e400 1e300 nan inf -inf 0x10 1_0 ١٢ 1,2".split()
NUMBERS += ["100000", "1000000000000", str(2**63), str(-(2**63) - 1), str(2**200), "9" * 5000]
WORDS = [
    "",
    " ",
    "-",
    "--",
    "---",
    "-x",
    "--depth",
    "two",
    "None",
    "True",
    "1 2",
    ".",
    "..",
    "...",
    "*",
    "~",
    "%s%n",
    "{}",
]
WORDS += [
    "'; touch pwned",
    "$(touch pwned)",
    "\0",
    "a\0b",
    "\n",
    "5\n",
    "a\nb",
    "a\r\nb",
    "\x1b[31m",
    "🦆",
    "ÿ",
    "\udcff",
]
WORDS += [
    "x" * 300,
    "x" * 5000,
    "absent",
    "file",
    "file/x",
    "absent/../file",
    "/dev/null",
    "/dev/null/x",
    "/proc/x/y",
]
SOME_TEXT = st.text(
    st.characters(exclude_characters="/"), max_size=20
)  # no way out of the test's folder
NONSENSE = (
    st.sampled_from(NUMBERS + WORDS) | SOME_TEXT | st.integers().map(str) | st.floats().map(str)
)
LISTS = st.lists(st.sampled_from(NUMBERS + WORDS) | st.integers(-3, 9).map(str), max_size=5)
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


def flag_and_values(name: str, data: st.DataObject) -> list[str]:
    """A flag with a value in one of the two spellings, or with any number of values."""
    if data.draw(st.integers(0, 3)) == 0:
        return [f"--{name}", *data.draw(LISTS)]
    value = data.draw(NONSENSE)
    return data.draw(st.sampled_from([[f"--{name}", value], [f"--{name}={value}"]]))


def check_train(here: Path, images: Path, arguments: list[str], tiny: list[str] = TINY) -> None:
    # Of a flag that is given twice the last counts.
    folder = tempfile.mkdtemp(dir=here)
    with leaving_files_alone(here, images):
        ending = ending_of(
            train.main, [*tiny, "--root", images, "--output_dir", folder, *arguments]
        )
    assert_told(ending, "train.py")
    assert not (here / "pwned").exists()


@pytest.mark.parametrize("name", FLAGS)
@generated(4)
@given(data=st.data())
def test_train_with_a_nonsense_value(name, here, images, until_training, data):
    check_train(here, images, flag_and_values(name, data))


@generated(40)
@given(names=st.lists(st.sampled_from(FLAGS), min_size=2, max_size=5), data=st.data())
def test_train_with_several_nonsense_values(here, images, until_training, names, data):
    check_train(
        here, images, [argument for name in names for argument in flag_and_values(name, data)]
    )


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
EVALUATION = "--batch 4 --limit 2 --count 2 --importance_samples 2 --temperatures 1".split()
EVALUATION += "--images 2 7 --layers 1 --frames 2 --neighbors 2".split()
TASKS_OF = {
    "--likelihood": ("importance_samples", "chunk", "processes"),
    "--interpolation": ("images", "layers", "frames", "interpolation"),
    "--neighborhood": ("neighborhood",),
    "--overfitting": ("queries", "neighbors"),
    "--sampling": ("output", "temperatures", "count", "output_dir", "model", "checkpoint"),
}


@pytest.mark.parametrize("name", EVALUATE_FLAGS)
@generated(4)
@given(data=st.data())
def test_evaluate_with_a_nonsense_value(name, here, images, finished, data):
    task = next((task for task, names in TASKS_OF.items() if name in names), "--elbo")
    which = (
        []
        if name in ("model", "checkpoint")
        else ["--checkpoint", finished / "checkpoints/tiny/best.ckpt"]
    )
    arguments = [
        task,
        *EVALUATION,
        "--output_dir",
        tempfile.mkdtemp(dir=here),
        *flag_and_values(name, data),
    ]
    numbers = [
        int(word)
        for word in arguments
        if isinstance(word, str) and word.isdecimal() and len(word) < 30
    ]
    if max(numbers) > 100 and name in (
        "count",
        "importance_samples",
        "processes",
        "frames",
        "num_workers",
    ):
        return  # they would be done, and take their time
    with leaving_files_alone(here, images, finished):
        ending = ending_of(evaluate.main, [*which, *arguments])
    assert_told(ending, "evaluate.py")
    assert not (here / "pwned").exists()


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
        st.one_of(st.just([]), NONSENSE.map(lambda value: [value]), st.just([arguments[place]] * 2))
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
@generated(1)
@given(data=st.data())
def test_the_experiment_with_a_nonsense_value(name, here, images, data, monkeypatch):
    """It checks everything before the first of its runs begins, of which none begins here."""
    monkeypatch.setattr(disentanglement, "carry_out", lambda *_: [])
    monkeypatch.setattr(disentanglement_results, "main", lambda *_: None)
    arguments = [*TINY_BETA[2:], "--root", images, "--output_dir", tempfile.mkdtemp(dir=here)]
    with leaving_files_alone(here, images):
        ending = ending_of(disentanglement.main, [*arguments, *flag_and_values(name, data)])
    assert_told(
        ending, "train.py" if ending.err.startswith("train.py: error: ") else "train_3dshapes.sh"
    )
