"""The training images nearest to samples, or to given pictures (paper, Figure 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..pictures import save_table
from ..synthesis import sample_images
from .nearest import Neighbours, nearest_images
from .options import COUNT, OUTPUT, SAMPLING_TEMPERATURES, TEMPERATURES
from .registry import Context, Evaluation, Flag, Result, register
from .sampling import samples_name
from .tables import Table, as_count, as_error, as_text

SEARCH_BATCH = 256  # training images, which pass through no model


def _neighbour_table(queries: Sequence[Sequence[Mapping[str, Any]]]) -> Table:
    ranks = range(1, max(map(len, queries), default=0) + 1)
    rows = []
    for number, neighbours in enumerate(queries, 1):
        cells = [
            (str(n["index"]), as_error(n["mse"]) + (", mirrored" if n["mirrored"] else ""))
            for n in neighbours
        ]
        rows.append([str(number), *cells, *[""] * (len(ranks) - len(cells))])
    head = ["query", *("nearest" if rank == 1 else f"number {rank}" for rank in ranks)]
    return Table("Index of each training image, and mean squared error", head, rows)


@register
class Overfitting(Evaluation):
    name = "overfitting"
    help = "training images nearest to samples"
    order = 100
    flags = (
        COUNT,
        TEMPERATURES,
        OUTPUT,
        Flag(
            "queries",
            "pictures instead of samples, which are fitted to the model's size",
            type=str,
            arguments={"nargs": "+", "metavar": "PATH"},
        ),
        Flag("neighbors", "training images for each query", default=3, least=1),
    )
    needs = ("training",)
    title = "Nearest training images"
    paper = "Figure 9"
    explanation = (
        "Samples or given images, each followed by the training images that are nearest to it in "
        "mean squared error: samples of a model that has memorized its training images would be "
        "copies of them."
    )
    facts = {
        "searched": ("training images searched", as_count),
        "mirrored_too": ("compared with their mirror images, too", as_text),
        "nearest_mse": ("smallest mean squared error, levels 0 to 255", as_error),
        "median_mse": ("median of the nearest images' errors", as_error),
    }
    tables = {"neighbours": _neighbour_table}

    def prepare(self, context: Context) -> None:
        there, count = len(context.training), context.flags.neighbors
        if there < count:
            name = context.loaded.config.dataset
            raise ConfigError(f"--neighbors {count}: {name} has {there} training images")
        if context.flags.queries:
            context.kept["queries"] = _given_queries(context)

    def compute(self, context: Context) -> Result:
        """The nearest training images of each query, by mean squared error in the model's bits."""
        flags, observation = context.flags, context.model.observation
        if flags.queries:
            queries = {"queries": context.kept["queries"]}
        else:
            temperatures = flags.temperatures or SAMPLING_TEMPERATURES
            queries = {
                samples_name(temperature): sample_images(
                    context.model, flags.count, temperature, output=flags.output, **context.noise
                )
                for temperature in context.track(temperatures, "samples")
            }
        size = len(context.training)
        with context.bar(size, "training images") as bar:
            found = nearest_images(
                torch.cat(list(queries.values())),
                context.in_batches(context.training, size, SEARCH_BATCH),
                count=flags.neighbors,
                device=context.model.device,
                mirror=context.mirrored,
                prepare=lambda images: observation.to_uint8(observation.encode(images)),
                progress=bar.update,
            )
        return {
            "searched": found.searched,
            "mirrored_too": context.mirrored,
            "nearest_mse": found.mse[:, 0].min().item(),
            "median_mse": found.mse[:, 0].median().item(),
            "neighbours": [
                [
                    {"index": index, "mse": mse, "mirrored": mirrored}
                    for index, mse, mirrored in zip(*of_query, strict=True)
                ]
                for of_query in zip(
                    found.indices.tolist(), found.mse.tolist(), found.mirrored.tolist(), strict=True
                )
            ],
            "pictures": _pictures(context, queries, found),
        }


def _given_queries(context: Context) -> Tensor:
    """The pictures of `--queries` in the model's bits, uint8 [N, 3, H, W]."""
    model = context.model
    queries = [context.picture("queries", path) for path in context.flags.queries]
    return model.observation.to_uint8(model.observation.encode(torch.stack(queries)))


def _pictures(
    context: Context, queries: dict[str, Tensor], found: Neighbours
) -> list[dict[str, str]]:
    """For each kind of query a picture: each query, and to its right its nearest images."""
    pictures, columns = [], 1 + found.images.shape[1]
    parts = found.images.split([len(images) for images in queries.values()])
    for (name, images), neighbours in zip(queries.items(), parts, strict=True):
        groups = torch.cat([images.unsqueeze(1), neighbours], dim=1)  # [N, columns, 3, H, W]
        rows = [list(part) for part in groups.split(max(1, 16 // columns))]
        path = save_table(rows, context.folder / f"nearest_{name}.png", columns=columns)
        caption = f"{name}: each image (left) and its nearest training images, the nearest first"
        pictures.append(context.entry(path, caption))
    return pictures
