"""Negative ELBO and importance-weighted negative log-likelihood of a data set, in bits per
dimension."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..DisentanglementVAE import DisentanglementVAE
from ..models import VAE
from ..utils import keyed_noise, nats_to_bits_per_dim
from .importance import Group, ImportanceSampler, LikelihoodError, pick_chunk
from .ledger import Ledger
from .workers import open_workers

PARTIAL_SECONDS = 30.0  # after which an unfinished image's samples are kept as well


@dataclass
class Estimate:
    """Mean of a per-image quantity in bits/dim with its standard error over images."""

    values: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        self.values.append(values.detach().double().cpu())

    @property
    def count(self) -> int:
        return sum(len(values) for values in self.values)

    @property
    def mean(self) -> float:
        return torch.cat(self.values).mean().item()

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None for fewer than two images."""
        return (
            torch.cat(self.values).std().item() / math.sqrt(self.count) if self.count > 1 else None
        )

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" +- {self.standard_error:.4f}" if self.count > 1 else "")


Progress = Callable[[int, str], None]
OpenModel = Callable[[str], tuple[VAE, Sequence[Tensor]]]


@torch.no_grad()
def negative_elbo(
    model: VAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, float | int | list[float]]:
    """Negative ELBO and its parts over a data set, in bits per dimension.

    Arguments:
        batches: (uint8 images [B, 3, H, W], their indices [B]); images with index -1 do not count.
        seed: Of the posterior's noise, which depends on (seed, index) only.
        progress: Called with (images done, running estimate) after each batch.

    Returns:
        `bits_per_dim`, its `standard_error` over images, `nats` for each image, `distortion`,
        `rate`, the number of `images`, and `rate_per_layer` (topmost first) or, of a
        disentanglement VAE, `rate_per_dimension`.

    Raises:
        LikelihoodError: if the ELBO of an image is not finite.
    """
    total, distortion, rates = Estimate(), Estimate(), Estimate()
    for images, indices in batches:
        x, indices = _real_images(model, images, indices)
        if not len(indices):
            continue
        noise = [
            eps.to(model.device, model.dtype)
            for eps in keyed_noise(model.latent_shapes, seed, indices)
        ]
        output = model(x, noise)
        for index, elbo in zip(indices, output.elbo.tolist(), strict=True):
            if not math.isfinite(elbo):
                raise LikelihoodError(f"the ELBO of image {index} is {elbo}: did training diverge?")
        total.add(nats_to_bits_per_dim(-output.elbo, model.image_shape))
        distortion.add(nats_to_bits_per_dim(output.distortion, model.image_shape))
        rates.add(nats_to_bits_per_dim(output.rates, model.image_shape))
        if progress:
            progress(len(indices), str(total))
    parts = torch.cat(rates.values).mean(0)
    return {
        "bits_per_dim": total.mean,
        "standard_error": total.standard_error,
        "nats": total.mean / nats_to_bits_per_dim(1.0, model.image_shape),
        "distortion": distortion.mean,
        "rate": parts.sum().item(),
        "rate_per_dimension"
        if isinstance(model, DisentanglementVAE)
        else "rate_per_layer": parts.tolist(),
        "images": total.count,
    }


def negative_log_likelihood(
    open_model: OpenModel,
    indices: Sequence[int],
    *,
    samples: int,
    seed: int,
    ledger: str | Path,
    identity: Mapping[str, str | int],
    devices: Sequence[str] = ("cpu",),
    chunk: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float | int | None]:
    """Importance-weighted estimate of the negative log-likelihood (Burda et al. 2015), in bits per
    dimension.

    `-log(1/K sum_k p(x, z_k) / q(z_k | x))` with K samples an image, averaged over images
    (DEVIATIONS.md). Finished images go to a file, and called again with it the function computes
    only what is missing.

    The noise depends on (seed, index, sample) only. Groups of images are laid out by `chunk` alone,
    so any number of workers gives the same result to the bit if each has the same number of
    threads; another chunk or number of threads changes the order of float32 sums, about 1e-7 of the
    result.

    Arguments:
        open_model: Called with a device's name; gives the model in evaluation mode on that device,
            and the images, uint8 [3, H, W] by index. With several devices it must be picklable.
        indices: Of the images, each once.
        samples: K.
        seed: Of the noise.
        ledger: The file of finished images, see `Ledger`. It may hold further images, which do not
            count.
        identity: What else the numbers depend on: the weights, the data set, ...; `samples` and
            `seed` are added.
        devices: One worker for each entry, such as ("cuda:0", "cuda:1") or ("cpu", "cpu"). A single
            worker is this process; several are processes of their own, which divide this one's
            threads among them.
        chunk: Rows (images times samples) of one top-down pass; picked by the free memory if not
            given. When memory runs out it is halved.
        progress: Called with (images finished since the last call, running estimate in bits/dim);
            first with what the ledger held already, if it did.

    Returns:
        `bits_per_dim`; its `standard_error` over images, None for a single one; the number of
        `images` and of `samples`; how many images were `computed` now; the smallest `chunk` used,
        None if nothing was computed; `seconds` taken.

    Raises:
        LedgerError: if the file cannot be used, see `Ledger`.
        LikelihoodError: if one row does not fit into memory, or the log-likelihood of an image is
            not finite.
        WorkerError: if a worker process dies.
        Exception: what `open_model` raised, in this process or in a worker's.
    """
    begun = time.perf_counter()
    indices = list(indices)
    too_few = samples < 1 or (chunk is not None and chunk < 1)
    if not indices or len(set(indices)) < len(indices) or not devices or too_few:
        raise ValueError(
            "needs images, each once, at least one device, and samples and chunk of at least 1"
        )
    with Ledger(ledger, {**identity, "samples": samples, "seed": seed}) as finished:
        job = _Job(indices, samples, finished, progress)
        missing = job.missing
        if missing:
            start = partial(
                _start_worker,
                open_model,
                samples=samples,
                seed=seed,
                chunk=chunk,
                devices=tuple(devices),
                threads=torch.get_num_threads(),
            )
            with open_workers(start, devices) as workers:
                chunks, image_shapes = zip(*workers.reports, strict=True)
                job.begin(image_shapes[0])
                chunk = min(chunks)
                for group in workers.run(job.groups(chunk)):
                    chunk = min(chunk, group.chunk)
                    job.record(group)
        else:
            job.begin(open_model(devices[0])[0].image_shape)
            chunk = None
    return {
        "bits_per_dim": job.estimate.mean,
        "standard_error": job.estimate.standard_error,
        "images": len(indices),
        "samples": samples,
        "computed": missing,
        "chunk": chunk,
        "seconds": time.perf_counter() - begun,
    }


