"""Importance weights of images, streamed through the model within the memory that there is."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..models import VAE
from ..utils import keyed_noise

try:
    import resource
except ImportError:  # not on Windows
    resource = None

# Rows of one pass beyond which a row takes no less time (the quickstart's model on one and two
# cores of a CPU).
LARGEST_CHUNK_CPU = 128
LARGEST_CHUNK_GPU = 1024
# What a convolution needs beside its input and output: measured up to 1.3 times the tensors' bytes
# on a CPU.
WORKSPACE = 1.5

# In the messages of CUDA's allocator, PyTorch's on the CPU (Linux, Windows), C++, cuBLAS and cuDNN,
# oneDNN (twice).
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "alloc_failed",
    "could not create a memory",
    "could not create a primitive",
)


class LikelihoodError(Exception):
    """An image whose likelihood cannot be computed; the message is one line."""


@dataclass(frozen=True)
class Group:
    """Images that are computed together, and how far they have come.

    images: Their indices in the data set.
    samples: Importance samples that are done.
    log_likelihoods: From these samples, in nats; anything while there are none.
    chunk: Rows (images times samples) of one top-down pass.
    """

    images: tuple[int, ...]
    samples: int
    log_likelihoods: tuple[float, ...]
    chunk: int

    def halves(self) -> list[Group]:
        middle = len(self.images) // 2
        return [
            replace(self, images=self.images[part], log_likelihoods=self.log_likelihoods[part])
            for part in (slice(middle), slice(middle, None))
        ]


class ImportanceSampler:
    """Importance-weighted log-likelihoods `log(1/K sum_k p(x, z_k) / q(z_k | x))` (Burda et al.
    2015).

    The bottom-up pass runs once per image; samples stream through the top-down pass in chunks. When
    memory runs out the chunk is halved for good, and what failed is done again in smaller passes.

    Arguments:
        model: In evaluation mode, on its device.
        images: uint8 [3, H, W] by index.
        samples: K.
        seed: Of the noise, which depends on (seed, image, sample) only.
        chunk: Rows of one top-down pass.
    """

    def __init__(
        self, model: VAE, images: Sequence[Tensor], *, samples: int, seed: int, chunk: int
    ):
        self.model = model
        self.images = images
        self.samples = samples
        self.seed = seed
        self.chunk = chunk

    @torch.no_grad()
    def __call__(self, group: Group) -> Iterator[Group]:
        """The group, or parts of it, after each pass until all samples are done.

        Raises:
            LikelihoodError: if a single row does not fit into memory, or a log-likelihood is not
                finite.
        """
        self.chunk = min(self.chunk, group.chunk)
        waiting = [group]
        while waiting:
            group = waiting.pop()
            number = len(group.images)
            if number > self.chunk:
                waiting += reversed(group.halves())
                continue
            encoded = self._attempt(number, self.encode, group.images)
            while encoded and number <= self.chunk and group.samples < self.samples:
                last = min(group.samples + self.chunk // number, self.samples)
                numbers = range(group.samples, last)
                log_sums = self._attempt(
                    number * len(numbers), self.log_sums, group.images, encoded, numbers
                )
                if log_sums is not None:
                    group = self._after(group, log_sums, last)
                    yield group
            del encoded
            if group.samples < self.samples:
                waiting.append(group)

    def encode(self, images: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The images as data [B, 3, H, W] and their posterior parameters of each layer, top-down
        order."""
        levels = torch.stack([self.images[image] for image in images]).to(self.model.device)
        x = self.model.observation.encode(levels).to(self.model.dtype)
        return x, self.model.bottom_up(x)[0]

    def log_sums(
        self, images: Sequence[int], encoded: tuple[Tensor, list[Tensor]], numbers: range
    ) -> Tensor:
        """`log sum_k p(x, z_k) / q(z_k | x)` over the samples of these numbers: float64 [B], on the
        CPU."""
        x, posterior = encoded
        keys = [(image, number) for image in images for number in numbers]
        noise = keyed_noise(self.model.latent_shapes, self.seed, *zip(*keys, strict=True))
        _, rates, params = self.model.top_down(
            len(keys),
            posterior=[_repeated(q, len(numbers)) for q in posterior],
            noise=[eps.to(self.model.device, self.model.dtype) for eps in noise],
            one_sample_kl=True,
        )
        log_prob = self.model.observation.log_prob(params, _repeated(x, len(numbers)))
        log_weights = log_prob.double() - rates.double().sum(1)
        return torch.logsumexp(log_weights.view(len(images), len(numbers)), dim=1).cpu()

    def _after(self, group: Group, log_sums: Tensor, samples: int) -> Group:
        """The group with the further samples up to `samples`, whose weights have these log-sums."""
        if group.samples:
            before = torch.tensor(group.log_likelihoods, dtype=torch.float64) + math.log(
                group.samples
            )
            log_sums = torch.logaddexp(before, log_sums)
        log_likelihoods = (log_sums - math.log(samples)).tolist()
        for image, value in zip(group.images, log_likelihoods, strict=True):
            if not math.isfinite(value):
                raise LikelihoodError(
                    f"the log-likelihood of image {image} is {value} after {samples} samples: did training diverge?"
                )
        return replace(
            group, samples=samples, log_likelihoods=tuple(log_likelihoods), chunk=self.chunk
        )

    def _attempt(self, rows: int, function: Callable, *arguments) -> Any:
        """What the function gives; None if memory ran out, and then the chunk is half of `rows` or
        less."""
        try:
            return function(*arguments)
        except (RuntimeError, MemoryError) as error:
            message = " ".join(str(error).split())[:200]
            if not memory_ran_out(error):
                raise
        # Only now, past the except block, are the failed pass's tensors free.
        if rows == 1:
            raise LikelihoodError(
                f"out of memory on {self.model.device} with a single importance sample of a single image: free "
                f"memory there, or use another device ({message})"
            )
        self.chunk = min(self.chunk, rows // 2)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def pick_chunk(model: VAE, sharing: int = 1) -> int:
    """Rows of one top-down pass: the largest power of two that should fit into half of the device's
    free memory.

    Arguments:
        sharing: Workers among which the device's memory is divided.

    Returns:
        At least 1, at most the number beyond which a row takes no less time.

    Raises:
        LikelihoodError: if a single row does not fit.
    """
    device = model.device
    largest = LARGEST_CHUNK_CPU if device.type == "cpu" else LARGEST_CHUNK_GPU
    rows = int(_free_memory(device) / 2 / sharing / bytes_per_row(model))
    return min(largest, 2 ** int(math.log2(max(1, rows))))


@torch.no_grad()
def bytes_per_row(model: VAE) -> int:
    """Memory that a row of a pass takes beside the weights: the peak of a pass of one row.

    `n` rows take at most `n` times as much: of the tensors alive at any moment, each is in
    proportion to the rows or does not depend on them.
    """
    image = torch.zeros(model.image_shape, dtype=torch.uint8)
    sampler = ImportanceSampler(model, [image], samples=1, seed=0, chunk=1)
    with _LiveBytes(model) as live:
        encoded = sampler._attempt(1, sampler.encode, [0])
        sampler._attempt(1, sampler.log_sums, [0], encoded, range(1))
    return int(WORKSPACE * live.peak)


class _LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it hold at a time; those of the model do not count."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self._known = {
            tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())
        }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


