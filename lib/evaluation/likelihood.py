"""The importance-weighted negative log-likelihood of a data set, in bits per dimension."""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config import ConfigError
from ..models import VAE
from ..processes import end_with_parent
from ..utils import nats_to_bits_per_dim
from .elbo import Estimate, Progress, bits_with_error, shown_on
from .importance import ImportanceSampler, LikelihoodError, pick_chunk
from .ledger import Ledger
from .options import LIMIT
from .registry import Context, Evaluation, Flag, Result, register
from .tables import as_count

OpenModel = Callable[[str], tuple[VAE, Sequence[Tensor]]]


@register
class Likelihood(Evaluation):
    name = "likelihood"
    help = "importance-weighted likelihood, bits/dim; interrupted, the same command goes on"
    order = 20
    flags = (
        LIMIT,
        Flag("importance_samples", "samples of each image", default=1024, least=1),
        Flag("chunk", "samples at a time; default: by the model's size", least=1),
        Flag("processes", "processes; with GPUs one on each", default=1, least=1, most=1024),
    )
    needs = ("validation",)
    uses_batch = False
    title = "Importance-weighted likelihood"
    paper = "Table 1"
    explanation = (
        "A tighter upper bound on −log p(x) than the negative ELBO, from many weighted posterior "
        "samples for each validation image (Burda et al. 2015); less is better."
    )
    facts = {
        "samples": ("importance samples for each image", as_count),
        "computed": ("images computed by this command", as_count),
        "chunk": ("samples computed at a time", as_count),
    }
    symbol = "−log p(x)"

    def check(self, flags: argparse.Namespace) -> None:
        if flags.processes > 1 and flags.device.startswith("cuda:"):
            raise ConfigError(
                f"--processes {flags.processes} uses all GPUs: give --device cuda; got "
                f"{flags.device}"
            )

    def compute(self, context: Context) -> Result:
        """Goes on with what an earlier command has finished with these weights, this seed and this
        number of samples."""
        flags, loaded, device = context.flags, context.loaded, context.model.device
        devices, open_model = [str(device)], lambda device: (context.model, context.validation)
        if flags.processes > 1:
            open_model, gpus = context.reopen, torch.cuda.device_count()
            devices = [
                f"cuda:{i % gpus}" if device.type == "cuda" else device.type
                for i in range(flags.processes)
            ]
        name = f"{loaded.fingerprint}_seed{flags.seed}_samples{flags.importance_samples}"
        with context.bar(context.limit, "-log p(x)") as bar:
            return negative_log_likelihood(
                open_model,
                range(context.limit),
                image_shape=context.model.image_shape,
                samples=flags.importance_samples,
                seed=flags.seed,
                ledger=context.folder / f"likelihood_{name}.csv",
                identity={
                    "weights": loaded.fingerprint,
                    "dataset": loaded.config.dataset,
                    "validation_images": len(context.validation),
                },
                devices=devices,
                chunk=flags.chunk,
                progress=shown_on(bar),
            )

    def lines(self, result: Result, context: Context) -> list[str]:
        return [
            f"-log p(x): {bits_with_error(result)} bits/dim ({result['images']} images, "
            f"{result['samples']} importance samples)"
        ]


