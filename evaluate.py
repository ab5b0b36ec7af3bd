"""Evaluates a trained VAE, this project's or the authors': likelihoods, scores, samples, pictures,
a report."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from data.datamodule import BatchLoader, IndexedImages
from data.errors import DataError
from data.get_dataset import DATASETS, get_dataset
from lib.checkpoint import CheckpointError
from lib.cli import one_line_errors
from lib.config import ConfigError
from lib.DisentanglementVAE import DisentanglementVAE
from lib.DisentanglementVAE.metrics import FactorData, MetricError
from lib.evaluation import pictures
from lib.evaluation.disentanglement import FewerLevels, disentanglement_scores
from lib.evaluation.importance import LikelihoodError, memory_ran_out, pick_chunk
from lib.evaluation.ledger import LedgerError
from lib.evaluation.likelihood import negative_elbo, negative_log_likelihood
from lib.evaluation.loading import LoadedModel, find_checkpoint, load_model
from lib.evaluation.options import ONLY_DISENTANGLEMENT, TASKS, check, make_parser
from lib.evaluation.report import ReportError, write_report
from lib.evaluation.results import add_result, read_results
from lib.evaluation.workers import WorkerError
from lib.models import VAE
from lib.pictures import load_image
from lib.synthesis import sample_images

SAMPLING_TEMPERATURES = [0.6, 0.7, 0.8, 0.9, 1.0]
LAYER_TEMPERATURES = [0.6, 0.8, 1.0]
LARGEST_BATCH = 32
SEARCH_BATCH = 256  # training images, which pass through no model


def main(arguments: list[str] | None = None) -> None:
    flags = make_parser(__doc__).parse_args(arguments)
    errors = (
        ConfigError,
        DataError,
        CheckpointError,
        LedgerError,
        LikelihoodError,
        WorkerError,
        ReportError,
        MetricError,
    )
    with one_line_errors("evaluate.py", *errors):
        check(flags)
        device = choose_device(flags.device)
        command = "evaluate.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
        try:
            run(flags, device, command)
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
            raise ConfigError(
                f"out of memory on {device}: use a smaller --batch (now {flags.batch})"
            ) from None
        except OSError as error:
            raise ConfigError(f"{error.filename or 'a file'}: {error.strerror or error}") from None
        except KeyboardInterrupt:
            print("\ninterrupted; what is finished is kept", file=sys.stderr)
            sys.exit(130)


def run(flags: argparse.Namespace, device: torch.device, command: str) -> None:
    """Opens the checkpoint, evaluates, and keeps each result as soon as it is there."""
    path, name = find_checkpoint(
        flags.model, flags.checkpoint, Path(flags.output_dir) / "checkpoints"
    )
    loaded = open_model(path, flags.backend, device)
    for remark in loaded.remarks:
        print(f"{path.name}: {remark}", file=sys.stderr)
    flags.root = flags.root or loaded.config.root
    folder = Path(flags.output_dir) / "figs" / name
    results = read_results(folder / "results.json")
    tasks = [task for task in TASKS if getattr(flags, task)]
    inputs = prepare(flags, loaded)
    if tasks:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"{folder} cannot be written to")
    if flags.batch is None and set(tasks) - {"likelihood"}:
        flags.batch = min(LARGEST_BATCH, pick_chunk(loaded.model))
    about = {
        "checkpoint": path.name,
        "weights": loaded.fingerprint,
        "step": loaded.step,
        "dataset": loaded.config.dataset,
        "seed": flags.seed,
        "batch": flags.batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }
    for task, result in evaluate(loaded, path, inputs, flags, folder):
        results = add_result(folder / "results.json", task, result | about)
        for picture in result.get("pictures", ()):
            print(f"{task}: {folder / picture['file']}")
    if tasks:
        print(f"numbers in {folder / 'results.json'}")
    if flags.report:
        print(f"report: {report(results, loaded, name, folder)}")


@dataclass
class Inputs:
    """The data that the evaluations asked for need; None where none does.

    validation, training: uint8 images [3, H, W] by index. images: those of `--images`, uint8 [N, 3,
    H, W]. queries: those of `--queries` in the model's bits. scenes: images by their factors.
    """

    validation: Dataset | None = None
    training: Dataset | None = None
    images: Tensor | None = None
    queries: Tensor | None = None
    scenes: FactorData | None = None


def prepare(flags: argparse.Namespace, loaded: LoadedModel) -> Inputs:
    """Opens data and checks what depends on them and on the model, before anything is computed."""
    model, dataset, inputs = loaded.model, loaded.config.dataset, Inputs()
    depth = len(model.latent_shapes)
    for task in ONLY_DISENTANGLEMENT:
        if getattr(flags, task) and not isinstance(model, DisentanglementVAE):
            raise ConfigError(
                f"--{task} is for models of --task disentanglement; this one is of {loaded.config.task}"
            )
    if flags.neighborhood and depth == 1:
        raise ConfigError(
            "--neighborhood keeps some layers of a model with several; this one has one"
        )
    if flags.layers is None:
        flags.layers = sorted({max(1, depth // 8), max(1, depth // 4), max(1, depth // 2)})
    wrong = [k for k in flags.layers if k not in range(1, depth + 1)]
    if wrong:
        raise ConfigError(
            f"--layers must be 1 ... {depth} (the model's depth); got {' '.join(map(str, wrong))}"
        )
    for task, package in (
        ("latents", "matplotlib"),
        ("report", "jinja2"),
        ("disentanglement", "sklearn"),
    ):
        if getattr(flags, task) and not importlib.util.find_spec(package):
            name = {"sklearn": "scikit-learn"}.get(package, package)
            raise ConfigError(f"--{task} needs the package {name}: pip install {name}")
    if any(
        getattr(flags, task)
        for task in TASKS.keys() - {"sampling", "overfitting", "disentanglement"}
    ):
        inputs.validation = get_dataset(dataset, flags.root, "validation")
    if flags.interpolation or flags.traversal or flags.neighborhood:
        size = len(inputs.validation)
        wrong = [index for index in flags.images if index >= size]
        if wrong:
            raise ConfigError(
                f"--images must be below {size}, the number of validation images; got {wrong[0]}"
            )
        inputs.images = torch.stack([inputs.validation[index] for index in flags.images])
    if flags.disentanglement:
        inputs.scenes = get_dataset(dataset, flags.root, "train")
        if flags.levels:
            inputs.scenes = FewerLevels(inputs.scenes, flags.levels)
    if flags.overfitting:
        inputs.training = get_dataset(dataset, flags.root, "train")
        if len(inputs.training) < flags.neighbors:
            raise ConfigError(
                f"--neighbors {flags.neighbors}: {dataset} has {len(inputs.training)} training images"
            )
    if flags.overfitting and flags.queries:
        try:
            queries = torch.stack([load_image(path, model.image_shape) for path in flags.queries])
        except ValueError as error:
            raise ConfigError(f"--queries: {error}") from None
        inputs.queries = model.observation.to_uint8(model.observation.encode(queries))
    return inputs


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N; got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N; got {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def open_model(path: Path, backend: str, device: torch.device | str) -> LoadedModel:
    """The model on its device, which computes in full precision and the same way every time."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    loaded = load_model(path, {name: spec.shape[1:] for name, spec in DATASETS.items()}, backend)
    loaded.model.to(device)
    return loaded


