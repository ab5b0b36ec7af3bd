"""How fast are the loaders, the training and the metrics of the disentanglement experiments?

    python -m benchmarks.disentanglement --root /where/3DShapes/3dshapes.h5/is/or/will/be

- loaders: images/s of the training loader, in its random order, for rendered scenes and for an HDF5 file of them;
- training: iterations/s of the β-VAE, SDN decoder against convolutional decoder;
- metrics: images/s of the encoder, and seconds of each metric on a table of codes of all 480,000 scenes.

The HDF5 file is ROOT/3DShapes/3dshapes.h5, the official one if it is there; if not, the rendered scenes are written to
it, compressed. What is read is its uncompressed copy, once through before it is timed, so that a machine with memory to
spare times no disk. Both take minutes to make and 6.3 GB, and stay there; without --root they are temporary.

Everything is checked before anything is timed: batches are the images and labels of their scenes; loss and gradients of
the SDN decoder are those of the reference; the encoder gives a batch the codes of its images; a perfect code scores 1.
What fails ends the program with status 1. Times are medians over rounds in which the contenders take turns, after one
round that is not counted; DCI is run once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.sdn_layer import machine
from data import shapes3d
from data.datamodule import ImageDataModule
from data.errors import DataError
from data.shapes3d_rendered import Shapes3DRendered, blocks
from lib.cli import OneLineParser, one_line_errors
from lib.config import TrainConfig
from lib.DisentanglementVAE import DisentanglementVAE
from lib.DisentanglementVAE.metrics import METRICS
from lib.models import build_model
from lib.nn import BACKENDS
from lib.training import objective

TARGETS = {"Shapes3DRendered": 20_000, "3DShapes": 5_000}  # images/s on two cores
CHECKED_BATCHES = 3
TOLERANCE = 1e-5  # relative, of float32
PERFECT = 0.99  # least score of a perfect code
NOISE, DIMENSIONS = 0.3, 10  # of the codes that metrics are timed on
PACKAGES = ("torch", "numpy", "scikit-learn", "pytorch-lightning", "h5py")
CNN = {"sdn_max_scale": 0}
RESULTS = Path("benchmarks/results")


def prepare_file(root: Path) -> None:
    """Writes the compressed file, unless it or its copy is there."""
    path = root / "3DShapes" / "3dshapes.h5"
    if not path.exists() and not shapes3d.uncompressed(path).exists():
        with shapes3d.alone(path):
            shapes3d.write_hdf5(path, blocks(shapes3d.SCENES), shapes3d.SCENES, compression="gzip")


def open_data(name: str, workers: int, options) -> ImageDataModule:
    data = ImageDataModule(name, str(options.root), options.batch, options.batch, workers, seed=0)
    data.prepare_data()
    data.setup()
    return data


def describe_file(data: ImageDataModule) -> dict:
    """What is read and what it was made of; reads it once."""
    copy_path = data.train.dataset.path
    with copy_path.open("rb", buffering=0) as file:
        buffer = bytearray(2**24)
        while file.readinto(buffer):
            pass
    source = copy_path.with_name("3dshapes.h5")
    if not source.exists():
        return {"read": copy_path.name, "source": None}
    with shapes3d.opened(source) as images:
        return {
            "read": copy_path.name,
            "source": source.name,
            "compression": images.compression,
            "source_bytes": source.stat().st_size,
        }


def check_loader(name: str, data: ImageDataModule) -> None:
    """Compares batches with the data set's images and labels, and with what h5py reads from the file."""
    dataset = data.train.dataset
    for images, indices in itertools.islice(data.train_dataloader(), CHECKED_BATCHES):
        factors, labels = dataset.factors(indices), torch.from_numpy(shapes3d.all_labels())[indices]
        pairs = {
            "the scenes' images": (images, dataset.images(factors)),
            "single images": (images, torch.stack([dataset[index] for index in indices.tolist()])),
            "the scenes' labels": (dataset.labels(indices), labels),
        }
        if name == "3DShapes":
            source = dataset.path.with_name("3dshapes.h5")
            with shapes3d.opened(source if source.exists() else dataset.path) as stored:
                read = np.stack([stored[index] for index in indices.tolist()])
                stored_labels = stored.file["labels"][:][indices.numpy()]
            pairs["the file's images"] = images, torch.from_numpy(read).permute(0, 3, 1, 2)
            pairs["the file's labels"] = labels.float(), torch.from_numpy(stored_labels).float()
        for what, (one, other) in pairs.items():
            if not torch.equal(one, other):
                sys.exit(f"{name} is not timed: a batch differs from {what}")


