"""What the examples share: training and scoring of an arm, the table and the picture.

The protocol is in docs/beyond-vaes.md. A task is a function `make(count, size, seed)` that returns
inputs [N, C, size, size], truths and weights [N, 1, size, size], all float32.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

Pictures = tuple[Tensor, Tensor, Tensor]
Make = Callable[[int, int, int], Pictures]


def cross_entropy(logits: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    errors = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (errors * weight).sum() / weight.sum()


def train(
    build: Callable[[], nn.Module],
    sets: list[Pictures],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    seconds: float | None = None,
    batch_size: int = 16,
    clip: float = 1.0,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy,
) -> tuple[nn.Module, int, float]:
    """Trains a network with AdamW, a warm-up of 50 steps and a cosine decay.

    Arguments:
        sets: Inputs, truths and weights to train on, a set for each size, which take turns.
        seconds: If given, training ends after so many seconds of processor time instead of after
            `steps`. They are counted around the training steps alone.
        clip: The norm to which larger gradients are reduced.
        loss: Of the network's output, truths and weights, which are zero where nothing counts.

    Returns:
        The network, in evaluation mode, the number of steps and the seconds of processor time that
        it was trained for.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = build().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    orders = [torch.empty(0, dtype=torch.long) for _ in sets]
    used, step = 0.0, 0
    while (done := used / seconds if seconds else step / steps) < 1:
        started = time.process_time()
        turn = step % len(sets)
        if len(orders[turn]) < batch_size:
            orders[turn] = torch.randperm(len(sets[turn][0]), generator=generator)
        batch, orders[turn] = orders[turn].split([batch_size, len(orders[turn]) - batch_size])
        x, y, weight = (part[batch] for part in sets[turn])
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * done)
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * cosine
        optimizer.zero_grad()
        loss(network(x), y, weight).backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        step += 1
        used += time.process_time() - started
    return network.eval(), step, used


@torch.no_grad()
def intersection_over_union(network: Callable[[Tensor], Tensor], pictures: Pictures) -> float:
    """The mean over pictures of the intersection over union, where weights are positive. A picture
    in which there is nothing to find and nothing was found counts as 1."""
    scores = []
    together = max(1, (128 // pictures[0].shape[-1]) ** 2)  # pictures; keeps memory bounded
    for x, y, weight in zip(*(part.split(together) for part in pictures), strict=True):
        found, there, counts = network(x) > 0, y > 0.5, weight > 0
        both = (found & there & counts).flatten(1).sum(1)
        either = ((found | there) & counts).flatten(1).sum(1)
        scores.append(torch.where(either > 0, both / either.clamp(min=1), 1.0))
    return torch.cat(scores).double().mean().item()


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """The mean and the standard deviation, which is 0 of a single value."""
    mean = statistics.mean(values)
    return mean, statistics.stdev(values, mean) if len(values) > 1 else 0.0


def table(scores: dict[str, dict[int | str, list[float]]]) -> str:
    """A Markdown table, one row for each arm: mean ± standard deviation over seeds at each size."""
    sizes = list(next(iter(scores.values())))
    lines = [f"| arm | seeds | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 2) + "|"]
    for arm, at in scores.items():
        cells = []
        for size in sizes:
            cells.append("{:.4f} ± {:.4f}".format(*mean_and_deviation(at[size])))
        lines.append(f"| {arm} | {len(at[sizes[0]])} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def picture(path: Path, networks: dict[str, nn.Module], make: Make, sizes: list[int]) -> None:
    """Writes a PNG file: one row for each size; in columns the first channel of the input, the
    truth and each arm's answer, as probabilities. All are enlarged or reduced to 256 pixels."""
    rows = []
    for size in sizes:
        x, y, _ = make(1, size, 4_000_000 + size)
        first = x[:, :1] - x[:, :1].amin()
        maps = [
            first / first.amax(),
            y,
            *(torch.sigmoid(network(x)) for network in networks.values()),
        ]
        maps = [F.interpolate(m.clamp(0, 1), (256, 256)) for m in maps]
        rows.append(torch.cat([F.pad(m[0, 0], (2, 2, 2, 2), value=0.5) for m in maps], dim=1))
    pixels = (torch.cat(rows) * 255).round().to(torch.uint8).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
