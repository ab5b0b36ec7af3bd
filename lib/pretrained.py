"""A model as a folder: its weights as safetensors, and a config.json that says how to build it.

The two files are those of `PyTorchModelHubMixin` of the package huggingface_hub, so a folder may
lie on the Hugging Face Hub. Its packages are needed only where a folder is written or read:
`pip install safetensors`, and huggingface_hub for the Hub.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from .files import read_json, whole_file
from .optional import optional

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CLASS = "model_class"
A_FOLDER = "a folder of a model"
Model = TypeVar("Model", bound="Pretrained")


class Pretrained:
    """Gives a module `save_pretrained` and `from_pretrained`.

    Attributes:
        arguments: Of the module's `__init__`, plain values; its subclass sets them.
    """

    arguments: dict[str, Any]

    def save_pretrained(self, folder: str | Path, more: Mapping[str, Any] | None = None) -> Path:
        """Writes the folder, and makes it if need be; returns it.

        Arguments:
            folder: Where model.safetensors and config.json go.
            more: Plain values to keep in config.json beside the model's arguments.

        Raises:
            ImportError: if the package safetensors is missing.
            OSError: if the files cannot be written.
        """
        save_file = optional("safetensors.torch", A_FOLDER, "hub", ImportError).save_file
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        config = {CLASS: type(self).__name__, **self.arguments, **(more or {})}
        with whole_file(Path(folder) / WEIGHTS) as partial:
            save_file(weights, partial, metadata={"format": "pt"})
        with whole_file(Path(folder) / CONFIG) as partial:
            partial.write_text(json.dumps(config, indent=1) + "\n")
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls: type[Model], name: str | Path, *, revision: str | None = None, **changes: Any
    ) -> Model:
        """The model of a folder, in evaluation mode on the CPU.

        Arguments:
            name: A folder that `save_pretrained` wrote or, if there is none of this name, a
                repository of the Hugging Face Hub.
            revision: Of the repository: a branch, tag or commit.
            changes: Arguments of `__init__` to replace, such as `backend`.

        Raises:
            ImportError: if a package is missing.
            ValueError: if the folder is of another class, or its files are damaged.
            FileNotFoundError: if there is no such file.
        """
        folder = Path(name)
        if not folder.is_dir():
            download = optional(
                "huggingface_hub", f"{name} is no folder, and the Hub", "hub", ImportError
            ).snapshot_download
            patterns = [WEIGHTS, CONFIG]
            folder = Path(download(str(name), revision=revision, allow_patterns=patterns))
        config, weights = read_folder(folder)
        if config.get(CLASS, cls.__name__) != cls.__name__:
            raise ValueError(f"{folder} holds a {config[CLASS]}, not a {cls.__name__}")
        known = inspect.signature(cls).parameters
        arguments = {key: value for key, value in config.items() if key in known} | changes
        try:
            model = cls(**arguments)
            model.load_state_dict(weights)
        except (TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder}: its files do not fit together: {reason}") from None
        return model.eval()


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of a folder's config.json and its weights by name, on the CPU.

    Raises:
        ImportError: if the package safetensors is missing.
        ValueError: if a file is damaged.
        FileNotFoundError: if one is missing.
    """
    load_file = optional("safetensors.torch", A_FOLDER, "hub", ImportError).load_file
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no folder of a model: it has no {path.name}")
    try:
        config = read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise ValueError("no dictionary")
        weights = load_file(folder / WEIGHTS)
    except Exception as error:  # damaged bytes make the readers fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{folder} is damaged ({reason})") from None
    return config, weights
