"""How long does a training step take, and how much memory? And does the model learn?

    python -m benchmarks.train_step --device cuda --precision bfloat16 --output train_step.json

A step is forward pass, loss, backward pass and Adamax, on random images; models have the
architecture of the authors' CIFAR10 recipe (batch 32). Contenders: `auto` and `torch` (backends of
the sweeps), `compiled` (`auto`, as one graph of torch.compile), `replayed` (`torch`, both passes
replayed as CUDA graphs), `checkpointed` (`auto`, activations of each ladder layer computed anew in
the backward pass), `yardstick` (a torch.nn.GRUCell call for each line, see `benchmarks.layer`)
and `cnn` (the baseline without SDN). First the losses and gradients of all but `cnn`, on a small
model in float32, are compared with the reference in float64; one that differs ends the program with
status 1. Times are medians over rounds in which contenders take turns.

The column of peak memory, on a GPU that of the allocator in one step, weights and optimizer
included, says what a recipe needs: `--model celeb --batch 4`.

With `--steps N` the first contender is then trained for N steps on images of coloured gradients;
the program ends with status 1 if a loss is not finite or does not fall. It needs torch and numpy
only.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.evaluation import CNN, MODELS
from benchmarks.layer import YardstickSDNLayer
from lib.DensityVAE import DensityVAE
from lib.nn import SDNLayer
from lib.utils import keyed_noise, nats_to_bits_per_dim

SIZES = {"celeb": 256}  # of images, where it is not 32
CONTENDERS = ("auto", "torch", "compiled", "replayed", "checkpointed", "yardstick", "cnn")
SMALL = dict(
    h_size=8,
    z_size=2,
    depth=2,
    ds_list=[1],
    mix_components=2,
    sdn_max_scale=8,
    sdn_nfeat_0=6,
    sdn_num_dirs=2,
)
TOLERANCE = 1e-4  # relative norm; rounding through a whole model


def build(name: str, size: int, architecture: dict) -> DensityVAE:
    """The contender of that name, with the same weights as every other but `cnn`."""
    torch.manual_seed(0)
    backend = (
        "torch"
        if name in ("torch", "replayed", "yardstick")
        else "reference"
        if name == "reference"
        else "auto"
    )
    changes = (
        CNN
        if name == "cnn"
        else dict(backend=backend, checkpoint_activations=name == "checkpointed")
    )
    model = DensityVAE(size, **(architecture | changes))
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
def verify(names: list[str], options) -> None:
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
    torch._dynamo.reset()  # or the sizes above would make compiled code general, and slower
    size = 8 if options.quick else SIZES.get(options.model, 32)
    images = torch.randint(0, 256, (options.batch, 3, size, size), dtype=torch.uint8)
    trainings: dict[str, Callable] = {}
    rows = {}
    for name in names:
        others = allocated(options.device)
        trainings[name] = Training(build(name, size, architecture), images, options)
        first = common.seconds(trainings[name], options.device)
        peak = peak_of_step(trainings[name], others, options.device)
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


def allocated(device: str) -> int:
    """Bytes of tensors that are there, on a GPU."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0


def peak_of_step(training: Training, others: int, device: str) -> float | None:
    """MiB that a step takes at most, weights and optimizer included and `others` bytes not; None on
    a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    training()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - others) / 2**20


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--model", choices=list(MODELS), default="cifar")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=0, help="of the training run after the measurements; 0: none"
    )
    parser.add_argument("--precision", default="float32", choices=list(common.PRECISIONS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, 8x8 images, batch 4, 2 rounds"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.rounds = 4, 2
    if min(options.batch, options.rounds) < 1 or options.steps < 0:
        parser.error("--batch and --rounds must be at least 1, --steps at least 0")
    verify(options.contenders, options)
    result = common.stamp("train_step", arguments, options.device, ("triton",))
    result |= {"precision": options.precision, "batch": options.batch, "quick": options.quick}
    result["rows"] = measure(options.contenders, options)
    result["training"] = learn(options.contenders[0], options) if options.steps else None
    common.write(result, options.output)
    columns = {
        "contender": "",
        "first_step_s": ".2f",
        "step_ms": ".1f",
        "images_per_s": ".1f",
        "over_cnn": ".2f",
    }
    print(
        common.table(
            result["rows"], columns | {"times_faster_than_yardstick": ".2f", "peak_mib": ".0f"}
        )
    )
    if options.steps:
        run = result["training"]
        before, after = run["bits_per_dim"]
        print(
            f"{run['steps']} steps in {run['seconds']:.1f} s: {before:.3f} -> {after:.3f} bits/dim"
        )


if __name__ == "__main__":
    main()
