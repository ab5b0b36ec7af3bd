"""Which recipe fits into how much memory? Computed, without a GPU and without allocating anything.

    python -m benchmarks.recipe_memory --output benchmarks/results/recipe_memory.json

The models of train_cifar.sh, train_imagenet.sh and train_celeb.sh make one training step on tensors that have a shape
but no content (torch's FakeTensorMode), in mixed precision, with one and with two images; torch's MemTracker adds up
what is alive at the same time. From these two peaks: bytes of each image, and bytes that do not depend on the batch, to
which Adamax's two moments and the average of the weights are added. `--backend triton` counts what the kernels for GPUs
keep between the passes, `torch` the gates as well; `checkpointed` is --checkpoint_activations. Not counted: with
several GPUs, one more copy of the gradients (as large as the weights) in DDP's buckets; CUDA's context, the allocator's
waste, workspaces of cuDNN, and what a sweep needs for itself while it runs (at most 0.3 GB at the recipes' features),
for which `ALLOWANCE` is left.

First the same computation for a small model is compared with what torch's profiler sees allocated in a real step on the
CPU; a difference of more than 10 % ends the program with status 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: shapes of backend triton on a CPU

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

import train
from benchmarks import common
from data.get_dataset import DATASETS
from lib.config import TrainConfig
from lib.DensityVAE import DensityVAE
from lib.models import build_model
from lib.training import objective

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
        model, tracker = make(config), MemTracker()
        tracker.track_external(model)
        with tracker:
            one_step(model, batch, autocast)
        peaks = tracker.get_tracker_snapshot("peak")
        return sum(part["Total"] for device, part in peaks.items() if device.type == "cpu")


def allocated_peak(config: TrainConfig, batch: int) -> float:
    """The same as torch's allocator for the CPU sees it in a real step."""
    model = make(config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_step(model, batch, nullcontext())
    now = highest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return weights + highest


def verify() -> dict:
    """Computed and allocated peak of a small model; SystemExit if they differ."""
    config = train.parse(SMALL.split())
    computed, allocated = computed_peak(config, 4, nullcontext()), allocated_peak(config, 4)
    if not abs(computed / allocated - 1) <= TOLERANCE:
        sys.exit(f"nothing is computed: a small model needs {allocated:.3g} bytes, computed are {computed:.3g}")
    return {"flags": SMALL, "batch": 4, "computed_mib": computed / 2**20, "allocated_mib": allocated / 2**20}


def row_of(script: str, backend: str, checkpointed: bool) -> dict:
    """What a recipe needs, in GB (10^9 bytes), and the batch that fits into each card."""
    config = recipe(script, "--gpus", "0", "--backend", backend, *["--checkpoint_activations"] * checkpointed)
    mixed = [torch.autocast("cpu", torch.bfloat16) for _ in range(2)]
    one, two = (computed_peak(config, batch, mixed[batch - 1]) for batch in (1, 2))
    with torch.device("meta"):
        weights = sum(p.nbytes for p in build_model(config, DATASETS[config.dataset].shape[1:]).parameters())
    image, fixed = two - one, 2 * one - two + 3 * weights  # two moments and the average
    row = {"recipe": script, "backend": backend, "checkpointed": checkpointed, "weights_gb": weights / 1e9}
    row |= {"fixed_gb": fixed / 1e9, "image_gb": image / 1e9, "batch": config.batch}
    row["total_gb"] = (fixed + config.batch * image + ALLOWANCE) / 1e9
    fits = {f"batch_in_{card}_gb": max(0, int((card * 1e9 - fixed - ALLOWANCE) / image)) for card in CARDS}
    return row | fits


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--backends", nargs="+", choices=("triton", "torch"), default=["triton"])
    parser.add_argument("--quick", action="store_true", help="only the comparison with a real step")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    result = common.stamp("recipe_memory", arguments, "cpu") | {"verified": verify(), "allowance_gb": ALLOWANCE / 1e9}
    print(f"a small model: {result['verified']}")
    choices = [(r, b, c) for r in options.recipes for b in options.backends for c in (False, True)]
    result["rows"] = []
    for choice in [] if options.quick else choices:
        result["rows"].append(row_of(*choice))
        common.write(result, options.output)  # each takes minutes
        print(f"{' '.join(map(str, choice))}: done")
    if result["rows"]:
        numbers = {
            name: "" if isinstance(value, str | bool | int) else ".3g" for name, value in result["rows"][0].items()
        }
        print(common.table(result["rows"], numbers))
    common.write(result, options.output)


if __name__ == "__main__":
    main()
