"""The evaluations that draw: each computes images, writes pictures and returns what is to be known
of them.

Every function returns a dictionary of plain values whose "pictures" are {"file": path relative to
`folder`, "caption": text}. Layers are counted from the topmost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..DisentanglementVAE import DisentanglementVAE
from ..models import VAE
from ..pictures import save_grid, save_image, save_rates, save_table, side_by_side
from ..synthesis import encode, interpolate, neighborhood, reconstruct, sample_images, traverse
from .nearest import nearest_images

Result = dict[str, Any]
Track = Callable[
    [Iterable[Any], str], Iterable[Any]
]  # wraps a loop to show its progress under a title


def sampling(
    model: VAE,
    folder: Path,
    *,
    count: int,
    temperatures: Sequence[float],
    output: str,
    seed: int,
    batch: int,
    track: Track,
) -> Result:
    """A grid and single images at each temperature (paper, Figures 6 left and 10)."""
    pictures = []
    for temperature in track(temperatures, "samples"):
        images = sample_images(model, count, temperature, seed=seed, batch=batch, output=output)
        name = samples_name(temperature)
        grid = save_grid(images, folder / f"{name}.png", _square(count))
        for earlier in (folder / name).glob("*.png"):
            earlier.unlink()
        for i, image in enumerate(images):
            save_image(image, folder / name / f"{i:04d}.png")
        pictures.append(
            _entry(grid, folder, f"Samples from the prior at temperature {temperature:g}")
        )
    return {
        "temperatures": list(temperatures),
        "count": count,
        "output": output,
        "pictures": pictures,
    }


def interpolation(
    model: VAE,
    images: Tensor,
    indices: Sequence[int],
    folder: Path,
    *,
    layers: Sequence[int],
    temperatures: Sequence[float],
    frames: int,
    seed: int,
    batch: int,
    track: Track,
) -> Result:
    """For each pair of images a picture: a row for each number of layers and temperature (paper,
    Figure 5).

    Each row begins with the first image and ends with the second, with `frames` interpolations
    between them.

    Arguments:
        images, indices: uint8 [N, 3, H, W] and their numbers in the data set; 0 and 1 are a pair, 2
            and 3, ...
    """
    latents = encode(model, images, indices, seed=seed, batch=batch)
    rows_of = [(k, t) for k in layers for t in temperatures]
    pictures = []
    for pair in track(range(0, len(images) - 1, 2), "interpolations"):
        ends = [[z[i : i + 1] for z in latents] for i in (pair, pair + 1)]
        rows = []
        for k, temperature in rows_of:
            between = interpolate(
                model,
                *ends,
                layers=k,
                temperature=temperature,
                frames=frames,
                seed=seed,
                batch=batch,
            )
            rows.append([images[pair : pair + 1], between, images[pair + 1 : pair + 2]])
        first, second = indices[pair], indices[pair + 1]
        path = save_table(
            rows,
            folder / f"interpolation_{first}_{second}.png",
            row_labels=[f"{k} {'layer' if k == 1 else 'layers'}, T = {t:g}" for k, t in rows_of],
            columns=frames,
        )
        caption = f"Validation images {first} and {second} (outermost) and interpolations of the top layers between"
        pictures.append(_entry(path, folder, caption))
    return {
        "images": list(indices),
        "layers": list(layers),
        "temperatures": list(temperatures),
        "frames": frames,
        "pictures": pictures,
    }


def traversals(
    model: DisentanglementVAE,
    images: Tensor,
    indices: Sequence[int],
    folder: Path,
    *,
    frames: int,
    batch: int,
) -> Result:
    """For each image a table with a row for each latent dimension, which goes from -2 to 2 while
    the others stay."""
    pictures = []
    for image, index in zip(images.split(1), indices, strict=True):
        frames_of = traverse(model, image, values=frames, batch=batch).split(frames)
        rows = [[image, of_dimension] for of_dimension in frames_of]
        labels = [f"z{dimension}" for dimension in range(len(rows))]
        path = save_table(
            rows, folder / f"traversal_{index}.png", row_labels=labels, columns=frames
        )
        caption = f"Validation image {index} (left), and each latent dimension of it from -2 to 2"
        pictures.append(_entry(path, folder, caption))
    return {"images": list(indices), "frames": frames, "pictures": pictures}


def neighborhoods(
    model: VAE,
    images: Tensor,
    indices: Sequence[int],
    folder: Path,
    *,
    layers: Sequence[int],
    temperatures: Sequence[float],
    seed: int,
    batch: int,
    track: Track,
) -> Result:
    """For each image a table of 3x3 grids, number of kept layers by temperature (paper, Figures 6
    right and 11).

    In the centre of each grid is the image's reconstruction, around it are eight images that share
    the latents of its top layers.
    """
    latents = encode(model, images, indices, seed=seed, batch=batch)
    centres = reconstruct(model, images, indices=indices, seed=seed, batch=batch)
    pictures = []
    for i, index in enumerate(track(indices, "neighborhoods")):
        own = [z[i : i + 1] for z in latents]
        rows = []
        for k in layers:
            cells = []
            for temperature in temperatures:
                around = neighborhood(
                    model,
                    own,
                    index=index,
                    layers=k,
                    temperature=temperature,
                    count=8,
                    seed=seed,
                    batch=batch,
                )
                cells.append(torch.cat([around[:4], centres[i : i + 1], around[4:]]))
            rows.append(cells)
        path = save_table(
            rows,
            folder / f"neighborhood_{index}.png",
            row_labels=[f"{k} {'layer' if k == 1 else 'layers'}" for k in layers],
            column_labels=[f"T = {t:g}" for t in temperatures],
        )
        caption = f"Around validation image {index}: its reconstruction (centres) and samples that share its top layers"
        pictures.append(_entry(path, folder, caption))
    return {
        "images": list(indices),
        "layers": list(layers),
        "temperatures": list(temperatures),
        "pictures": pictures,
    }


def reconstruction(
    model: VAE, images: Tensor, indices: Sequence[int], folder: Path, *, seed: int, batch: int
) -> Result:
    """A grid of images, each with its reconstruction to its right, and the mean squared error of
    uint8 levels."""
    reconstructions = reconstruct(model, images, indices=indices, seed=seed, batch=batch)
    pairs = side_by_side(images, reconstructions)
    path = save_grid(pairs, folder / "reconstructions.png", 2 * _square(len(images) / 2))
    error = (images.double() - reconstructions.double()).square().mean().item()
    caption = "Validation images, each beside its reconstruction"
    return {"images": len(images), "mse": error, "pictures": [_entry(path, folder, caption)]}


def overfitting(
    model: VAE,
    queries: dict[str, Tensor],
    training: Iterable[tuple[Tensor, Tensor]],
    folder: Path,
    *,
    neighbours: int,
    mirror: bool,
    progress: Callable[[int], None],
) -> Result:
    """The nearest training images of samples, by mean squared error in the model's bits (paper,
    Figure 9).

    Arguments:
        queries: uint8 images [N, 3, H, W] by the name of their picture.
        training: (uint8 images [B, 3, H, W], their indices [B]).
        neighbours: Training images to show for each query.
        mirror: Whether training showed the images flipped left to right, too.
    """
    observation = model.observation
    found = nearest_images(
        torch.cat(list(queries.values())),
        training,
        count=neighbours,
        device=model.device,
        mirror=mirror,
        prepare=lambda images: observation.to_uint8(observation.encode(images)),
        progress=progress,
    )
    pictures, start = [], 0
    for name, images in queries.items():
        part = slice(start, start + len(images))
        start += len(images)
        groups = torch.cat(
            [images.unsqueeze(1), found.images[part]], dim=1
        )  # [N, 1 + neighbours, 3, H, W]
        in_a_row = max(1, 16 // (1 + neighbours))
        rows = [list(part) for part in groups.split(in_a_row)]
        path = save_table(rows, folder / f"nearest_{name}.png", columns=1 + neighbours)
        caption = f"{name}: each image (left) and its nearest training images, the nearest first"
        pictures.append(_entry(path, folder, caption))
    entries = [
        [
            {"index": index, "mse": mse, "mirrored": mirrored}
            for index, mse, mirrored in zip(*of_query, strict=True)
        ]
        for of_query in zip(
            found.indices.tolist(), found.mse.tolist(), found.mirrored.tolist(), strict=True
        )
    ]
    return {
        "searched": found.searched,
        "mirrored_too": mirror,
        "nearest_mse": found.mse[:, 0].min().item(),
        "median_mse": found.mse[:, 0].median().item(),
        "neighbours": entries,
        "pictures": pictures,
    }


def latents(elbo: Result, latent_shapes: Sequence[Sequence[int]], folder: Path) -> Result:
    """How much each layer, or latent dimension, carries: its KL in bits/dim, as numbers and as a
    bar plot.

    Arguments:
        elbo: What `negative_elbo` found.
        latent_shapes: (z_size, H, W) of each layer.
    """
    path = folder / "latents.png"
    if "rate_per_dimension" in elbo:
        part, facts = "dimension", {}
        save_rates(elbo["rate_per_dimension"], path)
    else:
        scales = [list(shape[1:]) for shape in latent_shapes]
        part, facts = "layer", {"scale_per_layer": scales}
        save_rates(elbo["rate_per_layer"], path, scales)
    rates = elbo[f"rate_per_{part}"]
    total = sum(rates)
    return {
        f"rate_per_{part}": list(rates),
        f"share_per_{part}": [rate / total if total else 0.0 for rate in rates],
        **facts,
        "images": elbo["images"],
        "pictures": [
            _entry(
                path,
                folder,
                f"KL divergence of each {part}'s posterior from its prior, in bits/dim",
            )
        ],
    }


def samples_name(temperature: float) -> str:
    """Of the pictures of samples; different temperatures have different names."""
    rounded = f"{temperature:.2f}"
    return f"samples_t{rounded if float(rounded) == temperature else repr(temperature)}"


def _square(count: float) -> int:
    """Columns of a nearly square grid."""
    return max(1, round(count**0.5))


def _entry(path: Path, folder: Path, caption: str) -> dict[str, str]:
    return {"file": path.relative_to(folder).as_posix(), "caption": caption}
