"""Pictures of batches of images."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def save_image(image: Tensor, path: str | Path, enlarge: int = 1) -> Path:
    """Writes a uint8 image [3, H, W] as PNG, each pixel `enlarge` x `enlarge` large; makes the folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    if enlarge > 1:
        picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    picture.save(path)
    return path


def save_grid(images: Tensor, path: str | Path, columns: int) -> Path:
    """Writes uint8 images [N, 3, H, W] as one PNG, row after row, small images enlarged to be seen."""
    enlarge = max(1, 64 // images.shape[-1])
    return save_image(make_grid(images.cpu(), nrow=columns, padding=1, pad_value=255), path, enlarge)


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two batches [N, 3, H, W] interleaved to [2N, 3, H, W]: left[0], right[0], left[1], ..."""
    return torch.stack([left, right], dim=1).flatten(0, 1)
