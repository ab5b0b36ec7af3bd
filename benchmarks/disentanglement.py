"""How fast are the scores of the disentanglement experiments, and the encoding before them?

    python -m benchmarks.disentanglement --output benchmarks/results/disentanglement_cpu.json

Images/s of the encoder, and seconds of each metric on a table of codes of all 480,000 scenes. First
a perfect code must score near 1 in the paper's two metrics, else the program ends with status 1.
Times are medians over rounds in which the metrics take turns, after one that is not counted; DCI
is run once. The training step is timed by `benchmarks.train_step --model shapes3d`, the loaders by
`benchmarks.loader --datasets Shapes3DRendered 3DShapes`.
"""

from __future__ import annotations

import functools
import statistics
import sys

import numpy as np
import torch

from benchmarks import common
from data.sets.shapes3d_rendered import Shapes3DRendered
from lib.DisentanglementVAE import DisentanglementVAE
from lib.DisentanglementVAE.metrics import METRICS

ENCODE_BATCH = 512  # that of encode_all
PERFECT = 0.99  # least score of a perfect code
NOISE, DIMENSIONS = 0.3, 10  # of the codes that metrics are timed on
# Arguments of the metrics, by default their own.
QUICK = dict.fromkeys(METRICS, dict(train=150, test=75))
QUICK |= {"mig": dict(samples=150), "dci": dict(train=150, test=75, trees=1)}


def score_of(name: str, codes: np.ndarray, sizes: dict[str, int]) -> float:
    return METRICS[name](codes, Shapes3DRendered(), seed=0, **sizes)["score"]


def perfect_codes() -> np.ndarray:
    """The factors of all scenes with mean 0 and variance 1: [480000, 6]."""
    sizes = Shapes3DRendered.factor_sizes
    factors = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=-1).astype(float)
    return (factors - factors.mean(0)) / factors.std(0)


def time_encoder(options) -> dict:
    model = DisentanglementVAE().to(options.device)
    images = Shapes3DRendered().batch(range(ENCODE_BATCH)).to(options.device)
    encode = torch.no_grad()(lambda: model.represent(model.observation.encode(images)))
    (taken,) = common.take_turns({"": encode}, options.rounds, options.device).values()
    return {"batch": ENCODE_BATCH, "images/s": ENCODE_BATCH / statistics.median(taken)}


def time_metrics(options) -> list[dict]:
    perfect, rng = perfect_codes(), np.random.default_rng(0)
    sizes = {name: QUICK[name] if options.quick else {} for name in METRICS}
    for name in ("beta_vae", "factor_vae"):
        score = score_of(name, perfect, sizes[name])
        if not PERFECT <= score <= 1:
            sys.exit(f"metrics are not timed: {name} of a perfect code is {score:.3f}")
    noisy = perfect + NOISE * rng.standard_normal(perfect.shape)
    unused = rng.standard_normal((len(perfect), DIMENSIONS - perfect.shape[1]))  # as usual
    codes, scores = np.concatenate([noisy, unused], axis=1), {}

    def compute(name: str) -> None:
        scores[name] = score_of(name, codes, sizes[name])

    quick = {name: functools.partial(compute, name) for name in METRICS if name != "dci"}
    taken = common.take_turns(quick, options.rounds, "cpu")
    times = {name: statistics.median(each) for name, each in taken.items()}
    if not options.skip_dci:
        times["dci"] = common.seconds(functools.partial(compute, "dci"), "cpu")
    return [
        {
            "metric": name,
            "seconds": times.get(name),
            "score": scores.get(name),
            "sizes": sizes[name],
        }
        for name in METRICS
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__, device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip_dci", action="store_true", help="it takes minutes")
    parser.add_argument("--rounds", type=common.positive, default=5)
    parser.add_argument("--quick", action="store_true", help="few points, votes and trees")
    options = parser.parse_args(arguments)
    packages = ("numpy", "scikit-learn")
    result = common.stamp("benchmarks.disentanglement", arguments, options.device, packages)
    result |= {"rounds": options.rounds, "metrics": time_metrics(options)}
    result["encoder"] = time_encoder(options)
    common.write(result, options.output)
    print(common.table([result["encoder"]], {"batch": "", "images/s": ",.0f"}))
    columns = {"metric": "", "seconds": ".3g", "score": ".3g"}
    print(common.table(result["metrics"], columns))


if __name__ == "__main__":
    main()
