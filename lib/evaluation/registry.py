"""The evaluations that `evaluate.py` offers: every module of this folder that registers one.

A new evaluation is one file in this folder with a subclass of `Evaluation` under `@register`. Its
flags, its line in `--help`, its part of `results.json` and its section of the report follow.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..DisentanglementVAE import DisentanglementVAE
from ..models import VAE
from ..optional import optional
from ..ranges import ConfigError, Range, at_most, check_number
from .importance import pick_chunk
from .loading import LoadedModel
from .tables import Facts, Table

LARGEST_NUMBER = 10**9
LARGEST_BATCH = 32  # unless `--batch` is given

Result = dict[str, Any]


@dataclass(frozen=True)
class Flag:
    """A flag of one or several evaluations; those that share one name the same object.

    Arguments:
        least, most: The range of its value, or of each of its values.
        unique: Whether a value that is given twice counts once.
        arguments: Further arguments of `ArgumentParser.add_argument`.
    """

    name: str
    help: str
    type: Callable[[str], Any] = int
    default: Any = field(default=None, hash=False)
    least: float | None = None
    most: float = LARGEST_NUMBER
    unique: bool = False
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)

    def check(self, flags: argparse.Namespace) -> None:
        """Raises ConfigError if a value is out of range; drops what is given twice."""
        given = getattr(flags, self.name)
        if given is None:
            return
        values = given if isinstance(given, list) else [given]
        ranges = [at_most(self.most)]
        if self.least is not None:
            text = f"at least {self.least}" if self.least else "0 or more"
            ranges.insert(0, Range(text, self.least))
        for value in values:
            if isinstance(value, int | float):
                check_number(self.name, value, ranges, " ".join(map(str, values)))
        if self.unique:
            setattr(flags, self.name, list(dict.fromkeys(given)))


@dataclass
class Context:
    """What the evaluations of one command work with.

    Arguments:
        loaded: The model on its device, in evaluation mode, and where it is from.
        flags: Of the command.
        folder: Where results and pictures go.
        open_split: Opens "train" or "validation" of the model's data set: uint8 images [3, H, W] by
            index, or a data set of factors.
        in_batches: Called with (data set, number of images, batch size); gives (uint8 images [B, 3,
            H, W], their indices [B]), nothing augmented.
        reopen: Called with a device's name in another process; gives the model and the validation
            images. It can be pickled.
        mirrored: Whether training shows the images flipped left to right, too.
        fit: How pictures of other sizes are made to the model's, see `lib.picture_files`.
    """

    loaded: LoadedModel
    flags: argparse.Namespace
    folder: Path
    open_split: Callable[[str], Any]
    in_batches: Callable[[Dataset, int, int], Iterable[tuple[Tensor, Tensor]]]
    reopen: Callable[[str], tuple[VAE, Dataset]]
    mirrored: bool = False
    fit: str = "crop"
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> VAE:
        return self.loaded.model

    @property
    def depth(self) -> int:
        """Number of layers of latents."""
        return len(self.model.latent_shapes)

    @property
    def noise(self) -> dict[str, int]:
        """The arguments of the functions of `lib.synthesis` that say which noise, and how many
        images at a time."""
        return {"seed": self.flags.seed, "batch": self.flags.batch}

    @cached_property
    def validation(self) -> Dataset:
        return self.open_split("validation")

    @cached_property
    def training(self) -> Any:
        """The training images, or the scenes of a data set of factors."""
        return self.open_split("train")

    @cached_property
    def images(self) -> Tensor:
        """The images of `--images`, uint8 [N, C, H, W]: of the validation split, or of files."""
        numbers = [index for index in self.flags.images if isinstance(index, int)]
        size = len(self.validation) if numbers else 0
        wrong = [index for index in numbers if index >= size]
        if wrong:
            raise ConfigError(
                f"--images must be below {size}, the number of validation images; got {wrong[0]}"
            )
        return torch.stack(
            [
                self.validation[image] if isinstance(image, int) else self.picture("images", image)
                for image in self.flags.images
            ]
        )

    @property
    def image_keys(self) -> list[int]:
        """What the noise of each of the images depends on: its number, or for files numbers that
        no validation image has."""
        return [
            image if isinstance(image, int) else LARGEST_NUMBER + position
            for position, image in enumerate(self.flags.images)
        ]

    @property
    def image_names(self) -> list[str]:
        """Each of the images as the names of pictures have it: its number, or its file's stem."""
        names = []
        for image in self.flags.images:
            name = str(image) if isinstance(image, int) else Path(image).stem
            names.append(re.sub(r"[^\w.-]", "_", name)[:60])
        return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]

    def picture(self, flag: str, path: str) -> Tensor:
        """A picture file that a flag names, fitted to the model's images: uint8 [C, H, W]."""
        from ..pictures import load_image

        try:
            return load_image(path, self.model.image_shape, self.fit)
        except ValueError as error:
            raise ConfigError(f"--{flag}: {error}") from None

    @property
    def limit(self) -> int:
        """Number of validation images to evaluate."""
        return min(len(self.validation), self.flags.limit or len(self.validation))

    def track(self, loop: Iterable[Any], title: str) -> Iterable[Any]:
        """The loop, with its progress shown under a title."""
        from ..progress import progress

        return progress(loop, desc=title)

    def bar(self, images: int, title: str) -> Any:
        """A bar of the progress over so many images; a context manager."""
        from ..progress import progress

        return progress(total=images, unit="image", desc=title, smoothing=0)

    def entry(self, path: Path, caption: str) -> dict[str, str]:
        """A picture as results name it."""
        return {"file": path.relative_to(self.folder).as_posix(), "caption": caption}


