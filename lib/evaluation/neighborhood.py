"""Samples around validation images that share their top layers (Figures 6 right, 11)."""

from __future__ import annotations

import torch

from ..config import ConfigError
from ..pictures import save_table
from ..synthesis import encode, neighborhood, reconstruct
from .options import IMAGES, LAYERS, TEMPERATURES, layer_temperatures, layers_of
from .registry import Context, Evaluation, Result, register


@register
class Neighborhood(Evaluation):
    name = "neighborhood"
    help = "samples around validation images that share their top layers"
    order = 90
    flags = (TEMPERATURES, IMAGES, LAYERS)
    needs = ("images",)
    title = "Neighbourhood of validation images"
    paper = "Figures 6 (right) and 11"
    explanation = (
        "The reconstruction of an image in the centre of a 3 × 3 grid, and around it images that "
        "share its latents in the top layers while the layers below are drawn from the prior."
    )

    def prepare(self, context: Context) -> None:
        if context.depth == 1:
            raise ConfigError(
                "--neighborhood keeps some layers of a model with several; this one has one"
            )
        layers_of(context)

    def compute(self, context: Context) -> Result:
        """For each image a table of 3x3 grids: numbers of kept layers by temperatures.

        In the centre of each grid is the image's reconstruction, around it are eight images that
        share the latents of its top layers.
        """
        model, images, keys = context.model, context.images, context.image_keys
        layers, temperatures = layers_of(context), layer_temperatures(context)
        latents = encode(model, images, keys, **context.noise)
        centres = reconstruct(model, images, indices=keys, **context.noise)
        pictures = []
        for i, name in enumerate(context.track(context.image_names, "neighborhoods")):
            own = [z[i : i + 1] for z in latents]
            rows = []
            for k in layers:
                cells = []
                for temperature in temperatures:
                    around = neighborhood(
                        model,
                        own,
                        index=keys[i],
                        layers=k,
                        temperature=temperature,
                        count=8,
                        **context.noise,
                    )
                    cells.append(torch.cat([around[:4], centres[i : i + 1], around[4:]]))
                rows.append(cells)
            path = save_table(
                rows,
                context.folder / f"neighborhood_{name}.png",
                row_labels=[f"{k} {'layer' if k == 1 else 'layers'}" for k in layers],
                column_labels=[f"T = {t:g}" for t in temperatures],
            )
            caption = (
                f"Around image {name}: its reconstruction (centres) and samples that "
                "share its top layers"
            )
            pictures.append(context.entry(path, caption))
        return {
            "images": list(context.flags.images),
            "layers": list(layers),
            "temperatures": list(temperatures),
            "pictures": pictures,
        }
