"""The disentanglement scores of a trained model's representation (paper, section 6, Figure 7)."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..DisentanglementVAE import DisentanglementVAE
from ..DisentanglementVAE.metrics import (
    METRICS,
    TITLES,
    FactorData,
    MetricError,
    encode_all,
    factor_sizes,
)
from .registry import Context, Evaluation, Flag, Result, register
from .tables import Table, as_bits, as_text, as_words

DEFAULT_METRICS = ["beta_vae", "factor_vae", "mig", "sap"]  # without dci, which takes minutes


def _score_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each metric: its score, and what else it found."""
    rows = []
    for name, values in metrics.items():
        others = ", ".join(
            f"{as_words(key)} {as_text(value)}" for key, value in values.items() if key != "score"
        )
        score = as_bits(values.get("score"))
        rows.append((TITLES.get(name, name), (score, others) if others else score))
    return Table("Scores", ("metric", "score"), rows)


@register
class Disentanglement(Evaluation):
    name = "disentanglement"
    help = "scores of a disentanglement VAE's representation, against the factors of all scenes"
    order = 30
    flags = (
        Flag(
            "metrics",
            "which scores",
            type=str,
            default=DEFAULT_METRICS,
            unique=True,
            arguments={"nargs": "+", "choices": METRICS},
        ),
        Flag(
            "levels",
            "only so many levels of each factor, evenly spread, to be quick; default: all",
            arguments={"nargs": "+"},
        ),
    )
    needs = ("training",)
    packages = {"sklearn": "metrics"}
    only_disentanglement = True
    title = "Disentanglement"
    paper = "Figure 7"
    explanation = (
        "How well the posterior means separate the factors that the scenes were made from, 1 being "
        "best and, for BetaVAE and FactorVAE, one over the number of factors chance (Locatello et "
        "al. 2019)."
    )
    facts = {
        "levels": ("levels of each factor", as_text),
        "seconds_per_metric": (
            "seconds",
            lambda times: ", ".join(f"{as_words(k)} {v:g}" for k, v in times.items()),
        ),
    }
    tables = {"scores": _score_table}

    def prepare(self, context: Context) -> None:
        scenes, levels = context.training, context.flags.levels
        context.kept["scenes"] = FewerLevels(scenes, levels) if levels else scenes

    def compute(self, context: Context) -> Result:
        scenes = context.kept["scenes"]
        with context.bar(math.prod(scenes.factor_sizes), "encoded") as bar:
            result = disentanglement_scores(
                context.model,
                scenes,
                context.flags.metrics,
                seed=context.flags.seed,
                progress=bar.update,
            )
        for remark in result["remarks"]:
            print(f"note: {remark}", file=sys.stderr)
        return result

    def lines(self, result: Result, context: Context) -> list[str]:
        return [f"{name}: {values['score']:.4f}" for name, values in result["scores"].items()]


class FewerLevels:
    """A data set of factors with only some levels of each, evenly spread from the first to the
    last.

    Arguments:
        data: All levels.
        levels: How many of each factor, from 2 to all.

    Raises:
        MetricError: if that cannot be.
    """

    def __init__(self, data: FactorData, levels: Sequence[int]):
        sizes = factor_sizes(data)
        if len(levels) != len(sizes) or not all(
            2 <= n <= size for n, size in zip(levels, sizes, strict=True)
        ):
            shown = [" ".join(map(str, numbers)) for numbers in (sizes, levels)]
            raise MetricError(
                f"--levels must be {len(sizes)} numbers from 2 to {shown[0]}; got {shown[1]}"
            )
        self.factor_sizes = tuple(levels)
        self._data = data
        self._kept = [
            np.linspace(0, size - 1, n).round().astype(int)
            for n, size in zip(levels, sizes, strict=True)
        ]

    def images(self, factors: np.ndarray) -> Tensor:
        """Images uint8 [N, 3, H, W] of the kept levels `factors`, int64 [N, F]."""
        return self._data.images(
            np.stack([kept[factors[:, i]] for i, kept in enumerate(self._kept)], axis=1)
        )


def disentanglement_scores(
    model: DisentanglementVAE,
    data: FactorData,
    metrics: Sequence[str],
    *,
    seed: int,
    progress: Callable[[int], Any],
) -> dict[str, Any]:
    """Scores of the posterior means, each metric at the sizes of Locatello et al. 2019.

    Arguments:
        data: Its images are all encoded, once.
        metrics: Names of `METRICS`.
        seed: Of the metrics' draws.
        progress: Called with the number of images after each batch that is encoded.

    Returns:
        `scores`: what each metric gives, by its name; `levels` of each factor, number of `images`,
        `remarks` on scores that say little, and `seconds_per_metric` and of the encoding.
    """

    @torch.no_grad()
    def represent(images: Tensor) -> Tensor:
        codes = model.represent(model.observation.encode(images.to(model.device)).to(model.dtype))
        progress(len(images))
        return codes

    start = time.perf_counter()
    codes = encode_all(represent, data)
    scores, remarks, seconds = {}, [], {"encoding": time.perf_counter() - start}
    for name in metrics:
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            scores[name] = METRICS[name](codes, data, seed=seed)
        remarks += [
            f"{name}: {warning.message}" for warning in caught if warning.category is UserWarning
        ]
        seconds[name] = time.perf_counter() - start
    return {
        "scores": scores,
        "remarks": remarks,
        "levels": list(data.factor_sizes),
        "images": len(codes),
        "seconds_per_metric": {name: round(value, 2) for name, value in seconds.items()},
    }
