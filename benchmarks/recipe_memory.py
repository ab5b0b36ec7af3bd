"""Which recipe fits into how much memory? Computed, without a GPU and without allocating anything.

    python -m benchmarks.recipe_memory --output benchmarks/results/recipe_memory.json

The models of train_cifar.sh, train_imagenet.sh and train_celeb.sh make one training step on tensors
that have a shape but no content (torch's FakeTensorMode), in mixed precision; `Live` adds up what
is alive at the same time (torch's
MemTracker does, too, in five times the time: it keeps a sum for each module). To its peak Adamax's
two moments and the average of the weights are added. Peaks are computed for one image, the recipe's
batch B and 4 B. `gb` is what the recipe's batch needs, `image_gb` what another image adds (between
B and 4 B), `in_16_gb` the largest batch on such a card, by straight lines between the three peaks,
the second of which is extended. (A peak is the largest of several sums that grow evenly with the
batch, so a line between two peaks lies above it.) `--backends triton` counts what the kernels for
GPUs keep between the passes, `torch` the gates as well; `checkpointed` is --checkpoint_activations.
Not counted: with several GPUs, one more copy of the gradients (as large as the weights) in DDP's
buckets; CUDA's context, the allocator's waste, workspaces of cuDNN, and what a sweep needs for
itself while it runs (at most 0.3 GB at the recipes' features), for which `ALLOWANCE` is left and
included.

First the same computation for a small model is compared with what torch's profiler sees allocated
in a real step on the CPU; a difference of more than 10 % ends the program with status 1.
`--real_steps BATCH` does so for the recipes, too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

os.environ["TRITON_INTERPRET"] = (
    "1"  # before the kernels are imported: shapes of backend triton on a CPU
)

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from benchmarks import common
from data.get_dataset import DATASETS
from lib.config import TrainConfig
from lib.DensityVAE import DensityVAE
from lib.models import build_model
from lib.training.base import objective

REPOSITORY = Path(__file__).parent.parent
RECIPES = ("train_cifar.sh", "train_imagenet.sh", "train_celeb.sh")
CARDS = (16, 24, 32, 40, 80)  # GB
ALLOWANCE = 1.5e9  # bytes
SMALL = "--dataset CIFAR10 --depth 2 --ds_list 1 --h_size 40 --sdn_nfeat_0 40 --sdn_num_dirs 2 --backend torch"
TOLERANCE = 0.1


def recipe(script: str, *more: str) -> TrainConfig:
    """The configuration that a script gives to train.py."""
    environment = os.environ | {"SDN_PYTHON": "echo"}
    command = ["bash", str(REPOSITORY / script), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return train.parse(done.stdout.split()[1:])


class Live(TorchDispatchMode):
    """Bytes of the storages alive: those of the tensors it is given, and all that operators return;
    `peak` is the most.

    The sizes are those asked for, without the allocator's rounding.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()
        self._add(tensors)

    def _add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()  # the same for all tensors that share it
            if key not in self.seen:
                self.seen.add(key)
                self.now += size
                weakref.finalize(storage, self._remove, key, size)
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        self.seen.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def make(config: TrainConfig) -> DensityVAE:
    model = build_model(config, DATASETS[config.dataset].shape[1:])
    return model.requires_grad_(True)  # the tracker expects it of all


def one_step(model: DensityVAE, batch: int, autocast: AbstractContextManager) -> None:
    """Forward and backward pass."""
    x = torch.zeros(batch, *model.image_shape)
    with autocast:
        loss = objective(model(x))
    loss.backward()


def computed_peak(config: TrainConfig, batch: int, autocast: AbstractContextManager) -> float:
    """Most bytes alive at a time in a training step, weights and gradients included."""
    with FakeTensorMode():
        model = make(config)
        with Live(model.state_dict().values()) as live:
            one_step(model, batch, autocast)
        return live.peak


