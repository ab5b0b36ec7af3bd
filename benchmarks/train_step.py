"""How long does a training step take, how much memory does it need, and does the model learn?

    python -m benchmarks.train_step --device cuda --precision bfloat16
    python -m benchmarks.train_step --question memory

**time**: a step is forward pass, loss, backward pass and Adamax, on random images; models have the
architecture of the authors' CIFAR10 recipe. Contenders: `auto` and `torch` (backends of the
sweeps), `compiled` (`auto`, as one graph of torch.compile), `replayed` (`torch`, both passes
replayed as CUDA graphs), `checkpointed` (`auto`, activations of each ladder layer computed anew in
the backward pass), `yardstick` (a GRUCell call for each line, see `benchmarks.layer`) and `cnn`
(the baseline without SDN). First the losses and gradients of all but `cnn`, on a small model in
float32, are compared with the reference in float64. Times are medians over rounds in which the
contenders take turns. With `--steps N` the first contender is then trained for N steps on images of
coloured gradients; its loss must be finite and fall.

**memory**: which recipe fits into how much memory, computed without a GPU and without allocating
anything. The models of the recipes make one training step in mixed precision on tensors that have a
shape but no content; `Live` adds up what is alive at the same time. To its peak Adamax's two
moments and the average of the weights are added. Peaks are computed for one image, the recipe's
batch B and 4 B. `gb` is what the recipe's batch needs, `image_gb` what another image adds (between
B and 4 B), `in_16_gb` the largest batch on such a card, by straight lines between the three peaks,
the second of which is extended. (A peak is the largest of several sums that grow evenly with the
batch, so a line between two peaks lies above it.) The backend `lines` stands for the kernels of
GPUs where memory is short, which keep nothing between the passes; `torch` keeps the gates. Not
counted: with several GPUs, one more copy of the gradients in DDP's buckets; CUDA's context, the
allocator's waste, workspaces of cuDNN, and what a sweep needs for itself while it runs (at most 0.3
GB at the recipes' features), for which `ALLOWANCE` is left and included. Before all that the
computation for a small model, and with `--real_steps BATCH` for the recipes, is compared with what
torch's profiler sees allocated in a real step on the CPU.

What differs from what it is compared with, or does not learn, ends the program with status 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from benchmarks import common
from benchmarks.evaluation import CNN, MODELS
from benchmarks.layer import YardstickSDNLayer
from data.get_dataset import DATASETS
from lib.config import TrainConfig
from lib.DensityVAE import DensityVAE
from lib.models import build_model
from lib.nn import SDNLayer
from lib.sweeps import operator
from lib.utils import keyed_noise, nats_to_bits_per_dim

CONTENDERS = ("auto", "torch", "compiled", "replayed", "checkpointed", "yardstick", "cnn")
SMALL = dict(
    h_size=8, z_size=2, depth=2, ds_list=[1], mix_components=2,
    sdn_max_scale=8, sdn_nfeat_0=6, sdn_num_dirs=2,
)  # fmt: skip
TOLERANCE = 1e-4  # relative norm; rounding through a whole model
REPOSITORY = Path(__file__).parent.parent
RECIPES = ("train_cifar.sh", "train_imagenet.sh", "train_celeb.sh")
CARDS = (16, 24, 32, 40, 80)  # GB
ALLOWANCE = 1.5e9  # bytes
SMALL_RUN = (
    "--dataset CIFAR10 --depth 2 --ds_list 1 --h_size 40 --sdn_nfeat_0 40 --sdn_num_dirs 2 "
    "--backend torch"
)
MEMORY_TOLERANCE = 0.1


def build(name: str, size: int, architecture: dict) -> DensityVAE:
    """The contender of that name, with the same weights as every other but `cnn`."""
    torch.manual_seed(0)
    backends = dict.fromkeys(("torch", "replayed", "yardstick"), "torch")
    backend = (backends | {"reference": "reference"}).get(name, "auto")
    changes = dict(backend=backend, checkpoint_activations=name == "checkpointed")
    model = DensityVAE(size, **architecture | (CNN if name == "cnn" else changes))
    if name == "yardstick":
        for module in model.modules():
            if type(module) is SDNLayer:
                module.__class__ = YardstickSDNLayer
    if name == "compiled":
        model.compile(fullgraph=True)
    if name == "replayed":
        model.compile(fullgraph=True, backend="cudagraphs", dynamic=False)
    return model


def loss_of(model: DensityVAE, x: Tensor, noise: list[Tensor] | None = None) -> Tensor:
    """Nats per image."""
    output = model(x, noise)
    return output.distortion.mean() + output.rates.mean(0).sum()


@common.without_tf32()
def verify_step(names: list[str], options) -> None:
    """Loss and gradients against the reference in float64; SystemExit if they differ."""
    results = {}
    for name in ["reference", *names]:
        if name == "cnn":
            continue
        model = build(name, 8, SMALL).to(options.device)
        if name == "reference":
            model.double()
        images = torch.randint(
            0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        x = model.observation.encode(images).to(model.device, model.dtype)
        noise = [
            eps.to(model.device, model.dtype)
            for eps in keyed_noise(model.latent_shapes, 0, range(3))
        ]
        loss = loss_of(model, x, noise)
        loss.backward()
        results[name] = {"loss": loss} | {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }
        for key, expected in results["reference"].items():
            error = common.relative_error(results[name][key], expected)
            if not error <= TOLERANCE:
                sys.exit(f"{name} is not timed: {key} differs from the reference by {error:.1e}")


class Training:
    """A model, its optimizer and one batch of images; a call is one training step and returns the
    loss."""

    def __init__(self, model: DensityVAE, images: Tensor, options):
        self.model, self.options = model.to(options.device), options
        self.x = model.observation.encode(images.to(options.device))
        self.optimizer = torch.optim.Adamax(
            [p for p in model.parameters() if p.requires_grad], lr=0.002
        )
        self.scaler = torch.amp.GradScaler(
            self.x.device.type, enabled=options.precision == "float16"
        )

    def __call__(self) -> Tensor:
        dtype = common.PRECISIONS[self.options.precision]
        with torch.autocast(self.x.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(self.model, self.x)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def measure(names: list[str], options) -> list[dict]:
    """A row for each contender: how long until the first step is done, the median of the steps
    after it, memory."""
    architecture = SMALL if options.quick else MODELS[options.model]
    torch._dynamo.reset()  # or the batches above would make compiled code general, and slower
    size = 8 if options.quick else 32
    images = torch.randint(0, 256, (options.batch, 3, size, size), dtype=torch.uint8)
    trainings: dict[str, Callable] = {}
    rows = {}
    for name in names:
        trainings[name] = Training(build(name, size, architecture), images, options)
        first = common.seconds(trainings[name], options.device)
        peak = (
            common.peak_memory(trainings[name], options.device)
            if options.device.startswith("cuda")
            else None
        )
        rows[name] = {"contender": name, "first_step_s": first, "peak_mib": peak}
    times = common.take_turns(trainings, options.rounds, options.device)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, row in rows.items():
        row |= {"step_ms": 1e3 * medians[name], "images_per_s": options.batch / medians[name]}
        row["times_faster_than_yardstick"] = (
            medians["yardstick"] / medians[name] if "yardstick" in medians else None
        )
        row["over_cnn"] = medians[name] / medians["cnn"] if "cnn" in medians else None
    return list(rows.values())


def learn(name: str, options) -> dict:
    """Loss in bits/dim in the first and last tenth of a short training run; SystemExit if it does
    not learn."""
    size = 8 if options.quick else 32
    model = build(name, size, SMALL if options.quick else MODELS["quickstart"])
    corners = torch.rand(options.batch, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    gradients = torch.nn.functional.interpolate(
        corners, size=(size, size), mode="bilinear", align_corners=True
    )
    training = Training(model, (gradients * 255).to(torch.uint8), options)
    start = time.perf_counter()
    losses = torch.stack([training() for _ in range(options.steps)])
    losses = nats_to_bits_per_dim(losses, model.image_shape).tolist()
    tenth = max(1, len(losses) // 10)
    before, after = (statistics.mean(part) for part in (losses[:tenth], losses[-tenth:]))
    if not (math.isfinite(sum(losses)) and after < before):
        sys.exit(f"{name} does not learn: {before:.3f} bits/dim at first, {after:.3f} at last")
    taken = time.perf_counter() - start
    return {
        "contender": name,
        "steps": len(losses),
        "seconds": taken,
        "bits_per_dim": [before, after],
    }


def recipe(script: str, *more: str) -> TrainConfig:
    """The configuration that a recipe gives to train.py."""
    command = ["bash", str(REPOSITORY / script), *more, "--gpus", "0", "--backend", "torch"]
    shown = subprocess.run(
        command, env=os.environ | {"SDN_PYTHON": "echo"}, capture_output=True, text=True, check=True
    ).stdout
    return train.parse(shown.split()[1:])


class Live(TorchDispatchMode):
    """Bytes of the storages alive: those of the tensors it is given, and all that operators return;
    `peak` is the most.

    The sizes are those asked for, without the allocator's rounding. torch's MemTracker does the
    same in five times the time: it keeps a sum for each module.
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
    return model.requires_grad_(True)  # whatever the configuration leaves as it was drawn


