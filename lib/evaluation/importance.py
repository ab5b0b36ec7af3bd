"""Importance-weighted log-likelihoods of images, and the memory that they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models import VAE
from ..utils import keyed_noise

# Memory for a pass, and rows beyond which a row takes no less time (the quickstart's model on a
# CPU). A GPU that has less says so, and the chunk is halved; a CPU's system may only kill.
BYTES = {"cpu": 2 * 2**30, "cuda": 32 * 2**30}
LARGEST_CHUNK = {"cpu": 128, "cuda": 1024}
# Bytes that a row takes, over those of the widest convolution's output at the image's scale:
# measured 0.7 to 9.6 in four architectures.
TENSORS_ALIVE = 10

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


class ImportanceSampler:
    """Log-likelihoods `log(1/K sum_k p(x, z_k) / q(z_k | x))` (Burda et al. 2015), in nats.

    The bottom-up pass runs once for each image; samples stream through the top-down pass in chunks.
    When memory runs out the chunk is halved for good, and what failed is done again.

    Arguments:
        model: In evaluation mode, on its device.
        images: uint8 [3, H, W] by index.
        samples: K.
        seed: Of the noise, which depends on (seed, image, sample) only.
        chunk: Samples of one top-down pass.
    """

    def __init__(
        self, model: VAE, images: Sequence[Tensor], *, samples: int, seed: int, chunk: int
    ):
        self.model = model
        self.images = images
        self.samples = samples
        self.seed = seed
        self.chunk = min(chunk, samples)

    @torch.no_grad()
    def __call__(self, image: int) -> float:
        """The log-likelihood of the image of this index.

        Raises:
            LikelihoodError: if a single sample does not fit into memory, or the log-likelihood is
                not finite.
        """
        encoded = None
        while encoded is None:
            encoded = self._attempt(self._encode, image)
        log_sums: list[Tensor] = []
        done = 0
        while done < self.samples:
            numbers = range(done, min(done + self.chunk, self.samples))
            log_sum = self._attempt(self._log_sum, image, *encoded, numbers)
            if log_sum is not None:
                log_sums.append(log_sum)
                done = numbers.stop
        value = torch.logsumexp(torch.stack(log_sums), dim=0).item() - math.log(self.samples)
        if not math.isfinite(value):
            raise LikelihoodError(
                f"the log-likelihood of image {image} is {value} after {self.samples} samples: did "
                "training diverge?"
            )
        return value

    def _encode(self, image: int) -> tuple[Tensor, list[Tensor]]:
        """The image as data [1, 3, H, W] and its posterior parameters of each layer, top-down
        order."""
        levels = self.images[image].unsqueeze(0).to(self.model.device)
        x = self.model.observation.encode(levels).to(self.model.dtype)
        return x, self.model.bottom_up(x)[0]

    def _log_sum(self, image: int, x: Tensor, posterior: list[Tensor], numbers: range) -> Tensor:
        """`log sum_k p(x, z_k) / q(z_k | x)` over the samples of these numbers: float64, a scalar
        on the CPU."""
        count = len(numbers)
        noise = keyed_noise(self.model.latent_shapes, self.seed, [image] * count, numbers)
        _, rates, params = self.model.top_down(
            count,
            posterior=[q.expand(count, *q.shape[1:]) for q in posterior],
            noise=[eps.to(self.model.device, self.model.dtype) for eps in noise],
            one_sample_kl=True,
        )
        log_prob = self.model.observation.log_prob(params, x.expand(count, *x.shape[1:]))
        return torch.logsumexp(log_prob.cpu().double() - rates.cpu().double().sum(1), dim=0)

    def _attempt(self, function: Callable, *arguments: Any) -> Any:
        """What the function gives; None if memory ran out, and then the chunk is halved."""
        try:
            return function(*arguments)
        except (RuntimeError, MemoryError) as error:
            message = " ".join(str(error).split())[:200]
            if not memory_ran_out(error):
                raise
        # Only now, past the except block, are the failed pass's tensors free.
        if self.chunk == 1:
            raise LikelihoodError(
                f"out of memory on {self.model.device} with a single importance sample of a single "
                f"image: free memory there, or use another device ({message})"
            )
        self.chunk //= 2
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def pick_chunk(model: VAE) -> int:
    """Rows of one top-down pass: a power of two that depends on the model and the kind of device
    alone, so that a command gives the same numbers again."""
    widest = max(
        module.out_channels
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    )
    kind = "cpu" if model.device.type == "cpu" else "cuda"
    bytes_of_a_row = TENSORS_ALIVE * 4 * widest * math.prod(model.image_shape[1:])
    rows = max(1, BYTES[kind] // bytes_of_a_row)
    return min(LARGEST_CHUNK[kind], 2 ** int(math.log2(rows)))


def memory_ran_out(error: Exception) -> bool:
    """Whether an exception says that the memory of a CPU or GPU did not suffice."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )
