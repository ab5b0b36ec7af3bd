"""Writes a trained model as a folder that others can load: weights, configuration, model card.

    python publish.py --model cats published/cats

`DensityVAE.from_pretrained("published/cats")` loads it, as do `evaluate.py --checkpoint` and
`train.py --init_from`. Nothing leaves this machine.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluate import open_model
from lib.checkpoint import CheckpointError
from lib.cli import OneLineParser, one_line_errors
from lib.config import ConfigError
from lib.evaluation.loading import find_checkpoint
from lib.evaluation.options import add_model_flags
from lib.evaluation.results import read_results, results_folder
from lib.files import read_json, whole_file
from lib.model_card import model_card
from lib.training.resume import RUN_FILE


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser("publish.py", description=__doc__.splitlines()[0])
    add_model_flags(parser)
    parser.add_argument("folder", type=Path, help="where to write; it must be new or empty")
    parser.add_argument("--output_dir", default=".", help="where checkpoints/ and figs/ are")
    flags = parser.parse_args(arguments)
    with one_line_errors(parser.prog, ConfigError, CheckpointError, ImportError, OSError):
        output = Path(flags.output_dir)
        path, name = find_checkpoint(flags.model, flags.checkpoint, output / "checkpoints")
        for line in publish(path, name, output / "figs", flags.folder):
            print(line)


def publish(path: Path, name: str, figs: Path, folder: Path) -> list[str]:
    """Writes the folder of a checkpoint, and returns what was written.

    Arguments:
        path: The checkpoint.
        name: Of the model, under which its results are in `figs`.
        figs: Where evaluations keep their results.
        folder: New or empty.

    Raises:
        ConfigError: if the folder holds something, or the results are damaged.
        CheckpointError: if the checkpoint cannot be used.
        ImportError: if the package safetensors is missing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already: give another name")
    loaded = open_model(path, "auto", "cpu")
    places = dict(root="data", output_dir=".", init_from=Path(loaded.config.init_from).name)
    config = replace(loaded.config, **places)
    results = read_results(results_folder(figs, name, loaded.fingerprint) / "results.json")
    card = model_card(
        name,
        type(loaded.model).__name__,
        config,
        shape=loaded.model.image_shape,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        step=loaded.step,
        provenance=_provenance(path.parent / RUN_FILE),
        results=results,
    )
    loaded.model.save_pretrained(folder, {"run": {"config": config.to_dict(), "step": loaded.step}})
    with whole_file(folder / "README.md") as partial:
        partial.write_text(card)
    return [f"{path} is published in {folder}; read its README.md before others do"]


def _provenance(run_file: Path) -> dict[str, Any]:
    """What run.json says of versions, commit and command, if it is there."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return dict(read_json(run_file)["provenance"])
    return {}


if __name__ == "__main__":
    main()
