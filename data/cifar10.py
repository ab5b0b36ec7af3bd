"""CIFAR10 through torchvision, handed out as uint8 tensors."""

from __future__ import annotations

import fcntl
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError


class Cifar10(Dataset):
    """CIFAR10 as uint8 [3, 32, 32], downloaded on first use; the test split validates.

    Arguments:
        folder: Where torchvision keeps it (`cifar-10-batches-py` or its archive).
        split: "train" (50,000) or "validation" (10,000).

    Raises:
        DataError: if it is not there and cannot be downloaded.
    """

    def __init__(self, folder: Path, split: str):
        from torchvision.datasets import CIFAR10

        try:
            images = CIFAR10(str(folder), train=split == "train").data
        except RuntimeError:  # it is not there, or damaged
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / ".lock").open("w") as lock:  # processes of one machine take turns
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    images = CIFAR10(str(folder), train=split == "train", download=True).data
            except (OSError, RuntimeError, HTTPException) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise DataError(
                    f"CIFAR10 cannot be downloaded ({reason}); put {CIFAR10.filename} from {CIFAR10.url} into {folder}"
                ) from None
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2)  # [N, 3, 32, 32]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]
