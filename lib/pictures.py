"""Pictures of batches of images, and of the rate of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional
from torchvision.utils import make_grid

from .config import ConfigError
from .files import whole_file
from .optional import optional
from .picture_files import PictureError, fit_picture, read_picture

SMALLEST = 64  # pixels of a picture's side; smaller images are enlarged
SMOOTHED = 16  # below so many pixels a side, squares would hide what is to be seen
FONT_SIZE = 16
GAP = 8


def save_image(image: Tensor, path: str | Path, enlarge: int = 1) -> Path:
    """Writes a uint8 image [C, H, W], grey or colour, as PNG, each pixel `enlarge` x `enlarge`
    large; makes the folder if needed."""
    return _save(_picture(image, enlarge), path)


def load_image(path: str | Path, shape: Sequence[int], fit: str = "crop") -> Tensor:
    """A picture file as uint8 [C, H, W], read as `lib.picture_files` does: upright, in sRGB, on
    white.

    Arguments:
        shape: (C, H, W).
        fit: How a picture of another size is made to it: "crop", "resize" or "pad".

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        levels, _ = read_picture(path, shape[0])
    except PictureError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    (fitted,) = fit_picture(levels, shape[1], shape[2], fit)
    return torch.from_numpy(fitted.copy()).permute(2, 0, 1)


def save_grid(images: Tensor, path: str | Path, columns: int) -> Path:
    """Writes uint8 images [N, C, H, W] as one PNG, row after row, small images enlarged to be seen,
    and smoothed if they are tiny."""
    return _save(grid_picture(images, columns), path)


def grid_picture(images: Tensor, columns: int) -> Image.Image:
    """The picture that `save_grid` writes."""
    return _picture(_grid(images, columns), _enlarge(images))


def save_table(
    rows: Sequence[Sequence[Tensor]],
    path: str | Path,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    columns: int = 3,
) -> Path:
    """Writes a table of grids as one PNG, with labels left of the rows and below the columns.

    Arguments:
        rows: Cells of each row, each uint8 images [N, C, H, W], laid out as a grid.
        columns: Of the grid in a cell, at most; rows may be of different lengths.
    """
    enlarge = _enlarge(rows[0][0])
    cells = [[_picture(_grid(cell, columns), enlarge) for cell in row] for row in rows]
    font = ImageFont.load_default(FONT_SIZE)
    left = max((round(font.getlength(label)) + 2 * GAP for label in row_labels), default=GAP)
    below = FONT_SIZE + 2 * GAP if column_labels else GAP
    widths = [
        max(row[i].width for row in cells if i < len(row)) + GAP
        for i in range(max(map(len, cells)))
    ]
    heights = [max(cell.height for cell in row) + GAP for row in cells]
    canvas = Image.new("RGB", (left + sum(widths), GAP + sum(heights) + below - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(cells):
        top = GAP + sum(heights[:i])
        for j, cell in enumerate(row):
            canvas.paste(
                cell, (left + sum(widths[:j]), top + (heights[i] - GAP - cell.height) // 2)
            )
        if row_labels:
            draw.text(
                (left - GAP, top + (heights[i] - GAP) // 2),
                row_labels[i],
                "black",
                font,
                anchor="rm",
            )
    for j, label in enumerate(column_labels):
        middle = left + sum(widths[:j]) + (widths[j] - GAP) // 2
        draw.text((middle, canvas.height - GAP), label, "black", font, anchor="mb")
    return _save(canvas, path)


def save_rates(
    rates: Sequence[float], path: str | Path, scales: Sequence[Sequence[int]] = ()
) -> Path:
    """Writes a bar plot of the KL of each layer, or each latent dimension, as PNG.

    Arguments:
        rates: In bits/dim; of layers, the topmost first.
        scales: (H, W) of each layer's latent; nothing if the rates are of dimensions.
    """
    optional("matplotlib", "a plot of rates", "evaluate", ConfigError)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"{height}x{width}" for height, width in scales] or [""] * len(rates)
    figure = Figure(figsize=(max(5, 0.55 * len(rates) + 2), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, name in enumerate(dict.fromkeys(names)):
        layers = [i for i, other in enumerate(names) if other == name]
        axes.bar(layers, [rates[i] for i in layers], color=f"C{number}", label=name)
    total = sum(rates)
    for i, rate in enumerate(rates):
        share = f"{100 * rate / total:.0f}%" if total > 0 else ""
        axes.annotate(share, (i, max(rate, 0)), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(rates)), [str(i + bool(scales)) for i in range(len(rates))])
    axes.set_xlabel("layer, topmost first" if scales else "latent dimension")
    axes.set_ylabel("KL (bits/dim)")
    axes.spines[["top", "right"]].set_visible(False)
    if scales:
        axes.legend(title="scale of z", frameon=False)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})
    return Path(path)


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two batches [N, C, H, W] interleaved to [2N, C, H, W]: left[0], right[0], left[1], ..."""
    return torch.stack([left, right], dim=1).flatten(0, 1)


def square(count: float) -> int:
    """Columns of a nearly square grid."""
    return max(1, round(count**0.5))


def _save(picture: Image.Image, path: str | Path) -> Path:
    with whole_file(path) as partial:
        picture.save(partial, format="PNG")
    return Path(path)


def _grid(images: Tensor, columns: int) -> Tensor:
    images, gap, side = images.cpu(), 1, images.shape[-1]
    if side < SMOOTHED:
        gap = SMALLEST // side
        size = [gap * each for each in images.shape[-2:]]
        images = functional.interpolate(images, size, mode="bicubic", antialias=True)
    return make_grid(images, nrow=columns, padding=gap, pad_value=255)


def _enlarge(images: Tensor) -> int:
    """How large each pixel of a grid becomes."""
    side = images.shape[-1]
    return 1 if side < SMOOTHED else max(1, SMALLEST // side)


def _picture(image: Tensor, enlarge: int) -> Image.Image:
    levels = image.cpu().permute(1, 2, 0)
    if levels.shape[2] == 1:
        levels = levels[..., 0]
    picture = Image.fromarray(levels.contiguous().numpy())
    if enlarge > 1:
        picture = picture.resize(
            (picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST
        )
    return picture