def one_pass(model: DensityVAE, batch: int, autocast: AbstractContextManager) -> None:
    """Forward and backward pass."""
    x = torch.zeros(batch, *model.image_shape)
    with autocast:
        loss = loss_of(model, x)
    loss.backward()


def computed_peak(config: TrainConfig, batch: int, autocast: AbstractContextManager) -> float:
    """Most bytes alive at a time in a training step, weights and gradients included."""
    with FakeTensorMode():
        model = make(config)
        with Live(model.state_dict().values()) as live:
            one_pass(model, batch, autocast)
        return live.peak


def allocated_peak(config: TrainConfig, batch: int) -> float:
    """The same as torch's allocator for the CPU sees it in a real step."""
    model = make(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_pass(model, batch, nullcontext())
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + max(itertools.accumulate(changes))


def verify_memory(config: TrainConfig, batch: int, what: str) -> dict:
    """Computed and allocated peak of a step in float32, printed; SystemExit if they differ."""
    computed, allocated = computed_peak(config, batch, nullcontext()), allocated_peak(config, batch)
    what = f"{what}, batch {batch}: computed {computed / 2**20:.2f} MiB"
    print(f"{what}, allocated {allocated / 2**20:.2f} MiB")
    if not abs(computed / allocated - 1) <= MEMORY_TOLERANCE:
        sys.exit(f"nothing is computed: {what}, but {allocated / 2**20:.2f} MiB are allocated")
    return {"computed_mib": computed / 2**20, "allocated_mib": allocated / 2**20}


def memory_of(script: str, backend: str, checkpointed: bool) -> dict:
    """What a recipe needs, in GB (10^9 bytes), and the batch that fits into each card."""
    config = recipe(script, *["--checkpoint_activations"] * checkpointed)
    with torch.device("meta"):
        weights = sum(parameter.nbytes for parameter in make(config).parameters())

    def needed(batch: int) -> float:
        autocast = torch.autocast("cpu", torch.bfloat16)
        return computed_peak(config, batch, autocast) + 3 * weights + ALLOWANCE

    nothing = mock.patch.object(operator, "_kept", lambda lines, dtype, *_: ((0,), dtype))
    batches = [1, config.batch, 4 * config.batch]
    with nothing if backend == "lines" else nullcontext():
        sizes = [needed(batch) for batch in batches]
    image = (sizes[2] - sizes[1]) / (3 * config.batch)
    row = {"recipe": script, "backend": backend, "checkpointed": checkpointed}
    row |= {"weights_gb": weights / 1e9, "batch": config.batch, "gb": sizes[1] / 1e9}
    batches.append(1000 * config.batch)
    sizes.append(sizes[2] + (batches[3] - batches[2]) * image)
    fits = {f"in_{card}_gb": np.interp(1e9 * card, sizes, batches, left=0) for card in CARDS}
    return row | {"image_gb": image / 1e9} | {name: int(batch) for name, batch in fits.items()}


def time_question(options: argparse.Namespace, result: dict) -> None:
    if options.quick:
        options.batch, options.rounds = 4, 2
    verify_step(options.contenders, options)
    result |= {"precision": options.precision, "batch": options.batch, "quick": options.quick}
    result["rows"] = measure(options.contenders, options)
    result["training"] = learn(options.contenders[0], options) if options.steps else None
    columns = {"contender": "", "first_step_s": ".2f", "step_ms": ".1f", "images_per_s": ".1f"}
    columns |= {"over_cnn": ".2f", "times_faster_than_yardstick": ".2f", "peak_mib": ".0f"}
    print(common.table(result["rows"], columns))
    if run := result["training"]:
        before, after = run["bits_per_dim"]
        losses = f"{before:.3f} -> {after:.3f} bits/dim"
        print(f"{run['steps']} steps in {run['seconds']:.1f} s: {losses}")


def memory_question(options: argparse.Namespace, result: dict) -> None:
    result |= {"allowance_gb": ALLOWANCE / 1e9, "verified": [], "rows": []}
    checked = [(train.parse(SMALL_RUN.split()), 4, SMALL_RUN)]
    choices = list(itertools.product(options.recipes, options.backends, (False, True)))
    for script in options.recipes if options.real_steps else ():
        for flags in ([], ["--checkpoint_activations"]):
            checked.append((recipe(script, *flags), options.real_steps, " ".join([script, *flags])))
    for config, batch, what in checked:
        found = verify_memory(config, batch, what)
        result["verified"].append({"of": what, "batch": batch} | found)
    for choice in [] if options.quick else choices:
        result["rows"].append(row := memory_of(*choice))
        common.write(result, options.output)  # each takes minutes
        numbers = {name: ".3g" if isinstance(value, float) else "" for name, value in row.items()}
        print(common.table([row], numbers), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--question", choices=("time", "memory"), default="time")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--model", choices=list(MODELS), default="cifar")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=0, help="of the training run after the measurements; 0: none"
    )
    parser.add_argument("--precision", default="float32", choices=list(common.PRECISIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    memory.add_argument("--backends", nargs="+", choices=("lines", "torch"), default=["lines"])
    memory.add_argument(
        "--real_steps", type=int, default=0, help="compare with steps of recipes of that batch, too"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model, batch 4, 2 rounds; no recipes"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if min(options.batch, options.rounds) < 1 or options.steps < 0:
        parser.error("--batch and --rounds must be at least 1, --steps at least 0")
    if options.question == "memory":
        options.device = "cpu"
    result = common.stamp("train_step", arguments, options.device, ("triton",))
    (memory_question if options.question == "memory" else time_question)(options, result)
    common.write(result, options.output)


if __name__ == "__main__":
    main()