def check_sdn(options) -> None:
    """Compares loss and gradients of the model that is timed with the reference's in float64."""
    model = build(options, sdn=True)
    reference = build(options, sdn=True, backend="reference").double()
    reference.load_state_dict(model.state_dict())
    images, generator = some_images(2, options), torch.Generator().manual_seed(0)
    noise = torch.randn(2, *model.latent_shapes[0], generator=generator).to(options.device)
    losses = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for each in (model, reference):
            x = each.observation.encode(images).to(each.dtype)
            losses.append(objective(each(x, [noise.to(each.dtype)]), beta=4.0))
            losses[-1].backward()
    pairs = {"loss": losses}
    for (key, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        pairs[f"gradient of {key}"] = one.grad, other.grad
    for what, (one, other) in pairs.items():
        error = ((one.double() - other).norm() / other.norm()).item()
        if not error <= TOLERANCE:
            sys.exit(f"training is not timed: the {what} differs from the reference by {error:.1e}")


@torch.no_grad()
def check_encoder(options) -> None:
    model, images = build(options, sdn=False), some_images(8, options)
    with torch.backends.cudnn.flags(allow_tf32=False):
        together = encode(model, images)
        exact = copy.deepcopy(model).double()
        alone = torch.cat([encode(exact, image[None]) for image in images])
    error = ((together.double() - alone).norm() / alone.norm()).item()
    if not error <= TOLERANCE:
        sys.exit(f"the encoder is not timed: codes of a batch differ from its images' by {error:.1e}")


def check_metrics(options) -> None:
    for name in ("beta_vae", "factor_vae"):
        score = METRICS[name](perfect_codes(), Shapes3DRendered(), seed=0, **metric_sizes(name, options))["score"]
        if not PERFECT <= score <= 1:
            sys.exit(f"metrics are not timed: {name} of a perfect code is {score:.3f}")


def build(options, *, sdn: bool, backend: str | None = None) -> DisentanglementVAE:
    torch.manual_seed(0)
    flags = {"backend": backend or options.backend, "sdn_nfeat_0": options.features, **({} if sdn else CNN)}
    return build_model(TrainConfig.for_task(task="disentanglement", **flags), shapes3d.SIZE).to(options.device)


def some_images(count: int, options) -> Tensor:
    generator, data = torch.Generator().manual_seed(0), Shapes3DRendered()
    factors = [torch.randint(size, (count,), generator=generator) for size in data.factor_sizes]
    return data.images(torch.stack(factors, dim=1)).to(options.device)


@torch.no_grad()
def encode(model: DisentanglementVAE, images: Tensor) -> Tensor:
    return model.represent(model.observation.encode(images).to(model.dtype))


def perfect_codes() -> np.ndarray:
    """The factors of all scenes with mean 0 and variance 1: [480000, 6]."""
    sizes = Shapes3DRendered.factor_sizes
    factors = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=-1).astype(float)
    return (factors - factors.mean(0)) / factors.std(0)


def noisy_codes() -> np.ndarray:
    """Factors with noise, and dimensions of nothing but noise, as those that a β-VAE does not use: [480000, 10]."""
    perfect, rng = perfect_codes(), np.random.default_rng(0)
    noisy = perfect + NOISE * rng.standard_normal(perfect.shape)
    return np.concatenate([noisy, rng.standard_normal((len(perfect), DIMENSIONS - perfect.shape[1]))], axis=1)