def _start_worker(
    open_model: OpenModel,
    device: str,
    *,
    samples: int,
    seed: int,
    chunk: int | None,
    devices: tuple[str, ...],
    threads: int,
) -> tuple[tuple[int, tuple[int, int, int]], ImportanceSampler]:
    """A worker's report, (rows of a pass, the images' shape), and what it does with a group. See
    `open_workers`."""
    if len(devices) > 1:
        torch.set_num_threads(max(1, threads // len(devices)))
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    model, images = open_model(device)
    chunk = chunk or pick_chunk(model, sharing=devices.count(device))
    return (chunk, model.image_shape), ImportanceSampler(
        model, images, samples=samples, seed=seed, chunk=chunk
    )


class _Job:
    """The images asked for: which are finished, which are missing, and the estimate so far.

    Arguments:
        indices: Of the images.
        samples: Of a finished image.
        ledger: Where finished images go, and how far those have come that take long.
        progress: See `negative_log_likelihood`.
    """

    def __init__(self, indices: list[int], samples: int, ledger: Ledger, progress: Progress | None):
        self.indices = indices
        self.samples = samples
        self.ledger = ledger
        self.progress = progress or (lambda images, estimate: None)
        self.place = {image: place for place, image in enumerate(indices)}
        self.nats = torch.full((len(indices),), math.nan, dtype=torch.float64)
        self.write_at: dict[tuple[int, ...], float] = {}
        for image in indices:
            done, log_likelihood = ledger.rows.get(image, (0, math.nan))
            if done == samples:
                self.nats[self.place[image]] = log_likelihood

    @property
    def missing(self) -> int:
        return int(self.nats.isnan().sum())

    @property
    def estimate(self) -> Estimate:
        return Estimate([nats_to_bits_per_dim(-self.nats[~self.nats.isnan()], self.image_shape)])

    def begin(self, image_shape: tuple[int, int, int]) -> None:
        """Tells the progress what was finished before."""
        self.image_shape = image_shape
        if self.missing < len(self.indices):
            self.progress(len(self.indices) - self.missing, str(self.estimate))

    def groups(self, chunk: int) -> Iterator[Group]:
        """The missing images of each stretch of `indices` that fills a chunk; together those that
        have come as far."""
        length = max(1, chunk // self.samples)
        for start in range(0, len(self.indices), length):
            members: dict[int, list[tuple[int, float]]] = {}
            for image in self.indices[start : start + length]:
                done, log_likelihood = self.ledger.rows.get(image, (0, math.nan))
                if done < self.samples:
                    members.setdefault(done, []).append((image, log_likelihood))
            for done, rows in members.items():
                images, log_likelihoods = zip(*rows, strict=True)
                yield Group(images, done, log_likelihoods, chunk)

    def record(self, group: Group) -> None:
        """Keeps a finished group, and every now and then how far an unfinished one has come."""
        now = time.monotonic()
        if group.samples == self.samples:
            self.ledger.add(group.images, group.samples, group.log_likelihoods)
            self.nats[[self.place[image] for image in group.images]] = torch.tensor(
                group.log_likelihoods, dtype=torch.float64
            )
            self.write_at.pop(group.images, None)
            self.progress(len(group.images), str(self.estimate))
        elif now >= self.write_at.setdefault(group.images, now + PARTIAL_SECONDS):
            self.ledger.add(group.images, group.samples, group.log_likelihoods)
            self.write_at[group.images] = now + PARTIAL_SECONDS


def _real_images(model: VAE, images: Tensor, indices: Tensor) -> tuple[Tensor, list[int]]:
    """Encoded images on the model's device without those that pad the batch, and their indices."""
    real = indices >= 0
    return model.observation.encode(images[real].to(model.device)), indices[real].tolist()
