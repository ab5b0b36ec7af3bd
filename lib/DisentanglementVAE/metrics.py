"""How well a representation separates the factors of variation behind the images: five scores.

BetaVAE and FactorVAE are the paper's (Figure 7); MIG, DCI and SAP are others that representations
are compared by. All follow Locatello et al. 2019, "Challenging Common Assumptions in the
Unsupervised Learning of Disentangled Representations" (https://arxiv.org/abs/1811.12359), in the
default sizes too.

Read BetaVAE and FactorVAE together. BetaVAE saturates early: its classifier weighs all dimensions
at once, so it can tell the factors of a code that mixes them in every dimension. FactorVAE has one
dimension to tell each factor by.

Each metric returns a dictionary of numbers with the score, in [0, 1], under "score". All of them
have these in common:

Arguments:
    represent: A function from images to their codes, or the codes of all images as `encode_all`
        returns them.
    data: A data set that knows its factors.
    seed: The seed of all random draws. On one machine the same seed gives the same numbers to the
        bit.
    batch_size: Number of images encoded at a time; scores depend on it only by rounding.

Raises:
    MetricError: if `data` has no factors, or the codes are not [images, Z] or not finite.
    ValueError: if a size is too small.

A constant code has a score, and a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..optional import optional
from ..utils import check_at_least

# Points drawn at a time; no argument, since the draws, and so the score of a seed, depend on it.
GROUP = 256
# Standard deviation up to which a dimension counts as constant.
CONSTANT = 1e-6


class MetricError(ValueError):
    """A data set or a representation that can have no score; the message is one line."""


@runtime_checkable
class FactorData(Protocol):
    """A data set with one image for each combination of its factors' levels.

    Attributes:
        factor_sizes: Number of levels of each factor: (10, 10, 10, 8, 4, 15) for 3D-Shapes. The
            images are in the order in which the last factor varies fastest.
    """

    factor_sizes: tuple[int, ...]

    def images(self, factors: np.ndarray) -> Tensor:
        """Images uint8 [N, 3, H, W] of the levels `factors`, int64 [N, F], which count from 0."""


# From images uint8 [B, 3, H, W] on the CPU to their codes [B, Z]: a VAE's posterior means.
Represent = Callable[[Tensor], Tensor | np.ndarray]
Codes = Tensor | np.ndarray


def encode_all(represent: Represent, data: FactorData, *, batch_size: int = 512) -> np.ndarray:
    """The codes of all images of a data set in their order, float64 [N, Z].

    Every metric takes them in place of the representation function, with the same result but for
    the rounding in other batches. On 3D-Shapes' 480,000 images this is cheaper even for a single
    score: at the default sizes BetaVAE encodes 1,920,000 images and FactorVAE 970,000.
    """
    source = _Source(represent, data, 0, batch_size=batch_size)
    images = np.arange(math.prod(source.sizes))
    return source.codes(np.stack(np.unravel_index(images, source.sizes), axis=-1))


def beta_vae(
    represent: Represent | Codes,
    data: FactorData,
    *,
    seed: int,
    train: int = 10_000,
    test: int = 5_000,
    pairs: int = 64,
    batch_size: int = 512,
) -> dict[str, float]:
    """The BetaVAE metric (Higgins et al. 2016): can a linear classifier tell which factor pairs of
    images share?

    A point has a factor drawn at random and `pairs` pairs of images that agree in it and are
    independent otherwise; its features are the means of `|z1 - z2|` over the pairs. The score is
    the accuracy on test points of a logistic regression for each factor against the others, as
    scikit-learn fitted by default when Locatello et al. used it (up to version 0.21: liblinear,
    one against the rest). The default of later versions, one multinomial regression, can score a
    few hundredths more for entangled codes. The penalty of the regression is felt by codes far
    smaller than 1, from 0.01 or so. Chance, and the score of a constant code, is one over the
    number of factors.

    Arguments:
        train, test: Points.

    Returns:
        `score` and `train_accuracy`.
    """
    optional("sklearn", "this score", "metrics", MetricError)
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    sizes = dict(train=train, test=test, pairs=pairs, batch_size=batch_size)
    source = _Source(represent, data, seed, **sizes)

    def points(count: int) -> tuple[np.ndarray, np.ndarray]:
        features, labels = [], []
        for size in _groups(count):
            factors, point = source.factors(size, 2, pairs), np.arange(size)
            shared = source.rng.integers(len(source.sizes), size=size)
            factors[point, 1, :, shared] = factors[point, 0, :, shared]
            codes = source.codes(factors)  # [size, 2, pairs, Z]
            features.append(np.abs(codes[:, 0] - codes[:, 1]).mean(1))
            labels.append(shared)
        return np.concatenate(features), np.concatenate(labels)

    features, labels = points(train)
    _warn_if_constant(features)
    classifier = OneVsRestClassifier(LogisticRegression(solver="liblinear")).fit(features, labels)
    return {
        "score": classifier.score(*points(test)),
        "train_accuracy": classifier.score(features, labels),
    }


def factor_vae(
    represent: Represent | Codes,
    data: FactorData,
    *,
    seed: int,
    train: int = 10_000,
    test: int = 5_000,
    images: int = 64,
    variance_samples: int = 10_000,
    least_deviation: float = 0.05,
    batch_size: int = 512,
) -> dict[str, float]:
    """The FactorVAE metric (Kim & Mnih 2018): does one dimension stand still when one factor does?

    A vote has a factor drawn at random and `images` images that agree in it; it goes to the
    dimension with the smallest variance over these images in relation to its variance over the
    data. Each dimension stands for the factor that most of its training votes came from; the score
    is the share of test votes for which that is right. Chance is one over the number of factors.

    Arguments:
        train, test: Votes.
        variance_samples: Images that the variances over the data are estimated from.
        least_deviation: Dimensions with a smaller standard deviation have no part. If none is left
            the score is 0.

    Returns:
        `score`, `train_accuracy` and `active_dimensions`, the number of those that take part.
    """
    source = _Source(represent, data, seed, train=train, test=test, batch_size=batch_size)
    check_at_least(2, images=images, variance_samples=variance_samples)
    variances = source.codes(source.factors(variance_samples)).var(0, ddof=1)
    active = np.sqrt(variances) >= least_deviation
    if not active.any():
        warnings.warn(
            "no dimension of the representation has a standard deviation of "
            f"{least_deviation}: its score is 0",
            stacklevel=2,
        )
        return {"score": 0.0, "train_accuracy": 0.0, "active_dimensions": 0}

    def votes(count: int) -> np.ndarray:
        """How many for each dimension came from each factor, int64 [active dimensions, F]."""
        counts = np.zeros((active.sum(), len(source.sizes)), dtype=np.int64)
        for size in _groups(count):
            factors, vote = source.factors(size, images), np.arange(size)
            fixed = source.rng.integers(len(source.sizes), size=size)
            factors[vote, :, fixed] = factors[vote, 0, fixed][:, None]
            within = source.codes(factors)[..., active].var(1, ddof=1)
            np.add.at(counts, ((within / variances[active]).argmin(1), fixed), 1)
        return counts

    train_votes, test_votes = votes(train), votes(test)
    dimension, factor = np.arange(active.sum()), train_votes.argmax(1)
    return {
        "score": float(test_votes[dimension, factor].sum() / test),
        "train_accuracy": float(train_votes[dimension, factor].sum() / train),
        "active_dimensions": int(active.sum()),
    }


def mig(
    represent: Represent | Codes,
    data: FactorData,
    *,
    seed: int,
    samples: int = 10_000,
    bins: int = 20,
    batch_size: int = 512,
) -> dict[str, float]:
    """The mutual information gap (Chen et al. 2018): does one dimension alone tell of each factor?

    The mean over factors of `(I1 - I2) / H`: the mutual informations of the factor with the two
    dimensions that tell most of it, by the entropy of the factor. A code of one dimension has `I2 =
    0`; a constant one scores 0.

    Arguments:
        samples: Images.
        bins: Of equal width, from the least to the greatest value of each dimension.
    """
    optional("sklearn", "this score", "metrics", MetricError)
    from sklearn.metrics import mutual_info_score

    source = _Source(represent, data, seed, bins=bins, batch_size=batch_size)
    check_at_least(2, samples=samples)
    codes, factors = source.samples(samples)
    if (factors == factors[0]).all(0).any():
        raise ValueError(
            f"{samples} samples are too few: in all of them some factor is at the same level"
        )
    _warn_if_constant(codes)
    varying = codes[:, codes.std(0) > CONSTANT]
    binned = [
        np.digitize(values, np.histogram_bin_edges(values, bins)[1:-1]) for values in varying.T
    ]
    gaps = []
    for levels in factors.T:
        information = sorted([0.0, 0.0, *(mutual_info_score(levels, values) for values in binned)])
        gaps.append((information[-1] - information[-2]) / mutual_info_score(levels, levels))
    return {"score": float(np.mean(gaps))}


def dci(
    represent: Represent | Codes,
    data: FactorData,
    *,
    seed: int,
    train: int = 10_000,
    test: int = 5_000,
    trees: int = 100,
    batch_size: int = 512,
) -> dict[str, float]:
    """Disentanglement, completeness and informativeness (Eastwood & Williams 2018).

    scikit-learn's gradient boosted trees predict each factor from the code, and say how much each
    dimension had a part in it. Disentanglement is one minus the entropy, in units of its maximum,
    of a dimension's importances over the factors, averaged over dimensions in proportion to their
    importance; completeness is the same with dimensions and factors exchanged; informativeness is
    the accuracy on test samples. A constant code scores 0 in the first two.

    By far the slowest metric: minutes at the default sizes, almost all of it for the trees.

    Arguments:
        train, test: Images.
        trees: Boosting stages, of one tree for each level of the factor.

    Returns:
        `score`, the disentanglement; `completeness`, `informativeness` and `train_accuracy`.
    """
    optional("sklearn", "this score", "metrics", MetricError)
    from sklearn.ensemble import GradientBoostingClassifier

    sizes = dict(train=train, test=test, trees=trees, batch_size=batch_size)
    source = _Source(represent, data, seed, **sizes)
    (codes, factors), (test_codes, test_factors) = source.samples(train), source.samples(test)
    _warn_if_constant(codes)
    importances, accuracies, train_accuracies = [], [], []
    for levels, test_levels in zip(factors.T, test_factors.T, strict=True):
        model = GradientBoostingClassifier(
            n_estimators=trees, random_state=int(source.rng.integers(2**31))
        )
        model.fit(codes, levels)
        importances.append(model.feature_importances_)
        accuracies.append(model.score(test_codes, test_levels))
        train_accuracies.append(model.score(codes, levels))
    by_factor = np.stack(importances)  # [F, Z]
    return {
        "score": _concentration(by_factor.T),
        "completeness": _concentration(by_factor),
        "informativeness": float(np.mean(accuracies)),
        "train_accuracy": float(np.mean(train_accuracies)),
    }


def sap(
    represent: Represent | Codes,
    data: FactorData,
    *,
    seed: int,
    train: int = 10_000,
    test: int = 5_000,
    penalty: float = 0.01,
    batch_size: int = 512,
) -> dict[str, float]:
    """The separated attribute predictability (Kumar et al. 2018): does one dimension alone predict
    each factor?

    The mean over factors of the difference between the test accuracies of the two dimensions that
    predict the factor best, each by a linear support vector machine of its own. As in
    disentanglement_lib, a constant dimension is as accurate as chance: its machine always predicts
    the same level. A code of one dimension is compared with a constant one. Scores are low: cuts
    of a line, one against all, do not tell many levels apart, not even those of a perfect code.

    Arguments:
        train, test: Images.
        penalty: scikit-learn's `C`.
    """
    optional("sklearn", "this score", "metrics", MetricError)
    from sklearn.svm import LinearSVC

    source = _Source(represent, data, seed, train=train, test=test, batch_size=batch_size)
    (codes, factors), (test_codes, test_factors) = source.samples(train), source.samples(test)
    _warn_if_constant(codes)
    varying = codes.std(0) > CONSTANT
    # All constant dimensions are alike, and no more than two can be the best.
    constant = max(min(2, np.sum(~varying)), 2 - np.sum(varying))
    columns, test_columns = (
        np.pad(values[:, varying], ((0, 0), (0, constant))) for values in (codes, test_codes)
    )
    gaps = []
    for levels, test_levels in zip(factors.T, test_factors.T, strict=True):
        accuracies = sorted(
            LinearSVC(C=penalty, class_weight="balanced")
            .fit(values[:, None], levels)
            .score(test_values[:, None], test_levels)
            for values, test_values in zip(columns.T, test_columns.T, strict=True)
        )
        gaps.append(accuracies[-1] - accuracies[-2])
    return {"score": float(np.mean(gaps))}


METRICS: dict[str, Callable[..., dict[str, float]]] = {
    metric.__name__: metric for metric in (beta_vae, factor_vae, mig, dci, sap)
}
TITLES = dict(beta_vae="BetaVAE", factor_vae="FactorVAE", mig="MIG", dci="DCI", sap="SAP")


class _Source:
    """Random factors and their codes. The `sizes`, of which `batch_size` is one, are checked."""

    def __init__(self, represent: Represent | Codes, data: FactorData, seed: int, **sizes: int):
        check_at_least(1, **sizes)
        self.sizes = factor_sizes(data)
        self.rng = np.random.default_rng(seed)
        self._represent, self._data, self._batch_size = represent, data, sizes["batch_size"]
        self._table = None if callable(represent) else _as_codes(represent, math.prod(self.sizes))

    def factors(self, *shape: int) -> np.ndarray:
        """Independent uniform levels, int64 [*shape, F]."""
        return self.rng.integers(self.sizes, size=(*shape, len(self.sizes)))

    @torch.no_grad()
    def codes(self, factors: np.ndarray) -> np.ndarray:
        """float64 [..., Z] of factors [..., F]."""
        if self._table is not None:
            return self._table[np.ravel_multi_index(tuple(np.moveaxis(factors, -1, 0)), self.sizes)]
        rows = factors.reshape(-1, len(self.sizes))
        batches = np.split(rows, range(self._batch_size, len(rows), self._batch_size))
        codes = [_as_codes(self._represent(self._data.images(b)), len(b)) for b in batches]
        return np.concatenate(codes).reshape(*factors.shape[:-1], -1)

    def samples(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes float64 [count, Z] of random images, and their factors [count, F]."""
        factors = self.factors(count)
        return self.codes(factors), factors


