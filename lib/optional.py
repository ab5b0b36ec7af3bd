"""Packages that only some uses need; `pyproject.toml` lists them as extras."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .config import ConfigError

# The name of a module, of the package that it comes in, and of the extra that brings the package.
PACKAGES = {
    "datasets": ("datasets", "images"),
    "google_crc32c": ("google-crc32c", "convert"),
    "h5py": ("h5py", "shapes3d"),
    "jinja2": ("jinja2", "evaluate"),
    "lmdb": ("lmdb", "train"),
    "matplotlib": ("matplotlib", "evaluate"),
    "pyarrow": ("pyarrow", "images"),
    "skimage": ("scikit-image", "photos"),
    "sklearn": ("scikit-learn", "metrics"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
}


def optional(module: str, purpose: str, error: type[Exception] = ConfigError) -> ModuleType:
    """Imports a module of an optional package.

    Arguments:
        module: Its name; of its packages, the top one is known in `PACKAGES`.
        purpose: What needs it, as the subject of a sentence.
        error: What to raise.

    Raises:
        error: if the package is missing, with one line that says how to get it.
    """
    try:
        return import_module(module)
    except ImportError:
        package, extra = PACKAGES[module.partition(".")[0]]
        raise error(
            f"{purpose} needs the package {package}: pip install {package} (of the extra {extra})"
        ) from None
