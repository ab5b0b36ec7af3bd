"""Packages that only some uses need: the extras of `pyproject.toml`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

PACKAGES = {  # of modules that have another name
    "google_crc32c": "google-crc32c",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def optional(module: str, purpose: str, extra: str, error: type[Exception]) -> ModuleType:
    """Imports a module of an optional package.

    Arguments:
        module: Its full name.
        purpose: What needs it, as the subject of a sentence.
        extra: Which of this project's extras brings the package.
        error: What to raise.

    Raises:
        error: if the package is missing, with one line that says how to get it.
    """
    name = module.partition(".")[0]
    try:
        import_module(name)
        return import_module(module)
    except ImportError:
        package = PACKAGES.get(name, name)
        raise error(
            f"{purpose} needs the package {package}: pip install {package} (or this project with "
            f"its extra [{extra}])"
        ) from None