def factor_sizes(data: FactorData) -> tuple[int, ...]:
    """Levels of each factor; raises MetricError if `data` has none that metrics can use."""
    if not isinstance(data, FactorData):
        raise MetricError(
            f"{type(data).__name__} has no factors of variation; a metric needs a data set with "
            "factor_sizes and images(factors), such as one of 3D-Shapes"
        )
    sizes = tuple(data.factor_sizes)
    if len(sizes) < 2 or min(sizes) < 2:
        raise MetricError(
            "a metric needs two factors or more, of two levels or more each; got factor_sizes "
            f"{sizes}"
        )
    return sizes


def _as_codes(codes: Codes, count: int) -> np.ndarray:
    """As float64 [count, Z] if they are finite and of this shape."""
    if not isinstance(codes, Tensor | np.ndarray):
        raise MetricError(f"codes must be a tensor or an array, got {type(codes).__name__}")
    codes = torch.as_tensor(codes).detach().cpu().double().numpy()
    if codes.ndim != 2 or len(codes) != count or not codes.shape[1]:
        raise MetricError(
            f"the codes of {count} images must be [{count}, Z], got {list(codes.shape)}"
        )
    if not np.isfinite(codes).all():
        raise MetricError("the representation has values that are NaN or infinite")
    return codes


def _groups(count: int) -> Iterator[int]:
    return (min(GROUP, count - start) for start in range(0, count, GROUP))


def _concentration(importances: np.ndarray) -> float:
    """Mean over rows, weighted by their sums, of one minus the entropy in units of its maximum; 0
    if all are zero."""
    from scipy.stats import entropy

    importances = importances.clip(0)  # the trees' may be -1e-18
    rows = importances[importances.any(1)]
    if not len(rows):
        return 0.0
    columns = max(rows.shape[1], 2)  # the entropy over a single column is 0
    return float(np.average(1 - entropy(rows, base=columns, axis=1), weights=rows.sum(1)))


def _warn_if_constant(codes: np.ndarray) -> None:
    if codes.std(0).max() <= CONSTANT:
        warnings.warn(
            "the representation is constant: it tells nothing of any factor", stacklevel=3
        )
