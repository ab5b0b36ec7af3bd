"""How fast are the loaders, the training and the metrics of the disentanglement experiments?

    python -m benchmarks.disentanglement --output benchmarks/results/disentanglement_cpu.json

- loaders: images/s of the training loader, in its random order, for rendered scenes and for an HDF5
  file of them;
- training: iterations/s of the β-VAE, SDN decoder against convolutional decoder;
- metrics: images/s of the encoder, and seconds of each metric on a table of codes of all 480,000
  scenes.

The HDF5 file is ROOT/3DShapes/3dshapes.h5, the official one if it is there; if not, the rendered
scenes are written to it, compressed. What is read is its uncompressed copy, once through before it
is timed, so that a machine with memory to spare times no disk. Both take minutes to make and 7.6
GB, and stay there; without --root they are temporary.

Everything is checked before anything is timed: batches are the images and labels of their scenes;
loss and gradients of the SDN decoder are those of the reference; a perfect code scores near 1. What
fails ends the program with status 1. Times are medians over rounds in which the contenders take
turns, after one that is not counted; DCI is run once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from data import scenes
from data.convert import shapes3d
from data.datamodule import ImageDataModule
from data.errors import DataError
from data.locks import locked_folder
from data.sets.shapes3d_rendered import Shapes3DRendered, blocks
from lib.cli import OneLineParser, one_line_errors
from lib.config import TrainConfig
from lib.DisentanglementVAE import DisentanglementVAE
from lib.DisentanglementVAE.metrics import METRICS
from lib.models import build_model
from lib.nn import BACKENDS
from lib.training.base import objective

TARGETS = {"Shapes3DRendered": 20_000, "3DShapes": 5_000}  # images/s on two cores
CHECKED_BATCHES = 3
CNN = dict(sdn_max_scale=0)
ENCODE_BATCH = 512  # that of encode_all
TOLERANCE = 1e-5  # relative, of float32
PERFECT = 0.99  # least score of a perfect code
NOISE, DIMENSIONS = 0.3, 10  # of the codes that metrics are timed on


def prepare_file(root: Path) -> None:
    """Writes the compressed file, unless it or its copy is there."""
    path = root / "3DShapes" / "3dshapes.h5"
    if not path.exists() and not shapes3d.existing_copy(path):
        with locked_folder(path.parent, wait=True):
            shapes3d.write_hdf5(path, blocks(scenes.SCENES), scenes.SCENES, compression="gzip")


def open_data(name: str, workers: int, options) -> ImageDataModule:
    data = ImageDataModule(name, str(options.root), options.batch, options.batch, workers, seed=0)
    data.prepare_data()
    data.setup()
    return data


def read_once(data: ImageDataModule) -> dict[str, str | None]:
    """Reads the file that is read from through, into memory if there is room; its name and what it
    was made of."""
    path = data.train.dataset.path
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(2**24)
        while file.readinto(buffer):
            pass
    source, compression = path.with_name("3dshapes.h5"), None
    if source.exists():
        with shapes3d.opened(source) as images:
            compression = images.compression
    return {
        "read": path.name,
        "source": source.name if source.exists() else None,
        "compression": compression,
    }


def check_loader(name: str, data: ImageDataModule) -> None:
    """Compares batches with the data set's images and labels, and with what h5py reads from the
    file."""
    dataset = data.train.dataset
    for images, indices in itertools.islice(data.train_dataloader(), CHECKED_BATCHES):
        pairs = {
            "the scenes' images": (images, dataset.images(dataset.factors(indices))),
            "single images": (images, torch.stack([dataset[index] for index in indices.tolist()])),
            "the scenes' labels": (
                dataset.labels(indices),
                torch.from_numpy(scenes.all_labels())[indices],
            ),
        }
        if name == "3DShapes":  # whose labels are checked where it is opened
            source = dataset.path.with_name("3dshapes.h5")
            with shapes3d.opened(source if source.exists() else dataset.path) as stored:
                read = np.stack([stored[index] for index in indices.tolist()])
            pairs["the file's images"] = images, torch.from_numpy(read).permute(0, 3, 1, 2)
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
    with common.without_tf32():
        for each in (model, reference):
            output = each(each.observation.encode(images).to(each.dtype), [noise.to(each.dtype)])
            losses.append(objective(output, beta=4.0))
            losses[-1].backward()
    pairs = {"the loss": losses}
    for (key, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        pairs[f"the gradient of {key}"] = one.grad, other.grad
    for what, (one, other) in pairs.items():
        error = common.relative_error(one, other)
        if not error <= TOLERANCE:
            sys.exit(f"training is not timed: {what} differs from the reference by {error:.1e}")


def check_metrics(options) -> None:
    for name in ("beta_vae", "factor_vae"):
        score = score_of(name, perfect_codes(), options)
        if not PERFECT <= score <= 1:
            sys.exit(f"metrics are not timed: {name} of a perfect code is {score:.3f}")


def score_of(name: str, codes: np.ndarray, options) -> float:
    sizes = metric_sizes(name, options)
    return METRICS[name](codes, Shapes3DRendered(), seed=0, **sizes)["score"]


def build(options, *, sdn: bool, backend: str | None = None) -> DisentanglementVAE:
    torch.manual_seed(0)
    flags = {} if sdn else CNN
    flags = flags | dict(sdn_nfeat_0=options.features, backend=backend or options.backend)
    config = TrainConfig.for_task(task="disentanglement", **flags)
    return build_model(config, scenes.SIZE).to(options.device)


def some_images(count: int, options) -> Tensor:
    generator, data = torch.Generator().manual_seed(0), Shapes3DRendered()
    factors = [torch.randint(size, (count,), generator=generator) for size in data.factor_sizes]
    return data.images(torch.stack(factors, dim=1)).to(options.device)


def perfect_codes() -> np.ndarray:
    """The factors of all scenes with mean 0 and variance 1: [480000, 6]."""
    sizes = Shapes3DRendered.factor_sizes
    factors = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=-1).astype(float)
    return (factors - factors.mean(0)) / factors.std(0)


def metric_sizes(name: str, options) -> dict[str, int]:
    """The arguments that --points and --trees stand for; none: the metric's defaults."""
    points, sizes = options.points, {}
    if points:
        sizes = {"samples": points} if name == "mig" else {"train": points, "test": -(-points // 2)}
    return sizes | ({"trees": options.trees} if name == "dci" and options.trees else {})


def take_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of the seconds that contenders return, but for the first."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            times[name].append(run())
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def time_loaders(loaded: dict[str, dict[int, ImageDataModule]], options) -> list[dict]:
    def contender(data: ImageDataModule) -> Callable[[], float]:
        loader = data.train_dataloader()
        batches = endless(loader)
        ahead = (loader.prefetch_factor or 0) * loader.num_workers  # made while others had a turn

        def take(number: int) -> None:
            deque(itertools.islice(batches, number), maxlen=0)

        def run() -> float:
            take(ahead)
            return common.seconds(lambda: take(options.batches), "cpu")

        return run

    contenders = {
        (name, w): contender(data) for name, each in loaded.items() for w, data in each.items()
    }
    times, images = take_turns(contenders, options.rounds), options.batches * options.batch
    return [
        {"dataset": name, "workers": workers, "images/s": images / seconds, "target": TARGETS[name]}
        for (name, workers), seconds in times.items()
    ]


def endless(loader) -> Iterator:
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        yield from loader


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

        return lambda: common.seconds(steps, options.device)

    times = take_turns({"CNN": contender(False), "SDN": contender(True)}, options.rounds)
    return [
        {
            "decoder": name,
            "iterations/s": options.steps / seconds,
            "times CNN's seconds": seconds / times["CNN"],
        }
        for name, seconds in times.items()
    ]


def time_encoder(options) -> dict:
    model, images = build(options, sdn=False), some_images(ENCODE_BATCH, options)
    encode = torch.no_grad()(lambda: model.represent(model.observation.encode(images)))
    run = lambda: common.seconds(encode, options.device)  # noqa: E731
    times = take_turns({"": run}, options.rounds)
    return {"batch": ENCODE_BATCH, "images/s": ENCODE_BATCH / times[""]}


def time_metrics(options) -> list[dict]:
    perfect, rng = perfect_codes(), np.random.default_rng(0)
    noisy = perfect + NOISE * rng.standard_normal(perfect.shape)
    unused = rng.standard_normal((len(perfect), DIMENSIONS - perfect.shape[1]))  # as usual
    codes, scores = np.concatenate([noisy, unused], axis=1), {}

    def timed(name: str) -> float:
        def run() -> None:
            scores[name] = score_of(name, codes, options)

        return common.seconds(run, "cpu")

    quick = {name: lambda name=name: timed(name) for name in METRICS if name != "dci"}
    times = take_turns(quick, options.rounds)
    times |= {} if options.skip_dci else {"dci": timed("dci")}
    return [
        {"metric": name, "seconds": times.get(name), "score": scores.get(name)}
        | {"sizes": metric_sizes(name, options)}
        for name in METRICS
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("benchmarks.disentanglement", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--root", type=Path, help="folder of 3DShapes/3dshapes.h5; default: a temporary one")
    add("--skip_hdf5", action="store_true", help="rendered scenes only")
    add("--workers", type=int, nargs="+", default=[0, 2], help="loader processes")
    add("--batches", type=int, default=200, help="that a loader gives in a round")
    add("--batch", type=int, default=128, help="of loaders and training")
    add("--features", type=int, default=200, help="of the SDN layer")
    add("--backend", choices=BACKENDS, default="torch", help="of the SDN layer")
    add("--steps", type=int, default=3, help="of training in a round")
    add("--points", type=int, help="training points, votes, samples of a metric; default: its own")
    add("--trees", type=int, help="of DCI; default: the metric's")
    add("--skip_dci", action="store_true", help="it takes minutes")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, help="of the CPU; default: torch's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    given = [value for value in vars(options).values() if type(value) is int]
    if min(given) < 1 or min(options.workers) < 0:
        parser.error("all numbers must be at least 1, --workers 0 or more")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    return options


def measure(options) -> dict:
    names = ["Shapes3DRendered"]
    if not options.skip_hdf5:
        prepare_file(options.root)
        names.append("3DShapes")
    loaded = {name: {w: open_data(name, w, options) for w in options.workers} for name in names}
    for name, each in loaded.items():
        for data in each.values():
            check_loader(name, data)
    check_sdn(options)
    check_metrics(options)
    return {
        "file": None if options.skip_hdf5 else read_once(loaded["3DShapes"][options.workers[0]]),
        "loaders": time_loaders(loaded, options),
        "training": time_training(options),
        "encoder": time_encoder(options),
        "metrics": time_metrics(options),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    packages = ("numpy", "scikit-learn", "pytorch-lightning", "h5py")
    result = common.stamp("disentanglement", arguments, options.device, packages)
    settings = ("rounds", "batch", "batches", "features", "backend", "steps")
    result |= {name: getattr(options, name) for name in settings}
    with (
        one_line_errors("benchmarks.disentanglement", DataError, OSError),
        contextlib.ExitStack() as stack,
    ):
        options.root = options.root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result |= measure(options)
        common.write(result, options.output)
    columns = {"dataset": "", "workers": "", "images/s": ",.0f", "target": ",.0f"}
    print(common.table(result["loaders"], columns))
    columns = {"decoder": "", "iterations/s": ".3g", "times CNN's seconds": ".3g"}
    print(common.table(result["training"], columns))
    print(common.table([result["encoder"]], {"batch": "", "images/s": ",.0f"}))
    columns = {"metric": "", "seconds": ".3g", "score": ".3g"}
    print(common.table(result["metrics"], columns))


if __name__ == "__main__":
    main()
