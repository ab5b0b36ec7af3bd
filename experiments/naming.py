"""Names of the runs of the disentanglement experiment: the one place that makes and reads them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

DECODERS = ("cnn", "sdn")
PATTERN = re.compile(
    r"(?P<name>.+)_(?P<decoder>cnn|sdn)_beta(?P<beta>[^_]+)_seed(?P<seed>\d+)", re.ASCII | re.DOTALL
)


@dataclass(frozen=True)
class Run:
    """One β-VAE of the experiment.

    Arguments:
        name: Of the experiment; may contain underscores.
        decoder: "cnn" or "sdn".
        beta: Final weight of the KL, in at most six significant digits, so that the folder tells it
            exactly.
        seed: At least 0.

    Raises:
        ValueError: if the folder's name could not be read back.
    """

    name: str
    decoder: str
    beta: float
    seed: int

    def __post_init__(self):
        if not self.name or "/" in self.name:
            raise ValueError(
                f"an experiment's name is not empty and has no slash; got {self.name!r}"
            )
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder is one of {', '.join(DECODERS)}; got {self.decoder!r}")
        told = math.isfinite(self.beta) and float(f"{self.beta:g}") == self.beta
        if not told or self.beta < 0:
            what = "finite, not negative and has at most six significant digits"
            raise ValueError(f"beta is {what}; got {self.beta}")
        if self.seed < 0:
            raise ValueError(f"seed is not negative; got {self.seed}")

    @property
    def folder(self) -> str:
        """The run's folder under checkpoints/ and figs/."""
        return f"{self.name}_{self.decoder}_beta{self.beta:g}_seed{self.seed}"

    @classmethod
    def parse(cls, folder: str) -> Run | None:
        """The run whose folder has this name; None if it is not one that `folder` writes."""
        match = PATTERN.fullmatch(folder)
        if match is None:
            return None
        try:
            run = cls(match["name"], match["decoder"], float(match["beta"]), int(match["seed"]))
        except ValueError:
            return None
        return run if run.folder == folder else None
