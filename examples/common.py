"""What the examples share: training and scoring of an arm, the table and the picture.

The protocol is in docs/beyond-vaes.md. A task is a function `make(count, size, seed)` that returns
inputs [N, C, size, size], truths and weights [N, 1, size, size], all float32.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

Make = Callable[[int, int, int], tuple[Tensor, Tensor, Tensor]]


def train(
    build: Callable[[], nn.Module],
    pictures: tuple[Tensor, Tensor, Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    seconds: float | None = None,
    batch_size: int = 16,
) -> tuple[nn.Module, int]:
    """Trains a network with AdamW, a warm-up of 50 steps and a cosine decay.

    Arguments:
        pictures: Inputs, truths and weights to train on.
        seconds: If given, training ends after so many seconds of processor time instead of after
            `steps`. They are counted around the training steps alone.

    Returns:
        The network, in evaluation mode, and the number of steps that it was trained for.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = build().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    order, used, step = torch.empty(0, dtype=torch.long), 0.0, 0
    while (done := used / seconds if seconds else step / steps) < 1:
        started = time.process_time()
        if len(order) < batch_size:
            order = torch.randperm(len(pictures[0]), generator=generator)
        batch, order = order[:batch_size], order[batch_size:]
        x, y, weight = (part[batch] for part in pictures)
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * done)
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * cosine
        errors = F.binary_cross_entropy_with_logits(network(x), y, reduction="none")
        optimizer.zero_grad()
        ((errors * weight).sum() / weight.sum()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        used += time.process_time() - started
    return network.eval(), step


@torch.no_grad()
def intersection_over_union(network: nn.Module, pictures: tuple[Tensor, Tensor, Tensor]) -> float:
    """The mean over pictures of the intersection over union, where weights are positive. A picture
    in which there is nothing to find and nothing was found counts as 1."""
    scores = []
    for x, y, weight in zip(*pictures, strict=True):
        found, there, counts = network(x[None])[0] > 0, y > 0.5, weight > 0
        union = ((found | there) & counts).sum().item()
        scores.append((found & there & counts).sum().item() / union if union else 1.0)
    return sum(scores) / len(scores)


def table(scores: dict[str, dict[int, list[float]]]) -> str:
    """A Markdown table, one row for each arm: mean ± standard deviation over seeds at each size."""
    sizes = list(next(iter(scores.values())))
    lines = [f"| arm | seeds | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 2) + "|"]
    for arm, at in scores.items():
        cells = []
        for size in sizes:
            values = torch.tensor(at[size], dtype=torch.float64)
            deviation = f" ± {values.std():.4f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.4f}{deviation}")
        lines.append(f"| {arm} | {len(at[sizes[0]])} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def picture(path: Path, networks: dict[str, nn.Module], make: Make, sizes: list[int]) -> None:
    """Writes a PNG file: one row for each size; in columns the input, the truth and each arm's
    answer, as probabilities. All are enlarged or reduced to 256 pixels."""
    rows = []
    for size in sizes:
        x, y, _ = make(1, size, 4_000_000 + size)
        maps = [x[:, :1], y, *(torch.sigmoid(network(x)) for network in networks.values())]
        maps = [F.interpolate(m.clamp(0, 1), (256, 256)) for m in maps]
        rows.append(torch.cat([F.pad(m[0, 0], (2, 2, 2, 2), value=0.5) for m in maps], dim=1))
    pixels = (torch.cat(rows) * 255).round().to(torch.uint8).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