def negative_log_likelihood(
    open_model: OpenModel,
    indices: Sequence[int],
    *,
    image_shape: Sequence[int],
    samples: int,
    seed: int,
    ledger: str | Path,
    identity: Mapping[str, str | int],
    devices: Sequence[str] = ("cpu",),
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Importance-weighted estimate of the negative log-likelihood (Burda et al. 2015), in bits per
    dimension.

    `-log(1/K sum_k p(x, z_k) / q(z_k | x))` with K samples an image, averaged over images
    (DEVIATIONS.md). Finished images go to a file, and called again with it the function computes
    only what is missing.

    An image's value depends on (seed, index), K and `chunk` alone, so any number of workers gives
    the same result to the bit if each has the same number of threads; another chunk or number of
    threads changes the order of float32 sums, about 1e-7 of the result.

    Arguments:
        open_model: Called with a device's name; gives the model in evaluation mode on that device,
            and the images, uint8 [3, H, W] by index. With several devices it must be picklable.
        indices: Of the images, each once.
        image_shape: (C, H, W).
        samples: K.
        seed: Of the noise.
        ledger: The file of finished images, see `Ledger`. It may hold further images, which do not
            count.
        identity: What else the numbers depend on: the weights, the data set, ...; `samples` and
            `seed` are added.
        devices: One worker for each entry, such as ("cuda:0", "cuda:1") or ("cpu", "cpu"). A single
            worker is this process; several are processes of their own, which divide this one's
            threads among them, and are started in the main thread.
        chunk: Samples of one top-down pass, see `pick_chunk` if it is not given. When memory runs
            out it is halved.
        progress: Called with (images finished since the last call, running estimate in bits/dim);
            first with what the ledger held already, if it did.

    Returns:
        `bits_per_dim`; its `standard_error` over images, None for a single one; the number of
        `images` and of `samples`; how many images were `computed` now; the smallest `chunk` used,
        None if nothing was computed; `seconds` taken.

    Raises:
        LedgerError: if the file cannot be used, see `Ledger`.
        LikelihoodError: if one sample does not fit into memory, the log-likelihood of an image is
            not finite, or a worker process dies.
        Exception: what `open_model` raised, in this process or in a worker's.
    """
    begun = time.perf_counter()
    indices, progress = list(indices), progress or (lambda images, estimate: None)
    too_few = samples < 1 or (chunk is not None and chunk < 1)
    if not indices or len(set(indices)) < len(indices) or not devices or too_few:
        raise ValueError(
            "needs images, each once, at least one device, and samples and chunk of at least 1"
        )
    with Ledger(ledger, {**identity, "samples": samples, "seed": seed}) as finished:
        nats = torch.tensor(
            [-finished.rows.get(image, math.nan) for image in indices], dtype=torch.float64
        )
        missing = [image for image, value in zip(indices, nats.isnan(), strict=True) if value]

        def estimate() -> Estimate:
            return Estimate([nats_to_bits_per_dim(nats[~nats.isnan()], image_shape)])

        if len(missing) < len(indices):
            progress(len(indices) - len(missing), str(estimate()))
        start = partial(_start, open_model, samples=samples, seed=seed, chunk=chunk)
        compute = _here if len(devices) == 1 else _in_processes
        places = {image: place for place, image in enumerate(indices)}
        chunks = []
        if missing:
            with contextlib.closing(compute(start, devices, missing)) as values:
                for image, value, used in values:
                    finished.add(image, value)
                    nats[places[image]] = -value
                    chunks.append(used)
                    progress(1, str(estimate()))
        total = estimate()
    return {
        "bits_per_dim": total.mean,
        "standard_error": total.standard_error,
        "images": len(indices),
        "samples": samples,
        "computed": len(missing),
        "chunk": min(chunks, default=None),
        "seconds": time.perf_counter() - begun,
    }


def _start(
    open_model: OpenModel,
    device: str,
    *,
    samples: int,
    seed: int,
    chunk: int | None,
) -> ImportanceSampler:
    """The sampler of one device."""
    model, images = open_model(device)
    chunk = chunk or pick_chunk(model)
    return ImportanceSampler(model, images, samples=samples, seed=seed, chunk=chunk)


def _here(
    start: Callable[[str], ImportanceSampler], devices: Sequence[str], images: Sequence[int]
) -> Iterator[tuple[int, float, int]]:
    """As `_in_processes`, in this process."""
    sampler = start(devices[0])
    for image in images:
        yield image, sampler(image), sampler.chunk


# Of a worker process: what gives its sampler, and then the sampler.
_worker: Callable[[], ImportanceSampler] | ImportanceSampler


def _in_processes(
    start: Callable[[str], ImportanceSampler], devices: Sequence[str], images: Sequence[int]
) -> Iterator[tuple[int, float, int]]:
    """(image, log-likelihood, chunk used) of the images as they are finished, by a process for each
    device.

    Processes share nothing and wait for nobody, so no collective communication can time out during
    a job of hours. They end with this process, whatever ends it.
    """
    context = multiprocessing.get_context("spawn")
    names = context.SimpleQueue()
    for device in devices:
        names.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(len(devices), context, _begin, (start, names, threads))
    try:
        # Inherited by the processes: Ctrl-C is this process's to handle.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            done = as_completed([pool.submit(_compute, image) for image in images])
        finally:
            signal.signal(signal.SIGINT, handler)
        for future in done:
            yield future.result()
    except BrokenProcessPool:
        raise LikelihoodError(
            "a worker process was killed, perhaps because the machine ran out of memory; what was "
            "finished is kept: run again"
        ) from None
    finally:
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        pool.shutdown(cancel_futures=True)


def _begin(start: Callable[[str], ImportanceSampler], names, threads: int) -> None:
    """Prepares a worker process; the model is opened by its first image, so that an error there is
    that image's and reaches the parent."""
    global _worker
    end_with_parent()
    torch.set_num_threads(threads)
    _worker = partial(start, names.get())


def _compute(image: int) -> tuple[int, float, int]:
    global _worker
    if not isinstance(_worker, ImportanceSampler):
        _worker = _worker()
    return image, _worker(image), _worker.chunk
