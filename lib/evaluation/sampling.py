"""Samples from the prior: a grid and single images at each temperature (Figures 6 left, 10)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import whole_file
from ..pictures import save_grid, save_image, square
from ..synthesis import sample_batches
from .options import COUNT, OUTPUT, SAMPLING_TEMPERATURES, TEMPERATURES
from .registry import Context, Evaluation, Flag, Result, register

MOST_IN_GRID = 1024


@register
class Sampling(Evaluation):
    name = "sampling"
    help = "samples from the prior: grids and single images"
    order = 60
    flags = (
        COUNT,
        TEMPERATURES,
        OUTPUT,
        Flag(
            "format",
            "single images: png, a folder of files, or npz, one file with the array arr_0, uint8 "
            "[N, H, W, C]",
            type=str,
            default="png",
            arguments={"choices": ("png", "npz")},
        ),
    )
    title = "Samples"
    paper = "Figures 6 (left) and 10"
    explanation = (
        "Images drawn from the model's prior; a lower temperature stays nearer to the prior's "
        "mean, so that images become smoother and more generic."
    )

    def compute(self, context: Context) -> Result:
        """Each image is written as soon as it is drawn; only those of the grid stay in memory."""
        flags, folder, pictures = context.flags, context.folder, []
        temperatures = flags.temperatures or SAMPLING_TEMPERATURES
        for temperature in temperatures:
            name = samples_name(temperature)
            batches = sample_batches(
                context.model, flags.count, temperature, output=flags.output, **context.noise
            )
            write = write_npz if flags.format == "npz" else write_folder
            with context.bar(flags.count, name) as bar:
                first = write(batches, folder / name, flags.count, bar.update)
            grid = save_grid(first, folder / f"{name}.png", square(len(first)))
            caption = f"Samples from the prior at temperature {temperature:g}"
            pictures.append(context.entry(grid, caption))
        return {
            "temperatures": list(temperatures),
            "count": flags.count,
            "output": flags.output,
            "pictures": pictures,
        }


def write_folder(
    batches: Iterable[Tensor], folder: Path, count: int, progress: Callable[[int], Any]
) -> Tensor:
    """Writes images as single PNG files, as pytorch-fid and clean-fid read them; others in the
    folder go.

    Returns:
        The first images, as many as a grid has.
    """
    for earlier in folder.glob("*.png"):
        earlier.unlink()
    first, number = [], 0
    for images in batches:
        for image in images:
            save_image(image, folder / f"{number:04d}.png")
            number += 1
        first += images[: max(0, MOST_IN_GRID - len(first))]
        progress(len(images))
    return torch.stack(first)


def write_npz(
    batches: Iterable[Tensor], path: Path, count: int, progress: Callable[[int], Any]
) -> Tensor:
    """Writes images as PATH.npz with the array arr_0, uint8 [count, H, W, C], as guided-diffusion's
    evaluator reads it.

    Returns:
        The first images, as many as a grid has.
    """
    first: list[Tensor] = []
    with (
        whole_file(path.with_name(f"{path.name}.npz")) as partial,
        zipfile.ZipFile(partial, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        for images in batches:
            if not first:
                shape = (count, *images.shape[2:], images.shape[1])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(array, header)
            array.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            first += images[: max(0, MOST_IN_GRID - len(first))]
            progress(len(images))
    return torch.stack(first)


def samples_name(temperature: float) -> str:
    """Of the pictures of samples; different temperatures have different names."""
    rounded = f"{temperature:.2f}"
    return f"samples_t{rounded if float(rounded) == temperature else repr(temperature)}"
