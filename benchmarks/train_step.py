"""How long does a training step take, and how much memory? And does the model learn?

    python -m benchmarks.train_step --device cuda --precision bfloat16 --output train_step.json

A step is forward pass, loss, backward pass and Adamax, on random images; models have the
architecture of the authors' CIFAR10 recipe (batch 32), or that of `--model`; `shapes3d` is the
β-VAE of the disentanglement experiments. Contenders: `auto` and `torch` (backends of
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

import torch
from torch import Tensor

from benchmarks import common, evaluation
from benchmarks.evaluation import CNN
from benchmarks.layer import YardstickSDNLayer
from lib.DensityVAE import DensityVAE
from lib.DisentanglementVAE import DisentanglementVAE
from lib.models import VAE
from lib.nn import SDNLayer
from lib.utils import keyed_noise, nats_to_bits_per_dim

MODELS = evaluation.MODELS | {"shapes3d": dict(sdn_nfeat=200)}
CONTENDERS = ("auto", "torch", "compiled", "replayed", "checkpointed", "yardstick", "cnn")
SMALL = dict(
    h_size=8, z_size=2, depth=2, ds_list=[1], mix_components=2,
    sdn_max_scale=8, sdn_nfeat_0=6, sdn_num_dirs=2,
)  # fmt: skip
SMALL_SHAPES3D = dict(z_size=2, sdn_nfeat=6)
SIZES = {"celeb": 256, "shapes3d": 64}  # of images, where it is not 32
TOLERANCE = 1e-4  # relative norm; rounding through a whole model


def build(name: str, size: int, architecture: dict) -> VAE:
    """The contender of that name, with the same weights as every other but `cnn`."""
    torch.manual_seed(0)
    kind, without_sdn = DensityVAE, CNN
    if "sdn_nfeat" in architecture:
        kind, without_sdn = DisentanglementVAE, {"sdn_nfeat": 0}
    arguments = architecture | (without_sdn if name == "cnn" else {})
    if name == "checkpointed":
        arguments["checkpoint_activations"] = True
    with_torch = ("torch", "replayed", "yardstick")
    backend = "torch" if name in with_torch else "reference" if name == "reference" else "auto"
    model = kind(size, backend=backend, **arguments)
    if name == "yardstick":
        for module in model.modules():
            if type(module) is SDNLayer:
                module.__class__ = YardstickSDNLayer
    if name == "compiled":
        model.compile(fullgraph=True)
    if name == "replayed":
        model.compile(fullgraph=True, backend="cudagraphs", dynamic=False)
    return model


def small(options: argparse.Namespace) -> tuple[int, dict]:
    """Size of the images, and arguments of a model that takes seconds."""
    return (64, SMALL_SHAPES3D) if options.model == "shapes3d" else (8, SMALL)


def loss_of(model: VAE, x: Tensor, noise: list[Tensor] | None = None) -> Tensor:
    """Nats per image."""
    output = model(x, noise)
    return output.distortion.mean() + output.rates.mean(0).sum()


@common.without_tf32()
def verify(names: list[str], options: argparse.Namespace) -> None:
    """Loss and gradients against the reference in float64; SystemExit if they differ."""
    size, architecture = small(options)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator)

    def loss_and_gradients(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        model = build(name, size, architecture).to(options.device, dtype)
        noise = keyed_noise(model.latent_shapes, 0, range(3))
        x = model.observation.encode(images.to(options.device)).to(dtype)
        loss = loss_of(model, x, [eps.to(x) for eps in noise])
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss} | gradients

    expected = loss_and_gradients("reference", torch.float64)
    for name in names:
        if name != "cnn":
            found = loss_and_gradients(name, torch.float32)
            common.require_close(name, found, expected, TOLERANCE)


class Training:
    """A model, its optimizer and one batch of images; a call is one training step and returns the
    loss."""

    def __init__(self, model: VAE, images: Tensor, options):
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
    model = SIZES.get(options.model, 32), MODELS[options.model]
    size, architecture = small(options) if options.quick else model
    torch._dynamo.reset()  # or the sizes above would make compiled code general, and slower
    images = torch.randint(0, 256, (options.batch, 3, size, size), dtype=torch.uint8)
    on_gpu = options.device.startswith("cuda")
    trainings: dict[str, Callable] = {}
    rows = {}
    for name in names:
        others = torch.cuda.memory_allocated(options.device) if on_gpu else 0
        trainings[name] = Training(build(name, size, architecture), images, options)
        first = common.seconds(trainings[name], options.device)
        peak = None
        if on_gpu:  # weights and optimizer, and what the step takes beyond them
            held = torch.cuda.memory_allocated(options.device) - others
            peak = held / 2**20 + common.peak_memory(trainings[name], options.device)
        rows[name] = {"contender": name, "first_step_s": first, "peak_mib": peak}
    times = common.take_turns(trainings, options.rounds, options.device)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, row in rows.items():
        row |= {"step_ms": 1e3 * medians[name], "images_per_s": options.batch / medians[name]}
        yardstick, cnn = medians.get("yardstick"), medians.get("cnn")
        row["times_faster_than_yardstick"] = yardstick and yardstick / medians[name]
        row["over_cnn"] = cnn and medians[name] / cnn
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


def main(arguments: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__, device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--model", choices=list(MODELS), default="cifar")
    parser.add_argument("--batch", type=common.positive, default=32)
    parser.add_argument("--rounds", type=common.positive, default=5)
    parser.add_argument(
        "--steps", type=int, default=0, help="of the training run after the measurements; 0: none"
    )
    parser.add_argument("--precision", default="float32", choices=list(common.PRECISIONS))
    parser.add_argument(
        "--quick", action="store_true", help="a small model, 8x8 images, batch 4, 2 rounds"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.rounds = 4, 2
    if options.steps < 0:
        parser.error("--steps must be at least 0")
    if options.model == "shapes3d" and "checkpointed" in options.contenders:
        parser.error("--model shapes3d has no ladder: name --contenders without checkpointed")
    verify(options.contenders, options)
    result = common.stamp("benchmarks.train_step", arguments, options.device, ("triton",))
    result |= {"precision": options.precision, "batch": options.batch, "quick": options.quick}
    result["rows"] = measure(options.contenders, options)
    result["training"] = learn(options.contenders[0], options) if options.steps else None
    common.write(result, options.output)
    columns = {"contender": "", "first_step_s": ".2f", "step_ms": ".1f", "images_per_s": ".1f"}
    columns |= {"over_cnn": ".2f", "times_faster_than_yardstick": ".2f", "peak_mib": ".0f"}
    print(common.table(result["rows"], columns))
    if options.steps:
        run = result["training"]
        before, after = run["bits_per_dim"]
        print(
            f"{run['steps']} steps in {run['seconds']:.1f} s: {before:.3f} -> {after:.3f} bits/dim"
        )


if __name__ == "__main__":
    main()