def metric_sizes(name: str, options) -> dict[str, int]:
    """The arguments that --points and --trees stand for; none: the metric's defaults."""
    sizes = {"trees": options.trees} if name == "dci" and options.trees else {}
    if options.points and name == "mig":
        return sizes | {"samples": options.points}
    return sizes | ({"train": options.points, "test": -(-options.points // 2)} if options.points else {})


def take_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of the seconds that contenders return."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            seconds = run()
            if turn > 0:
                times[name].append(seconds)
    return {name: statistics.median(taken) for name, taken in times.items()}


def timed(run: Callable[[], object], device: str = "cpu") -> float:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def time_loaders(loaded: dict[str, dict[int, ImageDataModule]], options) -> list[dict]:
    def contender(data: ImageDataModule) -> Callable[[], float]:
        loader = data.train_dataloader()
        batches = endless(loader)
        waiting = (loader.prefetch_factor or 0) * loader.num_workers  # made while others had their turn

        def take(count: int) -> None:
            for _ in itertools.islice(batches, count):
                pass

        def run() -> float:
            take(waiting)
            return timed(lambda: take(options.batches))

        return run

    contenders = {(name, w): contender(data) for name, each in loaded.items() for w, data in each.items()}
    times = take_turns(contenders, options.rounds)
    images = options.batches * options.batch
    return [
        {
            "dataset": name,
            "workers": workers,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "target": TARGETS[name],
        }
        for (name, workers), seconds in times.items()
    ]


def endless(loader) -> Iterator:
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from loader


def time_parts(data: ImageDataModule, options) -> dict[str, float]:
    """Microseconds an image takes: the order of an epoch, getting a batch's images, and collating them."""
    loader, dataset = data.train_dataloader(), data.train
    get_images = getattr(dataset, "__getitems__", None) or (lambda keys: [dataset[key] for key in keys])
    order = timed(lambda: list(loader.sampler)) / len(loader.sampler)
    taken = []
    for keys in itertools.islice(endless(loader.batch_sampler), options.batches):
        start = time.perf_counter()
        images = get_images(keys)
        middle = time.perf_counter()
        loader.collate_fn(images)
        taken.append((middle - start, time.perf_counter() - middle))
    images, collation = (statistics.median(seconds) / options.batch for seconds in zip(*taken, strict=True))
    return {"permutation": 1e6 * order, "images": 1e6 * images, "collation": 1e6 * collation}


def time_training(options) -> list[dict]:
    images = some_images(options.batch, options)

    def contender(sdn: bool) -> Callable[[], float]:
        model = build(options, sdn=sdn)
        optimizer = torch.optim.Adamax(model.parameters(), lr=0.001)

        def steps() -> None:
            for _ in range(options.steps):
                loss = objective(model(model.observation.encode(images)), beta=4.0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return lambda: timed(steps, options.device)

    times = take_turns({"CNN": contender(False), "SDN": contender(True)}, options.rounds)
    return [
        {
            "decoder": name,
            "seconds": seconds / options.steps,
            "iterations_per_second": options.steps / seconds,
            "times_cnn": seconds / times["CNN"],
        }
        for name, seconds in times.items()
    ]


def time_encoder(options) -> dict:
    model, images = build(options, sdn=False), some_images(options.encode_batch, options)
    times = take_turns({"encoder": lambda: timed(lambda: encode(model, images), options.device)}, options.rounds)
    return {"batch": len(images), "seconds": times["encoder"], "images_per_second": len(images) / times["encoder"]}


def time_metrics(options) -> list[dict]:
    codes, data, scores = noisy_codes(), Shapes3DRendered(), {}

    def contender(name: str) -> Callable[[], float]:
        def run() -> None:
            scores[name] = METRICS[name](codes, data, seed=0, **metric_sizes(name, options))["score"]

        return lambda: timed(run)

    times: dict[str, float | None] = {}
    times |= take_turns({name: contender(name) for name in METRICS if name != "dci"}, options.rounds)
    times["dci"] = None if options.skip_dci else contender("dci")()
    return [
        {"metric": name, "seconds": times[name], "score": scores.get(name), "sizes": metric_sizes(name, options)}
        for name in METRICS
    ]


def command(options, defaults: dict) -> str:
    """The command with what differs from the defaults; absolute paths are left out."""
    parts = ["python", "-m", "benchmarks.disentanglement"]
    for name, value in vars(options).items():
        if value == defaults[name]:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        hidden = isinstance(value, Path) and value.is_absolute()
        parts += [f"--{name}", *([name.upper()] if hidden else map(str, values))]
    return shlex.join(parts)


def markdown(result: dict) -> str:
    about, lines = result["machine"], ["# The disentanglement experiments' speed\n"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{about['cpu']}, {about['cores']} cores" + (f", {about['gpu']}" if about["gpu"] else "")
    load = about["load_average_at_start"]
    lines.append(
        f"Measured {result['date']}, {where}, {result['threads']} threads, load average at the start "
        f"{'unknown' if load is None else format(load, '.1f')}; {versions}; medians of {result['rounds']} rounds, with\n\n"
        f"    {result['command']}\n"
    )
    lines += [f"Training loader, batches of {result['batch']} in random order:\n"]
    lines += ["| data set | workers | images/s | target on two cores |", "|---|---|---|---|"]
    for row in result["loaders"]:
        cells = row["dataset"], row["workers"], f"{row['images_per_second']:,.0f}", f"{row['target']:,}"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("" if result["file"] else "\n3DShapes: not run.\n")
    if result["file"]:
        made_of = f", made of {result['file']['source']} ({result['file']['compression']})" * bool(
            result["file"]["source"]
        )
        lines.append(f"3DShapes reads {result['file']['read']}{made_of}, which was read through once before.\n")
    for name, parts in result["loader_parts"].items():
        shares = ", ".join(f"{part} {micro:.2g}" for part, micro in parts.items())
        lines.append(f"Without workers {max(parts, key=parts.get)} dominates {name}, in µs for each image: {shares}.\n")
    lines += [f"Training steps at batch {result['batch']}, SDN with {result['features']} features:\n"]
    lines += ["| decoder | iterations/s | s | x CNN |", "|---|---|---|---|"]
    for row in result["training"]:
        cells = f"{row['iterations_per_second']:.2f} | {row['seconds']:.3f} | {row['times_cnn']:.2f}"
        lines.append(f"| {row['decoder']} | {cells} |")
    encoder = result["encoder"]
    lines += [f"\nThe encoder alone: {encoder['images_per_second']:,.0f} images/s in batches of {encoder['batch']}."]
    lines += ["\nMetrics on a table of noisy codes of all 480,000 scenes, 10 dimensions; DCI once:\n"]
    lines += ["| metric | s | score | sizes |", "|---|---|---|---|"]
    for row in result["metrics"]:
        done = row["seconds"] is not None
        cells = f"{row['seconds']:.2f} | {row['score']:.3f}" if done else "not run | "
        sizes = ", ".join(f"{name} {size}" for name, size in row["sizes"].items()) or "default"
        lines.append(f"| {row['metric']} | {cells} | {sizes} |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict]:
    parser = OneLineParser("benchmarks.disentanglement", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, help="folder of 3DShapes/3dshapes.h5; default: a temporary one")
    parser.add_argument("--skip_hdf5", action="store_true", help="rendered scenes only")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes")
    parser.add_argument("--batches", type=int, default=200, help="that a loader gives in a round")
    parser.add_argument("--batch", type=int, default=128, help="of loaders and training")
    parser.add_argument("--features", type=int, default=200, help="of the SDN layer")
    parser.add_argument("--backend", choices=BACKENDS, default="torch", help="of the SDN layer")
    parser.add_argument("--steps", type=int, default=3, help="of training in a round")
    parser.add_argument("--encode_batch", type=int, default=512)
    parser.add_argument("--points", type=int, help="training points, votes, samples of a metric; default: the metric's")
    parser.add_argument("--trees", type=int, help="of DCI; default: the metric's")
    parser.add_argument("--skip_dci", action="store_true", help="it takes minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of the JSON and the Markdown file")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        least = 0 if name == "workers" else 1
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and number < least:
                parser.error(f"--{name} must be at least {least}; got {number}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    return options, {name: parser.get_default(name) for name in vars(options)}


def measure(options) -> dict:
    loaded = {"Shapes3DRendered": {w: open_data("Shapes3DRendered", w, options) for w in options.workers}}
    if not options.skip_hdf5:
        prepare_file(options.root)
        loaded["3DShapes"] = {w: open_data("3DShapes", w, options) for w in options.workers}
    for name, each in loaded.items():
        for data in each.values():
            check_loader(name, data)
    check_sdn(options)
    check_encoder(options)
    check_metrics(options)
    return {
        "file": None if options.skip_hdf5 else describe_file(loaded["3DShapes"][options.workers[0]]),
        "loaders": time_loaders(loaded, options),
        "loader_parts": {name: time_parts(each[0], options) for name, each in loaded.items() if 0 in each},
        "training": time_training(options),
        "encoder": time_encoder(options),
        "metrics": time_metrics(options),
    }


def main(arguments: list[str] | None = None) -> None:
    options, defaults = parse(arguments)
    about = machine(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": command(options, defaults),
        "machine": about,
        "versions": versions,
        "threads": torch.get_num_threads(),
        **{name: getattr(options, name) for name in ("rounds", "batch", "batches", "features", "backend", "steps")},
    }
    with one_line_errors("benchmarks.disentanglement", DataError, OSError), contextlib.ExitStack() as stack:
        options.root = options.root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result |= measure(options)
        text = markdown(result)
        name = re.sub(r"[^a-z0-9]+", "_", (about["gpu"] or "cpu").lower()).strip("_")
        options.output_dir.mkdir(parents=True, exist_ok=True)
        (options.output_dir / f"disentanglement_{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.output_dir / f"disentanglement_{name}.md").write_text(text)
        print(text, end="")


if __name__ == "__main__":
    main()