def allocated_peak(config: TrainConfig, batch: int) -> float:
    """The same as torch's allocator for the CPU sees it in a real step."""
    model = make(config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_step(model, batch, nullcontext())
    return weights + most_allocated(profiler)


def most_allocated(profiler: profile) -> int:
    """Bytes, of what was allocated while the profiler ran."""
    now = highest = 0
    for event in sorted(
        profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()
    ):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def verify(config: TrainConfig, batch: int, what: str) -> dict:
    """Computed and allocated peak of a step in float32; SystemExit if they differ."""
    peaks = computed_peak(config, batch, nullcontext()), allocated_peak(config, batch)
    return {"of": what, "batch": batch} | compared(f"{what}, batch {batch}", *peaks)


def compared(what: str, computed: float, allocated: float) -> dict[str, float]:
    """Both in MiB, printed; SystemExit if they differ."""
    if not abs(computed / allocated - 1) <= TOLERANCE:
        sys.exit(
            f"nothing is computed: {what} needs {allocated:.3g} bytes, computed are {computed:.3g}"
        )
    row = {"computed_mib": computed / 2**20, "allocated_mib": allocated / 2**20}
    print(
        f"{what}: computed {row['computed_mib']:.2f} MiB, allocated {row['allocated_mib']:.2f} MiB"
    )
    return row


def row_of(script: str, backend: str, checkpointed: bool) -> dict:
    """What a recipe needs, in GB (10^9 bytes), and the batch that fits into each card."""
    config = recipe(
        script, "--gpus", "0", "--backend", backend, *["--checkpoint_activations"] * checkpointed
    )
    with torch.device("meta"):
        weights = sum(
            p.nbytes for p in build_model(config, DATASETS[config.dataset].shape[1:]).parameters()
        )

    def needed(batch: int) -> float:
        return (
            computed_peak(config, batch, torch.autocast("cpu", torch.bfloat16))
            + 3 * weights
            + ALLOWANCE
        )

    batches = [1, config.batch, 4 * config.batch]
    sizes = [needed(batch) for batch in batches]
    row = {
        "recipe": script,
        "backend": backend,
        "checkpointed": checkpointed,
        "weights_gb": weights / 1e9,
    }
    row |= {
        "batch": config.batch,
        "gb": sizes[1] / 1e9,
        "image_gb": (sizes[2] - sizes[1]) / (3e9 * config.batch),
    }
    far = 1000 * config.batch
    batches.append(far)
    sizes.append(sizes[2] + (far - 4 * config.batch) * 1e9 * row["image_gb"])
    return row | {
        f"in_{card}_gb": int(np.interp(1e9 * card, sizes, batches, left=0)) for card in CARDS
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--backends", nargs="+", choices=("triton", "torch"), default=["triton"])
    parser.add_argument(
        "--real_steps",
        type=int,
        default=0,
        help="also compare with real steps of recipes of that batch",
    )
    parser.add_argument("--quick", action="store_true", help="only the comparison with a real step")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    result = common.stamp("recipe_memory", arguments, "cpu") | {"allowance_gb": ALLOWANCE / 1e9}
    result["verified"] = [verify(train.parse(SMALL.split()), 4, SMALL)]
    for script, flags in itertools.product(options.recipes, ([], ["--checkpoint_activations"])):
        if options.real_steps:
            config = recipe(script, "--gpus", "0", "--backend", "torch", *flags)
            result["verified"].append(
                verify(config, options.real_steps, " ".join([script, *flags]))
            )
    choices = [(r, b, c) for r in options.recipes for b in options.backends for c in (False, True)]
    result["rows"] = []
    for choice in [] if options.quick else choices:
        result["rows"].append(row_of(*choice))
        common.write(result, options.output)  # each takes minutes
        print(f"{' '.join(map(str, choice))}: done")
    if result["rows"]:
        numbers = {
            name: "" if isinstance(value, str | bool | int) else ".3g"
            for name, value in result["rows"][0].items()
        }
        print(common.table(result["rows"], numbers))
    common.write(result, options.output)


if __name__ == "__main__":
    main()