def evaluate(
    loaded: LoadedModel, path: Path, inputs: Inputs, flags: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs what the flags ask for, one after another; prints and yields each result with its
    name."""
    model, validation = loaded.model, inputs.validation
    noise = dict(seed=flags.seed, batch=flags.batch)
    if flags.elbo or flags.latents:
        elbo = validation_elbo(model, validation, flags)
        if flags.elbo:
            nats = f", {elbo['nats']:.1f} nats" if isinstance(model, DisentanglementVAE) else ""
            print(f"-ELBO: {shown(elbo)} bits/dim{nats} ({elbo['images']} images)")
            yield "elbo", elbo
    if flags.likelihood:
        yield "likelihood", likelihood(loaded, path, validation, flags, folder)
    if flags.disentanglement:
        yield "disentanglement", disentanglement(model, inputs.scenes, flags)
    if flags.latents:
        yield "latents", pictures.latents(elbo, model.latent_shapes, folder)
    if flags.reconstruction:
        indices = range(min(flags.count, len(validation)))
        images = torch.stack([validation[index] for index in indices])
        yield "reconstruction", pictures.reconstruction(model, images, indices, folder, **noise)
    if flags.sampling:
        drawn = dict(
            temperatures=flags.temperatures or SAMPLING_TEMPERATURES,
            count=flags.count,
            output=flags.output,
        )
        yield "sampling", pictures.sampling(model, folder, **drawn, **noise, track=track)
    if flags.interpolation or flags.traversal or flags.neighborhood:
        drawn = flags.temperatures or (
            LAYER_TEMPERATURES if len(model.latent_shapes) > 1 else [1.0]
        )
        given = dict(layers=flags.layers, temperatures=drawn, track=track, **noise)
        if flags.interpolation:
            yield (
                "interpolation",
                pictures.interpolation(
                    model, inputs.images, flags.images, folder, frames=flags.frames, **given
                ),
            )
        if flags.traversal:
            yield (
                "traversal",
                pictures.traversals(
                    model,
                    inputs.images,
                    flags.images,
                    folder,
                    frames=flags.frames,
                    batch=flags.batch,
                ),
            )
        if flags.neighborhood:
            yield (
                "neighborhood",
                pictures.neighborhoods(model, inputs.images, flags.images, folder, **given),
            )
    if flags.overfitting:
        yield (
            "overfitting",
            overfitting(model, inputs, DATASETS[loaded.config.dataset].flip, flags, folder),
        )


def validation_elbo(model: VAE, validation: Dataset, flags: argparse.Namespace) -> dict[str, Any]:
    limit = min(len(validation), flags.limit or len(validation))
    with tqdm(total=limit, unit="image", desc="-ELBO") as bar:
        batches = in_batches(validation, limit, flags.batch, flags.num_workers)
        return negative_elbo(model, batches, seed=flags.seed, progress=partial(advance, bar))


def disentanglement(
    model: DisentanglementVAE, scenes: FactorData, flags: argparse.Namespace
) -> dict[str, Any]:
    with tqdm(total=math.prod(scenes.factor_sizes), unit="image", desc="encoded") as bar:
        result = disentanglement_scores(
            model, scenes, flags.metrics, seed=flags.seed, progress=bar.update
        )
    for remark in result["remarks"]:
        print(f"note: {remark}", file=sys.stderr)
    for name, values in result["scores"].items():
        print(f"{name}: {values['score']:.4f}")
    return result


def likelihood(
    loaded: LoadedModel, path: Path, validation: Dataset, flags: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Goes on with what an earlier run of the same weights, seed and number of samples has
    finished."""
    dataset, device = loaded.config.dataset, loaded.model.device
    limit = min(len(validation), flags.limit or len(validation))
    devices, open_by_worker = [str(device)], lambda device: (loaded.model, validation)
    if flags.processes > 1:
        open_by_worker = partial(open_for_likelihood, path, flags.backend, flags.root)
        gpus = torch.cuda.device_count()
        devices = [
            f"cuda:{i % gpus}" if device.type == "cuda" else "cpu" for i in range(flags.processes)
        ]
    finished = (
        folder
        / f"likelihood_{loaded.fingerprint}_seed{flags.seed}_samples{flags.importance_samples}.csv"
    )
    with tqdm(total=limit, unit="image", desc="-log p(x)", smoothing=0) as bar:
        result = negative_log_likelihood(
            open_by_worker,
            range(limit),
            samples=flags.importance_samples,
            seed=flags.seed,
            ledger=finished,
            identity={
                "weights": loaded.fingerprint,
                "dataset": dataset,
                "validation_images": len(validation),
            },
            devices=devices,
            chunk=flags.chunk,
            progress=partial(advance, bar),
        )
    print(
        f"-log p(x): {shown(result)} bits/dim ({result['images']} images, {result['samples']} importance samples)"
    )
    return result


def open_for_likelihood(path: Path, backend: str, root: str, device: str) -> tuple[VAE, Dataset]:
    """What a process that computes likelihoods needs."""
    loaded = open_model(path, backend, device)
    return loaded.model, get_dataset(loaded.config.dataset, root, "validation")


def overfitting(
    model: VAE, inputs: Inputs, mirror: bool, flags: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    training = inputs.training
    if inputs.queries is not None:
        queries = {"queries": inputs.queries}
    else:
        draw = dict(seed=flags.seed, batch=flags.batch, output=flags.output)
        queries = {
            pictures.samples_name(temperature): sample_images(
                model, flags.count, temperature, **draw
            )
            for temperature in track(flags.temperatures or SAMPLING_TEMPERATURES, "samples")
        }
    with tqdm(total=len(training), unit="image", desc="training images") as bar:
        return pictures.overfitting(
            model,
            queries,
            in_batches(training, len(training), SEARCH_BATCH, flags.num_workers),
            folder,
            neighbours=flags.neighbors,
            mirror=mirror,
            progress=bar.update,
        )


def in_batches(
    dataset: Dataset, limit: int, batch: int, num_workers: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """The first `limit` images, nothing augmented: (uint8 images [B, 3, H, W], their indices
    [B])."""
    images = Subset(IndexedImages(dataset, augment=False, flip=False, seed=0), range(limit))
    return BatchLoader(images, batch, num_workers=num_workers)


def report(results: dict[str, Any], loaded: LoadedModel, name: str, folder: Path) -> Path:
    """A page of the results of these weights; those of others are left out and named."""
    mine = {
        task: results[task]
        for task in TASKS
        if results.get(task, {}).get("weights") == loaded.fingerprint
    }
    if not mine:
        raise ConfigError(
            f"--report: there are no results of these weights in {folder / 'results.json'} yet"
        )
    others = [f"{task} is left out: it is of other weights" for task in results if task not in mine]
    return write_report(
        folder / "report.html",
        title=name,
        results=mine,
        config=loaded.config.to_dict(),
        ignored=others,
    )


def track(loop: Iterable[Any], title: str) -> Iterable[Any]:
    return tqdm(loop, desc=title)


def advance(bar: tqdm, images: int, estimate: str) -> None:
    bar.set_postfix_str(f"{estimate} bits/dim")
    bar.update(images)


def shown(result: dict[str, Any]) -> str:
    error = result["standard_error"]
    return f"{result['bits_per_dim']:.4f}" + (f" +- {error:.4f}" if error is not None else "")


if __name__ == "__main__":
    main()
