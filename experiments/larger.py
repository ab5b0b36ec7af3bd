"""Evaluates and samples density models at larger sizes than the one that they were trained at.

    python -m experiments.larger reach_sdn4_seed0 reach_iaf_seed0 ... --output FILE

The idea of the layer taken at its word: a rule that sweeps have learned holds over any distance.
Meant for models of `experiments/claims.sh --study reach`, trained on pictures of 64x64 each of
which is a patch of a photograph mirrored to the right and downwards (kaleidoscope.py). A density
model's weights belong to channels, not to positions, so that it can be built for another size. The
larger pictures are larger patches of the validation photographs, mirrored: what belongs together is
farther apart.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from data.get_dataset import DATASETS
from data.sets.photos32 import Photos32
from experiments.kaleidoscope import mirrored
from lib.checkpoint import CheckpointError
from lib.cli import one_line_errors
from lib.config import ConfigError
from lib.evaluation.elbo import negative_elbo
from lib.evaluation.loading import LoadedModel, find_checkpoint, load_model
from lib.models import VAE, build_model
from lib.pictures import save_grid
from lib.synthesis import sample_images

PROGRAM = "experiments.larger"
SIZES = (64, 96, 128)


def at_size(loaded: LoadedModel, size: int) -> VAE:
    """The same weights as a model of images of another size.

    Sweeps stay in the layers that have them: the scales between which they stand grow as well.
    """
    config = loaded.config
    factor = size / loaded.model.image_shape[-1]
    config = replace(
        config,
        sdn_min_scale=int(config.sdn_min_scale * factor),
        sdn_max_scale=int(config.sdn_max_scale * factor),
    )
    model = build_model(config, size)
    model.load_state_dict(loaded.model.state_dict())
    return model.eval()


def pictures(size: int, count: int) -> Tensor:
    """Mirrored validation patches, uint8 [count, 3, size, size], the same at each call."""
    patches = Photos32("validation", size // 2)
    return mirrored(torch.stack([patches[index] for index in range(count)]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="names of runs")
    parser.add_argument("--output_dir", type=Path, default=Path(), help="where checkpoints/ is")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--count", type=int, default=128, help="pictures of each size")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the posterior's noise and samples")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--pictures", type=Path, help="folder for 6 samples of each model and size")
    flags = parser.parse_args(arguments)
    if any(size < 8 or size % 4 for size in flags.sizes):
        parser.error("--sizes must be multiples of 4, at least 8")
    if not 1 <= flags.count <= 1024 or flags.batch < 1:
        parser.error("--count must be 1 to 1024, --batch at least 1")
    about = common.stamp(PROGRAM, arguments, "cpu")
    rows = []
    with one_line_errors(PROGRAM, CheckpointError, ConfigError, ValueError, OSError):
        for name in flags.models:
            path, _ = find_checkpoint(name, None, flags.output_dir / "checkpoints")
            loaded = load_model(path, {name: spec.shape for name, spec in DATASETS.items()})
            for size in flags.sizes:
                model, images = at_size(loaded, size), pictures(size, flags.count)
                indices = torch.arange(flags.count)
                batches = zip(images.split(flags.batch), indices.split(flags.batch), strict=True)
                result = negative_elbo(model, batches, seed=flags.seed)
                row = {"model": name, "size": size} | {
                    key: result[key] for key in ("bits_per_dim", "standard_error", "rate", "images")
                }
                print(", ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
                rows.append(row)
                if flags.pictures:
                    options = dict(seed=flags.seed, batch=6)
                    samples = sample_images(model, 6, loaded.config.sampling_temperature, **options)
                    save_grid(samples, flags.pictures / f"{name}_{size}.png", columns=6)
        common.write(about | {"rows": rows}, flags.output)


if __name__ == "__main__":
    main()
