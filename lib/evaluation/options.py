"""The flags of `evaluate.py`: those that several evaluations share, and the parser of all."""

from __future__ import annotations

import argparse

from ..cli import OneLineParser
from ..config import ConfigError
from ..nn import BACKENDS
from ..synthesis import OUTPUTS
from .registry import Context, Evaluation, Flag, evaluations

LIMIT = Flag("limit", "first LIMIT images", least=1)
COUNT = Flag(
    "count", "samples at each temperature; reconstructions", default=64, least=1, most=10**6
)
TEMPERATURES = Flag(
    "temperatures",
    "of what is drawn; default: 0.6 0.7 0.8 0.9 1 for samples, else 0.6 0.8 1; 1 with a single "
    "layer",
    type=float,
    least=0,
    unique=True,
    arguments={"nargs": "+"},
)
OUTPUT = Flag("output", "pixels", type=str, default=OUTPUTS[0], arguments={"choices": OUTPUTS})


def number_or_path(text: str) -> int | str:
    """A value of `--images`: the number of a validation image, or the path of a picture."""
    try:
        return int(text)
    except ValueError:
        return text


IMAGES = Flag(
    "images",
    "numbers of validation images, or paths of pictures, which are fitted to the model's size; of "
    "an interpolation in pairs; of --reconstruction only if there are paths",
    type=number_or_path,
    default=[0, 1, 2, 3],
    least=0,
    arguments={"nargs": "+", "metavar": "NUMBER_OR_PATH"},
)
LAYERS = Flag(
    "layers",
    "how many top layers; default: an eighth, a quarter, half of them",
    unique=True,
    arguments={"nargs": "+"},
)
FRAMES = Flag("frames", "images in a row", default=8, least=2, most=10**6)

BATCH = Flag("batch", "images at a time; default: by the model's size, at most 32", least=1)
NUM_WORKERS = Flag("num_workers", "loader processes", default=0, least=0, most=1024)

SAMPLING_TEMPERATURES = [0.6, 0.7, 0.8, 0.9, 1.0]
LAYER_TEMPERATURES = [0.6, 0.8, 1.0]


def layers_of(context: Context) -> list[int]:
    """The numbers of top layers of `--layers`, checked against the model."""
    depth, layers = context.depth, context.flags.layers
    if layers is None:
        return sorted({max(1, depth // 8), max(1, depth // 4), max(1, depth // 2)})
    wrong = [k for k in layers if k not in range(1, depth + 1)]
    if wrong:
        raise ConfigError(
            f"--layers must be 1 ... {depth} (the model's depth); got {' '.join(map(str, wrong))}"
        )
    return layers


def layer_temperatures(context: Context) -> list[float]:
    """The temperatures of layers that are drawn below given ones."""
    return context.flags.temperatures or (LAYER_TEMPERATURES if context.depth > 1 else [1.0])


def add_model_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags that say which model, `--model` or `--checkpoint`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model",
        metavar="NAME",
        help="checkpoints/NAME.ckpt, or experiment NAME's best checkpoint",
    )
    which.add_argument(
        "--checkpoint", metavar="PATH", help="a checkpoint file, or a folder of publish.py"
    )


def make_parser(description: str) -> OneLineParser:
    parser = OneLineParser("evaluate.py", description=description)
    add_model_flags(parser.add_argument_group("What to evaluate"))

    tasks = parser.add_argument_group("Evaluations")
    for name, evaluation in evaluations().items():
        tasks.add_argument(f"--{name}", action="store_true", help=evaluation.help)
    tasks.add_argument(
        "--report", action="store_true", help="an HTML page of these and earlier results"
    )

    options = parser.add_argument_group("Options of some evaluations")
    for flag, takers in _flags().items():
        _add(options, flag, ", ".join(f"--{name}" for name in takers) + ": ")

    options = parser.add_argument_group("Options")
    _add(options, BATCH)
    options.add_argument("--seed", type=int, default=0, help="of all noise")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    options.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="implementation of the sweeps"
    )
    options.add_argument(
        "--root", default=None, help="folder that holds the data sets; default: as in training"
    )
    _add(options, NUM_WORKERS)
    options.add_argument("--output_dir", default=".", help="where checkpoints/ and figs/ are")
    return parser


def check(flags: argparse.Namespace) -> list[Evaluation]:
    """The evaluations that are asked for.

    Raises:
        ConfigError: if flags are out of range or contradict each other.
    """
    known = evaluations()
    asked = [evaluation for name, evaluation in known.items() if getattr(flags, name)]
    if not asked and not flags.report:
        raise ConfigError(
            f"nothing to do: ask for {', '.join(f'--{name}' for name in known)} or --report"
        )
    for flag in (*_flags(), BATCH, NUM_WORKERS):
        flag.check(flags)
    for evaluation in asked:
        evaluation.check(flags)
    return asked


def _flags() -> dict[Flag, list[str]]:
    """Every flag of an evaluation, with the names of those that take it."""
    takers: dict[Flag, list[str]] = {}
    for name, evaluation in evaluations().items():
        for flag in evaluation.flags:
            takers.setdefault(flag, []).append(name)
    return takers


def _add(group: argparse._ArgumentGroup, flag: Flag, whose: str = "") -> None:
    group.add_argument(
        f"--{flag.name}",
        type=flag.type,
        default=flag.default,
        help=whose + flag.help,
        **flag.arguments,
    )