class Evaluation:
    """One evaluation. A subclass sets the attributes, gives `compute`, and what else it needs.

    Attributes:
        name: Its flag, and its key in `results.json`.
        help: Its line in `--help` and in the table of docs/evaluation.md.
        order: Evaluations run, and stand in the report, by this number.
        flags: Flags that it takes.
        needs: Which of the context's data are opened before anything is computed: "validation",
            "training" (images, or the scenes of a data set of factors), "images".
        packages: Packages that it imports only when it runs, and which of this project's extras
            brings each.
        only_disentanglement: Whether it is for models of `--task disentanglement` alone.
        uses_batch: Whether it computes `--batch` images at a time.
        title, paper, explanation: Of its section of the report.
        facts: Label, and what makes a text of the value, of results that are not in `tables.FACTS`.
        tables: What makes a table of a result, by the result's key.
        symbol: Of its `bits_per_dim` among the report's main numbers; empty if it is none of them.
    """

    name: str
    help: str
    order: int = 1000
    flags: Sequence[Flag] = ()
    needs: Sequence[str] = ()
    packages: Mapping[str, str] = {}
    only_disentanglement = False
    uses_batch = True
    title: str
    paper = ""
    explanation = ""
    facts: Facts = {}
    tables: Mapping[str, Callable[[Any], Table]] = {}
    symbol = ""

    def check(self, flags: argparse.Namespace) -> None:
        """Raises ConfigError if flags contradict each other; called if the evaluation is asked
        for, before anything is opened."""

    def prepare(self, context: Context) -> None:
        """Raises ConfigError if the flags do not fit the model or the data, before anything is
        computed."""

    def compute(self, context: Context) -> Result:
        """Plain values of JSON. "pictures" are what `Context.entry` gives."""
        raise NotImplementedError

    def lines(self, result: Result, context: Context) -> list[str]:
        """What is printed of a result, beside the paths of its pictures."""
        return []


_REGISTERED: dict[str, Evaluation] = {}


def register(kind: type[Evaluation]) -> type[Evaluation]:
    """Adds an evaluation to those that `evaluate.py` offers; a decorator."""
    _REGISTERED[kind.name] = kind()
    return kind


def evaluations() -> dict[str, Evaluation]:
    """All evaluations by name, in the order in which they run and are reported."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    ordered = sorted(_REGISTERED.values(), key=lambda one: (one.order, one.name))
    return {evaluation.name: evaluation for evaluation in ordered}


def prepare(asked: Sequence[Evaluation], context: Context) -> None:
    """Checks what depends on the model and the data, before anything is computed."""
    flags, loaded = context.flags, context.loaded
    for evaluation in asked:
        if evaluation.only_disentanglement and not isinstance(loaded.model, DisentanglementVAE):
            raise ConfigError(
                f"--{evaluation.name} is for models of --task disentanglement; this one is of "
                f"{loaded.config.task}"
            )
        for package, extra in evaluation.packages.items():
            optional(package, f"--{evaluation.name}", extra, ConfigError)
    if flags.report:
        optional("jinja2", "--report", "evaluate", ConfigError)
    if flags.batch is None and any(evaluation.uses_batch for evaluation in asked):
        flags.batch = min(LARGEST_BATCH, pick_chunk(loaded.model))
    for evaluation in asked:
        for need in evaluation.needs:
            getattr(context, need)
        evaluation.prepare(context)
