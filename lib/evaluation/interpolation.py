"""Between pairs of validation images, in the top layers (paper, Figure 5)."""

from __future__ import annotations

import argparse

from ..config import ConfigError
from ..pictures import save_table
from ..synthesis import encode, interpolate
from .options import FRAMES, IMAGES, LAYERS, TEMPERATURES, layer_temperatures, layers_of
from .registry import Context, Evaluation, Result, register


@register
class Interpolation(Evaluation):
    name = "interpolation"
    help = "between pairs of validation images, in the top layers"
    order = 70
    flags = (TEMPERATURES, IMAGES, LAYERS, FRAMES)
    needs = ("images",)
    title = "Interpolation between validation images"
    paper = "Figure 5"
    explanation = (
        "The latents of the two images at the ends of a row are mixed linearly in the top layers, "
        "and the layers below are drawn from the prior."
    )

    def check(self, flags: argparse.Namespace) -> None:
        if len(flags.images) % 2:
            raise ConfigError(f"--interpolation takes --images in pairs; got {len(flags.images)}")

    def prepare(self, context: Context) -> None:
        layers_of(context)

    def compute(self, context: Context) -> Result:
        """For each pair a picture: a row for each number of layers and temperature.

        Each row begins with the first image and ends with the second, with `--frames`
        interpolations between them. Of `--images`, 0 and 1 are a pair, 2 and 3, ...
        """
        images, names, frames = context.images, context.image_names, context.flags.frames
        layers, temperatures = layers_of(context), layer_temperatures(context)
        latents = encode(context.model, images, context.image_keys, **context.noise)
        rows_of = [(k, t) for k in layers for t in temperatures]
        pictures = []
        for pair in context.track(range(0, len(images) - 1, 2), "interpolations"):
            ends = [[z[i : i + 1] for z in latents] for i in (pair, pair + 1)]
            rows = []
            for k, temperature in rows_of:
                between = interpolate(
                    context.model,
                    *ends,
                    layers=k,
                    temperature=temperature,
                    frames=frames,
                    **context.noise,
                )
                rows.append([images[pair : pair + 1], between, images[pair + 1 : pair + 2]])
            first, second = names[pair], names[pair + 1]
            path = save_table(
                rows,
                context.folder / f"interpolation_{first}_{second}.png",
                row_labels=[
                    f"{k} {'layer' if k == 1 else 'layers'}, T = {t:g}" for k, t in rows_of
                ],
                columns=frames,
            )
            caption = (
                f"Images {first} and {second} (outermost) and interpolations of the "
                "top layers between"
            )
            pictures.append(context.entry(path, caption))
        return {
            "images": list(context.flags.images),
            "layers": list(layers),
            "temperatures": list(temperatures),
            "frames": frames,
            "pictures": pictures,
        }
