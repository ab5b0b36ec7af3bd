"""How fast are sampling, the likelihood and the search for nearest training images, and what do
they gain?

    python -m benchmarks.evaluation --output benchmarks/results/mine.json

- sampling: 64 images drawn at once against one at a time;
- likelihood: an importance sample of one image, with the bottom-up pass shared by all samples,
  against a full forward pass for every sample, in chunks of the same size, and against full passes
  of one sample at a time as in the authors' release;
- nearest training images: images/s for 64 queries, against products in float64 and plain
  differences.

Models have random weights and the architecture of the quickstart or of the authors' CIFAR10 recipe,
with SDN and, as the baseline IAF-VAE+, without. Everything that is timed is first compared: equal
images, equal likelihoods, equal neighbours; otherwise the program ends with status 1. Times are
medians over rounds in which the contenders take turns, after one round that is not counted.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import positive
from lib.DensityVAE import DensityVAE
from lib.evaluation.importance import ImportanceSampler
from lib.evaluation.nearest import nearest_images
from lib.synthesis import sample_images
from lib.utils import keyed_noise

MODELS = {
    "quickstart": dict(
        h_size=32, z_size=4, depth=4, ds_list=[0, 2], downsample_first=True, mix_components=3,
        sdn_max_scale=16, sdn_nfeat_0=32, sdn_nfeat_diff=128, sdn_num_dirs=2,
    ),
    "cifar": dict(
        h_size=200, z_size=4, depth=15, ds_list=[5, 10], mix_components=5,
        sdn_max_scale=32, sdn_nfeat_0=360, sdn_nfeat_diff=128, sdn_num_dirs=2,
    ),
    "imagenet": dict(
        h_size=200, z_size=4, depth=16, ds_list=[3, 7, 11], mix_components=10,
        sdn_max_scale=32, sdn_nfeat_0=424, sdn_nfeat_diff=0, sdn_num_dirs=3,
    ),
    "celeb": dict(
        h_size=200, z_size=8, depth=17, ds_list=[4, 7, 9, 11, 13, 15], mix_components=30, nbits=5,
        sdn_max_scale=64, sdn_nfeat_0=400, sdn_nfeat_diff=80, sdn_num_dirs=2,
    ),
}  # fmt: skip
CNN = dict(sdn_max_scale=0)  # the baseline IAF-VAE+
QUERIES = 64


def compare(
    question: str,
    contenders: dict[str, Callable[[], Tensor]],
    tolerance: float,
    unit: str,
    amount: int,
    options: argparse.Namespace,
) -> list[dict]:
    """A row for each contender, with the medians of their seconds; SystemExit if a result differs
    from that of the first, the baseline."""
    baseline, *_ = contenders
    results = {name: run().double() for name, run in contenders.items()}
    for name, found in results.items():
        difference = (found - results[baseline]).abs().max().item()
        if not difference <= tolerance:
            sys.exit(f"{name} is not timed: it differs from {baseline} by {difference:.1e}")
    times = common.take_turns(contenders, options.rounds, options.device)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        {
            "question": question,
            "contender": name,
            "seconds": taken,
            "unit": unit,
            "rate": amount / taken,
            "times_faster": seconds[baseline] / taken,
        }
        for name, taken in seconds.items()
    ]


def sampling(name: str, model: DensityVAE, options) -> list[dict]:
    count = options.count

    def draw(batch: int) -> Callable[[], Tensor]:
        return lambda: sample_images(model, count, 0.9, seed=0, batch=batch)

    contenders = {"one at a time": draw(1), f"{count} at once": draw(count)}
    tolerance = 1  # level: another batch size may round differently
    return compare(f"sampling, {name}", contenders, tolerance, "images/s", count, options)


def likelihood(name: str, model: DensityVAE, options) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, model.image_shape, dtype=torch.uint8, generator=generator)
    samples, chunk = options.samples, options.chunk

    def shared() -> Tensor:
        sampler = ImportanceSampler(model, [image], samples=samples, seed=0, chunk=chunk)
        return torch.tensor([sampler(0)], dtype=torch.float64)

    @torch.no_grad()
    def full(rows_at_once: int) -> Tensor:
        x = model.observation.encode(image.unsqueeze(0).to(model.device))
        weights = []
        for start in range(0, samples, rows_at_once):
            numbers = range(start, min(start + rows_at_once, samples))
            noise = keyed_noise(model.latent_shapes, 0, [0] * len(numbers), numbers)
            output = model(
                x.expand(len(numbers), -1, -1, -1),
                [eps.to(model.device, model.dtype) for eps in noise],
            )
            weights.append(output.elbo.double())
        return torch.logsumexp(torch.cat(weights), 0, keepdim=True).cpu() - math.log(samples)

    contenders = {
        "full passes, one at a time": lambda: full(1),
        f"full passes, {chunk} at once": lambda: full(chunk),
        f"shared bottom-up pass, {chunk} at once": shared,
    }
    tolerance = 1e-5 * math.prod(model.image_shape)  # nats
    question = f"likelihood, {name}"
    return compare(question, contenders, tolerance, "samples/s", samples, options)


def nearest(size: int, images: int, options) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    training, queries = (
        torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        for count in (images, QUERIES)
    )
    device, step = options.device, 256

    def ours() -> Tensor:
        batches = (
            (training[i : i + step], torch.arange(i, min(i + step, images)))
            for i in range(0, images, step)
        )
        return nearest_images(queries, batches, count=1, device=device).indices[:, 0]

    def products() -> Tensor:
        q = queries.to(device).flatten(1).double()
        best = []
        for part in training.split(step):
            x = part.to(device).flatten(1).double()
            best.append(x.square().sum(1) - 2 * q @ x.T)
        return torch.cat(best, dim=1).argmin(1).cpu()

    def differences() -> Tensor:
        x = training.to(device).int()
        return torch.stack(
            [(x - query).square().flatten(1).sum(1).argmin() for query in queries.to(device).int()]
        ).cpu()

    names = {"differences": differences, "products in float64": products, "nearest_images": ours}
    question = f"nearest of {images} at {size}x{size}"
    return compare(question, names, 0, "images/s", images, options)


def main(arguments: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__, device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=("quickstart", "cifar"), default="quickstart")
    parser.add_argument("--count", type=positive, default=64, help="images to draw")
    parser.add_argument("--samples", type=positive, default=128, help="importance samples")
    parser.add_argument("--chunk", type=positive, default=32, help="importance samples at once")
    numbers = dict(type=positive, nargs=2, default=[10_000, 256])
    parser.add_argument("--training_images", help="at 32x32 and at 256x256", **numbers)
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args(arguments)
    result = common.stamp("benchmarks.evaluation", arguments, options.device)
    measured = []
    for name, changes in (("SDN", {}), ("CNN", CNN)):
        torch.manual_seed(0)
        model = DensityVAE(32, **MODELS[options.model] | changes).eval().to(options.device)
        measured += sampling(name, model, options) + likelihood(name, model, options)
    for size, images in zip((32, 256), options.training_images, strict=True):
        measured += nearest(size, images, options)
    common.write(result | {"rows": measured}, options.output)
    columns = {"question": "", "contender": "", "seconds": ".3g", "rate": ".4g", "unit": ""}
    print(common.table(measured, columns | {"times_faster": ".2f"}))


if __name__ == "__main__":
    main()
