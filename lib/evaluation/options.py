"""The flags of `evaluate.py`, and what can be said of them before anything is opened."""

from __future__ import annotations

import argparse

from ..cli import OneLineParser
from ..config import ConfigError
from ..DisentanglementVAE.metrics import METRICS
from ..nn import BACKENDS
from ..synthesis import OUTPUTS

# In the order in which they run and are reported.
TASKS = {
    "elbo": "negative ELBO on the validation images, bits/dim (and nats)",
    "likelihood": "importance-weighted likelihood, bits/dim; interrupted, the same command goes on",
    "disentanglement": "scores of a disentanglement VAE's representation, against the factors of all scenes",
    "latents": "KL of each layer or latent dimension, as a bar plot",
    "reconstruction": "validation images beside their reconstructions",
    "sampling": "samples from the prior: grids and single images",
    "interpolation": "between pairs of validation images, in the top layers",
    "traversal": "what each latent dimension of a disentanglement VAE changes in validation images",
    "neighborhood": "samples around validation images that share their top layers",
    "overfitting": "training images nearest to samples",
}
ONLY_DISENTANGLEMENT = ("disentanglement", "traversal")
DEFAULT_METRICS = ["beta_vae", "factor_vae", "mig", "sap"]  # without dci, which takes minutes
LARGEST_NUMBER = 10**9


def make_parser(description: str) -> OneLineParser:
    parser = OneLineParser("evaluate.py", description=description)
    which = parser.add_argument_group("What to evaluate").add_mutually_exclusive_group(
        required=True
    )
    which.add_argument(
        "--model",
        metavar="NAME",
        help="checkpoints/NAME.ckpt, or experiment NAME's best checkpoint",
    )
    which.add_argument("--checkpoint", metavar="PATH", help="a checkpoint file")

    tasks = parser.add_argument_group("Evaluations")
    for name, meaning in TASKS.items():
        tasks.add_argument(f"--{name}", action="store_true", help=meaning)
    tasks.add_argument(
        "--report", action="store_true", help="an HTML page of these and earlier results"
    )

    options = parser.add_argument_group("Options of some evaluations")
    options.add_argument(
        "--limit",
        type=int,
        default=None,
        help="--elbo, --likelihood, --latents: first LIMIT images",
    )
    options.add_argument(
        "--importance_samples", type=int, default=1024, help="--likelihood: samples of each image"
    )
    options.add_argument(
        "--chunk", type=int, default=None, help="--likelihood: rows at a time; default: what fits"
    )
    options.add_argument(
        "--processes", type=int, default=1, help="--likelihood: processes; with GPUs one on each"
    )
    options.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=DEFAULT_METRICS,
        help="--disentanglement: which scores",
    )
    options.add_argument(
        "--levels",
        type=int,
        nargs="+",
        default=None,
        help="--disentanglement: only so many levels of each factor, evenly spread, to be quick; default: all",
    )
    options.add_argument(
        "--count", type=int, default=64, help="samples at each temperature; reconstructions"
    )
    temperatures = "of what is drawn; default: 0.6 0.7 0.8 0.9 1 for samples, else 0.6 0.8 1; 1 with a single layer"
    options.add_argument("--temperatures", type=float, nargs="+", default=None, help=temperatures)
    options.add_argument(
        "--output", choices=OUTPUTS, default=OUTPUTS[0], help="--sampling, --overfitting: pixels"
    )
    options.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3],
        help="--interpolation (in pairs), --traversal, --neighborhood: which images",
    )
    options.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=None,
        help="--interpolation, --neighborhood: how many top layers; default: an eighth, a quarter, half of them",
    )
    options.add_argument(
        "--frames", type=int, default=8, help="--interpolation, --traversal: images in a row"
    )
    options.add_argument(
        "--queries", nargs="+", metavar="PATH", help="--overfitting: pictures instead of samples"
    )
    options.add_argument(
        "--neighbors", type=int, default=3, help="--overfitting: training images for each query"
    )

    options = parser.add_argument_group("Options")
    options.add_argument(
        "--batch", type=int, default=None, help="images at a time; default: what fits, at most 32"
    )
    options.add_argument("--seed", type=int, default=0, help="of all noise")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    options.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="implementation of the sweeps"
    )
    options.add_argument(
        "--root", default=None, help="folder that holds the data sets; default: as in training"
    )
    options.add_argument("--num_workers", type=int, default=0, help="loader processes")
    options.add_argument("--output_dir", default=".", help="where checkpoints/ and figs/ are")
    return parser


def check(flags: argparse.Namespace) -> None:
    """Raises ConfigError if flags are out of range or contradict each other; drops what is given
    twice."""
    if not flags.report and not any(getattr(flags, task) for task in TASKS):
        raise ConfigError(
            f"nothing to do: ask for {', '.join(f'--{task}' for task in TASKS)} or --report"
        )
    for name in (
        "importance_samples",
        "count",
        "batch",
        "processes",
        "neighbors",
        "limit",
        "chunk",
    ):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1; got {value}")
        if value is not None and value > LARGEST_NUMBER:
            raise ConfigError(f"--{name} must be at most {LARGEST_NUMBER}; got {value}")
    if flags.frames < 2:
        raise ConfigError(f"--frames must be at least 2; got {flags.frames}")
    if flags.num_workers < 0:
        raise ConfigError(f"--num_workers must be 0 or more; got {flags.num_workers}")
    if flags.temperatures and not all(
        0 <= temperature < float("inf") for temperature in flags.temperatures
    ):
        raise ConfigError(
            f"--temperatures must be 0 or more; got {' '.join(map(str, flags.temperatures))}"
        )
    if min(flags.images) < 0:
        raise ConfigError(f"--images must be 0 or more; got {min(flags.images)}")
    if flags.interpolation and len(flags.images) % 2:
        raise ConfigError(f"--interpolation takes --images in pairs; got {len(flags.images)}")
    if flags.processes > 1 and flags.device.startswith("cuda:"):
        raise ConfigError(
            f"--processes {flags.processes} uses all GPUs: give --device cuda; got {flags.device}"
        )
    if flags.model == "":
        raise ConfigError("--model must be a name; got an empty one")
    for name in ("temperatures", "layers", "metrics"):
        if getattr(flags, name):
            setattr(flags, name, list(dict.fromkeys(getattr(flags, name))))