def _repeated(x: Tensor, times: int) -> Tensor:
    """Each row `times` times in succession: [B, ...] -> [B * times, ...]; for one row without
    copying it."""
    return x.unsqueeze(1).expand(-1, times, *x.shape[1:]).flatten(0, 1)


def memory_ran_out(error: Exception) -> bool:
    """Whether an exception says that the memory of a CPU or GPU did not suffice."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([_free_in_system(), *_free_in_control_groups(), *_free_address_space()]))


def _free_in_system() -> int:
    try:
        (line,) = [
            line
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable:")
        ]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_address_space() -> Iterator[int]:
    """What `ulimit -v` leaves of this process's address space, if it is set."""
    statistics = Path("/proc/self/statm")
    if (
        statistics.is_file()
        and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY
    ):
        yield limit - int(statistics.read_text().split()[0]) * resource.getpagesize()


def _free_in_control_groups() -> Iterator[int]:
    """What the limits of Linux control groups leave, as containers and batch systems set them;
    version 2 and 1."""
    try:
        memberships = [
            line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
        ]
    except OSError:
        return
    for controllers, path in memberships:
        if controllers == "":
            root, limit_file, usage_file = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_file, usage_file = (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        group = Path(root + path)
        for level in (group, *group.parents):
            try:
                free = int((level / limit_file).read_text()) - int((level / usage_file).read_text())
                statistics = dict(
                    line.split() for line in (level / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):  # no such level, or "max": no limit
                continue
            yield free + int(
                statistics.get("inactive_file", 0)
            )  # a cache of files, given up on demand
