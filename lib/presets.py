"""Sizes of a density VAE for one's own images: what `--preset` stands for."""

from __future__ import annotations

from typing import Any

# Sides of the images must be divisible by 16 for small, by 32 for the others.
PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(  # a first look on a CPU, or minutes of a GPU
        depth=6,
        ds_list=[1, 3, 5],
        downsample_first=True,
        h_size=48,
        post_model="IsoGaussian",
        sdn_max_scale=16,
        sdn_nfeat_0=48,
        sdn_nfeat_diff=0,
        batch=16,
        iters=5_000,
        lrate_decay=1.0,
        ema_coef=0.99,
    ),
    "medium": dict(  # a GPU
        depth=10,
        ds_list=[2, 4, 6, 8],
        downsample_first=True,
        h_size=128,
        sdn_max_scale=32,
        sdn_nfeat_0=160,
        sdn_nfeat_diff=20,
        iters=100_000,
        lrate_decay=1.0,
    ),
    "large": dict(  # the width of the authors' CIFAR10 recipe
        depth=15,
        ds_list=[3, 6, 9, 12],
        downsample_first=True,
        h_size=200,
        sdn_max_scale=32,
        sdn_nfeat_0=360,
        sdn_nfeat_diff=64,
        iters=500_000,
    ),
}
