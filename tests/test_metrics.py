"""Disentanglement metrics: codes whose scores are known beforehand, and scores recomputed by open
loops.

The data set has 3D-Shapes' factors, and its images are their levels, so that any code can be made
up: as a function of the images or as the table of all codes.
"""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

pytest.importorskip("sklearn")

from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

from lib.DisentanglementVAE import metrics
from lib.DisentanglementVAE.metrics import METRICS, MetricError, encode_all

SIZES = (10, 10, 10, 8, 4, 15)
CHANCE = 1 / len(SIZES)
REDUCED = {"dci": {"train": 1000, "test": 500, "trees": 5}, "sap": {"train": 2000, "test": 1000}}


class LevelImages:
    """Images [N, 3, 1, 2] whose six pixels are the levels of the six factors, or of the first
    ones."""

    def __init__(self, factor_sizes: tuple[int, ...] = SIZES):
        self.factor_sizes = factor_sizes

    def images(self, factors: np.ndarray) -> Tensor:
        padding = ((0, 0), (0, 6 - len(self.factor_sizes)))
        return torch.from_numpy(np.pad(factors, padding)).to(torch.uint8).view(-1, 3, 1, 2)


def levels_of(images: Tensor) -> Tensor:
    """The perfect representation."""
    return images.flatten(1).double()


DATA = LevelImages()


@pytest.fixture(scope="module")
def perfect() -> np.ndarray:
    """Each dimension is one factor at mean 0 and variance 1."""
    codes = encode_all(levels_of, DATA, batch_size=8192)
    return (codes - codes.mean(0)) / codes.std(0)


@pytest.fixture(scope="module")
def in_pairs(perfect) -> np.ndarray:
    """Factors 1 and 2, 3 and 4, 5 and 6 turned by 45 degrees: two dimensions tell of two factors
    equally well."""
    turn = np.array([[1, -1], [1, 1]]) / math.sqrt(2)
    return perfect @ np.kron(np.eye(3), turn)


@pytest.fixture(scope="module")
def rotated(perfect) -> np.ndarray:
    """Turned at random: each dimension mixes all factors, in unequal parts."""
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    return perfect @ rotation


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Ten dimensions that have nothing to do with the factors."""
    return np.random.default_rng(0).normal(size=(math.prod(SIZES), 10))


def scores(metric: str, codes, data=DATA, seed: int = 0, **options) -> dict[str, float]:
    return METRICS[metric](codes, data, seed=seed, **{**REDUCED.get(metric, {}), **options})


# SAP: the two levels at the ends of the line can be cut off, which is 2/n of n levels, and chance
# is 1/n.
NEAR_ONE = {
    "beta_vae": 0.99,
    "factor_vae": 0.99,
    "mig": 0.99,
    "dci": 0.99,
    "sap": np.mean([1 / n for n in SIZES]),
}


@pytest.mark.parametrize("metric", METRICS)
def test_a_perfect_code_scores_near_one_also_permuted_and_scaled_up(metric, perfect):
    changed = perfect[:, [3, 5, 0, 2, 1, 4]] * [100, -30, 7, 1000, 1, -3]
    for codes in (perfect, changed, levels_of):
        found = scores(metric, codes)
        assert found["score"] > NEAR_ONE[metric]
        if metric == "dci":
            assert found["completeness"] > 0.99 and found["informativeness"] > 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_a_random_code_scores_near_chance(metric, noise):
    found = scores(metric, noise)
    if metric in ("beta_vae", "factor_vae"):
        deviation = math.sqrt(CHANCE * (1 - CHANCE) / 5000)
        assert abs(found["score"] - CHANCE) < 4 * deviation
    else:
        assert 0 <= found["score"] < {"mig": 0.002, "dci": 0.05, "sap": 0.03}[metric]
    if metric == "dci":
        assert found["completeness"] < 0.05
        assert abs(found["informativeness"] - np.mean([1 / n for n in SIZES])) < 0.03


@pytest.mark.parametrize("metric", METRICS)
def test_a_code_that_confuses_factors_in_pairs_scores_as_expected(metric, in_pairs):
    """Of two factors in two dimensions with equal parts, either is as likely, and no dimension is
    the better one."""
    dci = 1 - math.log(2) / math.log(6)
    expected = {"beta_vae": 1 / 2, "factor_vae": 1 / 2, "mig": 0, "dci": dci, "sap": 0}[metric]
    assert abs(scores(metric, in_pairs)["score"] - expected) < (0.01 if metric == "mig" else 0.05)


@pytest.mark.parametrize("metric", METRICS)
def test_an_entangled_rotation_scores_clearly_lower_than_the_perfect_code(
    metric, perfect, rotated, noise
):
    best, entangled, worst = (scores(metric, codes)["score"] for codes in (perfect, rotated, noise))
    factor = {"beta_vae": 0.95, "factor_vae": 0.9, "mig": 0.25, "dci": 0.5, "sap": 0.5}[metric]
    assert worst < entangled < factor * best


def test_beta_vae_saturates_where_factor_vae_does_not(perfect):
    """Each of 20 dimensions is the mean of three of the six factors, of every three once.

    A shared factor makes ten dimensions differ less, and no other factor these ten: to a classifier
    of all dimensions, as BetaVAE's, that is plain. But these ten are equal, and FactorVAE votes for
    any of them; a vote for a dimension comes from its three factors equally often.
    """
    triples = list(itertools.combinations(range(6), 3))
    codes = np.stack([perfect[:, triple].mean(1) for triple in triples], axis=1)
    beta, factor = scores("beta_vae", codes)["score"], scores("factor_vae", codes)["score"]
    assert beta > 0.98
    assert abs(factor - 1 / 3) < 0.03


def test_a_code_that_says_all_twice_is_disentangled_but_has_no_gap(perfect):
    twice = np.concatenate([perfect, perfect], axis=1)
    for metric, score in (("beta_vae", 1), ("factor_vae", 1), ("mig", 0), ("sap", 0)):
        assert scores(metric, twice)["score"] == score, metric
    found = scores("dci", twice)
    assert found == scores("dci", twice), (
        "which of two equal dimensions a tree takes is a matter of the seed"
    )
    assert found["score"] > 0.99
    assert abs(found["completeness"] - (1 - math.log(2) / math.log(12))) < 0.1


def test_importances_that_rounding_made_negative_are_none():
    exact = np.array([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    expected = (1 * (1 - math.log(2) / math.log(3)) + 1 * 1) / 2
    assert metrics._concentration(exact) == pytest.approx(expected)
    rounded = exact - 1e-18 * (exact == 0)
    assert metrics._concentration(rounded) == pytest.approx(expected)


def test_factor_vae_prunes_dimensions_that_hardly_vary(in_pairs, perfect):
    """Six dimensions with a standard deviation of 0.01 that would settle every vote rightly, and
    two constant ones."""
    constant = np.full((len(perfect), 2), 3.0)
    codes = np.concatenate([constant, in_pairs, 0.01 * perfect], axis=1)
    pruned = scores("factor_vae", codes)
    assert pruned["active_dimensions"] == 6
    assert abs(pruned["score"] - 1 / 2) < 0.05
    kept = scores("factor_vae", codes, least_deviation=0.005)
    assert kept["active_dimensions"] == 12
    assert kept["score"] > 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_constant_dimensions_beside_a_perfect_code_change_nothing(metric, perfect):
    constant = np.broadcast_to([0.0, -7.3, 1e5], (len(perfect), 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(metric, np.concatenate([constant[:, :2], perfect, constant[:, 2:]], axis=1))
    assert found["score"] > NEAR_ONE[metric]
    assert metric != "factor_vae" or found["active_dimensions"] == 6


def test_dimensions_that_vary_by_rounding_only_count_as_constant(perfect):
    """MIG could not divide their range into bins; SAP's second best is chance.

    The orientation alone: SAP's machine cuts off both ends of 15 levels, where chance is one.
    """
    last_bits = 1 + np.finfo(np.float64).eps * (perfect[:, :1] > 0)
    for metric, least in (("mig", 0.1), ("sap", 0.8 / 15 / 6)):
        alone = scores(metric, perfect[:, -1:])
        assert alone["score"] > least
        assert scores(metric, np.concatenate([perfect[:, -1:], last_bits], axis=1)) == alone, metric


def test_sap_compares_with_chance_where_the_other_dimensions_are_dead(noise):
    """As disentanglement_lib, which fits a machine to each dimension, also to those at a constant;
    noise among them says nothing, whatever the accuracy of chance is."""
    dead = np.broadcast_to([0.0, 2.0, -1.0], (len(noise), 3))
    codes = np.concatenate([dead[:, :1], noise[:, :1], dead[:, 1:]], axis=1)
    source = metrics._Source(codes, DATA, 0, batch_size=512)
    (train, factors), (test, test_factors) = source.samples(2000), source.samples(1000)
    gaps = []
    for levels, test_levels in zip(factors.T, test_factors.T, strict=True):
        accuracies = sorted(
            LinearSVC(C=0.01, class_weight="balanced")
            .fit(train[:, [dimension]], levels)
            .score(test[:, [dimension]], test_levels)
            for dimension in range(4)
        )
        gaps.append(accuracies[-1] - accuracies[-2])
    found = scores("sap", codes)["score"]
    # Which of equally likely levels a machine for a constant predicts is a matter of rounding.
    assert found == pytest.approx(np.mean(gaps), abs=0.015)
    assert found < 0.03


@pytest.mark.parametrize("value", [0.0, 0.1, -1e5])
@pytest.mark.parametrize("metric", METRICS)
def test_a_constant_code_has_a_score_and_a_warning(metric, value):
    with pytest.warns(UserWarning) as record:
        found = scores(metric, np.full((math.prod(SIZES), 3), value))
    assert len(record) == 1 and record[0].filename == __file__
    assert "\n" not in str(record[0].message)
    assert abs(found["score"] - CHANCE) < 0.03 if metric == "beta_vae" else found["score"] == 0
    assert metric != "factor_vae" or found == {
        "score": 0,
        "train_accuracy": 0,
        "active_dimensions": 0,
    }
    assert metric != "dci" or found["completeness"] == 0


@pytest.mark.parametrize("metric", METRICS)
def test_seeds_and_nothing_else_decide(metric):
    """The table of codes and the function of the images, in batches of any size, give the same
    bits."""
    small = {"mig": {"samples": 1000}, "dci": {"trees": 1}}.get(
        metric, {"train": 1000, "test": 500}
    )
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0])

    def represent(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 1, 2)
        return (levels_of(images)[:, :, None] * rotation).sum(
            1
        )  # not a matrix product: its rounding depends on B

    table = encode_all(represent, DATA, batch_size=10_000)
    first = scores(metric, table, **small)
    assert first == scores(metric, table, **small)
    assert first == scores(metric, torch.from_numpy(table), **small)
    for batch_size in (97, 100_000):
        assert first == scores(metric, represent, batch_size=batch_size, **small)
    assert all(scores(metric, table, seed=seed, **small) != first for seed in (1, 2))
    assert all(type(value) in (float, int) and math.isfinite(value) for value in first.values())


def test_scores_do_not_depend_on_the_order_of_dimensions_nor_on_their_scale(rotated):
    """Scales are powers of two: nothing is rounded."""
    permuted = rotated[:, [3, 5, 0, 2, 1, 4]]
    for metric in ("factor_vae", "mig", "sap"):
        assert scores(metric, rotated) == scores(metric, permuted), metric
    for metric in ("factor_vae", "mig"):
        assert scores(metric, rotated) == scores(metric, permuted * [1, 2, 4, 1024, 2, 1]), metric
    moved = scores("beta_vae", permuted * [1, 2, 4, 1024, -2, -1])["score"]
    assert abs(scores("beta_vae", rotated)["score"] - moved) < 0.01


def test_encode_all_goes_through_the_images_with_the_last_factor_fastest():
    data = LevelImages((3, 2, 4))
    batches = []

    def represent(images: Tensor) -> np.ndarray:
        batches.append(len(images))
        return levels_of(images)[:, :3].float().numpy()

    codes = encode_all(represent, data, batch_size=9)
    assert batches == [9, 9, 6]
    assert codes.tolist() == [
        list(levels) for levels in itertools.product(range(3), range(2), range(4))
    ]


class Recorder:
    """A representation of entangled factors that keeps the levels and the codes of all images it
    was given."""

    data = LevelImages((3, 4, 5))

    def __init__(self):
        self.levels, self.codes = [], []

    def __call__(self, images: Tensor) -> Tensor:
        levels = levels_of(images)[:, :3]
        mixed = (
            levels
            @ torch.tensor(
                [[1, 0.3, 0.2, 0.1], [0.17, 1.3, 0.5, 0.2], [0.13, 0.41, 0.7, 0.2]]
            ).double()
        )
        codes = torch.cat([mixed.sin() + 0.1 * mixed, 0.05 * mixed[:, :1].cos()], dim=1)
        self.levels += levels.int().tolist()
        self.codes += codes.tolist()
        return codes

    def points(self, size: int, start: int = 0) -> list[tuple[list, list]]:
        """Levels and codes of image `start` and the next ones, `size` at a time."""
        ends = range(start + size, len(self.codes) + 1, size)
        return [(self.levels[end - size : end], self.codes[end - size : end]) for end in ends]


def test_factor_vae_agrees_with_open_loops():
    recorder = Recorder()
    sizes = {"train": 300, "test": 200, "images": 20, "variance_samples": 150}
    found = scores("factor_vae", recorder, recorder.data, **sizes)

    variances = [statistics.variance(values) for values in zip(*recorder.codes[:150], strict=True)]
    active = [d for d in range(5) if math.sqrt(variances[d]) >= 0.05]
    assert active == [0, 1, 2, 3], "the last dimension hardly varies"
    votes = []
    for levels, codes in recorder.points(20, start=150):
        (factor,) = [k for k in range(3) if len({row[k] for row in levels}) == 1]
        ratios = {d: statistics.variance(code[d] for code in codes) / variances[d] for d in active}
        votes.append((min(ratios, key=ratios.get), factor))
    assert len(votes) == 500 and {factor for _, factor in votes} == {0, 1, 2}
    counts = Counter(votes[:300])
    majority = {d: max(range(3), key=lambda factor: counts[d, factor]) for d in active}  # noqa: B023 - used at once
    right = [majority[dimension] == factor for dimension, factor in votes]
    expected = {
        "score": sum(right[300:]) / 200,
        "train_accuracy": sum(right[:300]) / 300,
        "active_dimensions": 4,
    }
    assert found == expected
    assert 0.4 < found["score"] < 1


def test_beta_vae_agrees_with_open_loops():
    recorder = Recorder()
    found = scores("beta_vae", recorder, recorder.data, train=300, test=200, pairs=20)

    features, labels = [], []
    for levels, codes in recorder.points(40):
        (factor,) = [
            k for k in range(3) if all(levels[i][k] == levels[i + 20][k] for i in range(20))
        ]
        assert all(len({row[k] for row in levels[:20]}) > 1 for k in range(3)), (
            "pairs share it, not points"
        )
        features.append(
            [sum(abs(codes[i][d] - codes[i + 20][d]) for i in range(20)) / 20 for d in range(5)]
        )
        labels.append(factor)
    assert len(labels) == 500
    margins = []
    for factor in range(3):
        model = LogisticRegression(solver="liblinear").fit(
            features[:300], [label == factor for label in labels[:300]]
        )
        margins.append(model.decision_function(features))
    right = np.argmax(margins, axis=0) == labels
    assert found == {"score": right[300:].mean(), "train_accuracy": right[:300].mean()}
    assert 0.4 < found["score"] < 1


def test_beta_vae_has_the_classifier_of_the_older_scikit_learn():
    """Up to version 0.21 the default was liblinear, one level against the rest; the multinomial
    regression of later versions gives other scores, here of a code that is a twentieth as large."""
    recorder = Recorder()
    found = scores(
        "beta_vae",
        lambda images: 0.05 * recorder(images),
        recorder.data,
        train=2000,
        test=1000,
        pairs=20,
    )
    points = [(np.array(levels), np.array(codes)) for levels, codes in recorder.points(40)]
    features = np.stack([np.abs(0.05 * (codes[:20] - codes[20:])).mean(0) for _, codes in points])
    labels = np.array([(levels[:20] == levels[20:]).all(0).argmax() for levels, _ in points])
    older = OneVsRestClassifier(LogisticRegression(solver="liblinear"))
    older, later = (
        classifier.fit(features[:2000], labels[:2000]).score(features[2000:], labels[2000:])
        for classifier in (older, LogisticRegression())
    )
    assert found["score"] == pytest.approx(older, abs=0.002)
    assert 0.02 < later - older < 0.08


def test_mig_agrees_with_open_loops():
    recorder = Recorder()
    found = scores("mig", recorder, recorder.data, samples=400, bins=6)

    def bins(values: list[float]) -> list[int]:
        low, high = min(values), max(values)
        return [min(int((value - low) / (high - low) * 6), 5) for value in values]

    def information(a: list[int], b: list[int]) -> float:
        joint, left, right = Counter(zip(a, b, strict=True)), Counter(a), Counter(b)
        return sum(
            n / 400 * math.log(n * 400 / (left[x] * right[y])) for (x, y), n in joint.items()
        )

    assert len(recorder.codes) == 400
    binned = [bins(values) for values in zip(*recorder.codes, strict=True)]
    gaps = []
    for levels in zip(*recorder.levels, strict=True):
        ranked = sorted((information(levels, values) for values in binned), reverse=True)
        gaps.append((ranked[0] - ranked[1]) / information(levels, levels))
    assert 0.05 < found["score"] == pytest.approx(sum(gaps) / 3, rel=1e-9)


def test_sap_agrees_with_open_loops():
    recorder = Recorder()
    found = scores("sap", recorder, recorder.data, train=300, test=200)

    codes, gaps = np.array(recorder.codes), []
    for levels in np.array(recorder.levels).T:
        accuracies = []
        for values in codes.T[:, :, None]:
            model = LinearSVC(C=0.01, class_weight="balanced").fit(values[:300], levels[:300])
            accuracies.append(np.mean(model.predict(values[300:]) == levels[300:]))
        gaps.append(max(accuracies) - sorted(accuracies)[-2])
    assert 0.02 < found["score"] == pytest.approx(sum(gaps) / 3, rel=1e-9)


def test_dci_weighs_dimensions_by_their_importance_and_tells_more_with_more_trees(rotated):
    few, many = (scores("dci", rotated, trees=trees)["train_accuracy"] for trees in (1, 5))
    assert few + 0.1 < many
    by_dimension = np.array([[1.0, 1.0, 0.0], [3.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    expected = (2 * (1 - math.log(2) / math.log(3)) + 3 * 1 + 6 * 0) / 11
    assert metrics._concentration(by_dimension) == pytest.approx(expected, rel=1e-12)


def test_a_single_dimension_has_no_second(perfect):
    """It is the last factor alone, of which it tells all."""
    codes = perfect[:, -1:]
    assert scores("mig", codes)["score"] == pytest.approx(1 / 6, abs=0.01)
    assert scores("dci", codes)["completeness"] == 1


TABLE = np.random.default_rng(0).normal(size=(24, 2))
SMALL_DATA = LevelImages((3, 2, 4))


@pytest.mark.parametrize(
    ("codes", "data", "message"),
    [
        (
            levels_of,
            TensorDataset(torch.zeros(3)),
            "TensorDataset has no factors of variation; .* factor_sizes and",
        ),
        (levels_of, LevelImages((5,)), r"needs two factors or more.* \(5,\)"),
        (levels_of, LevelImages((5, 1)), r"of two levels or more each; .* \(5, 1\)"),
        (TABLE[:23], SMALL_DATA, r"codes of 24 images must be \[24, Z\], got \[23, 2\]"),
        (np.where(TABLE > 1, np.nan, TABLE), SMALL_DATA, "NaN or infinite"),
        (None, SMALL_DATA, "codes must be a tensor or an array, got NoneType"),
        (
            lambda images: (images, images),
            SMALL_DATA,
            "codes must be a tensor or an array, got tuple",
        ),
        (
            lambda images: images.float(),
            SMALL_DATA,
            r"codes of 7 images must be \[7, Z\], got \[7, 3, 1, 2\]",
        ),
        (
            lambda images: levels_of(images).sum(0, keepdim=True),
            SMALL_DATA,
            r"must be \[7, Z\], got \[1, 6\]",
        ),
        (lambda images: levels_of(images) / 0, SMALL_DATA, "NaN or infinite"),
    ],
)
@pytest.mark.parametrize("metric", METRICS)
def test_what_has_no_score_is_refused_in_one_line(metric, codes, data, message):
    with pytest.raises(MetricError, match=message) as error:
        METRICS[metric](codes, data, seed=0, batch_size=7)
    assert "\n" not in str(error.value)


def test_encode_all_refuses_as_the_metrics_do():
    with pytest.raises(MetricError, match="TensorDataset has no factors of variation"):
        encode_all(levels_of, TensorDataset(torch.zeros(3)))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encode_all(levels_of, SMALL_DATA, batch_size=0)


@pytest.mark.parametrize("metric", METRICS)
def test_sizes_that_are_too_small_are_refused(metric):
    at_least_two = {"images", "variance_samples", "samples"}
    at_least_one = {"train", "test", "pairs", "bins", "trees", "batch_size"}
    for option in inspect.signature(METRICS[metric]).parameters.keys() & (
        at_least_one | at_least_two
    ):
        least = 1 + (option in at_least_two)
        with pytest.raises(ValueError, match=f"{option} must be at least {least}, got {least - 1}"):
            METRICS[metric](TABLE, SMALL_DATA, seed=0, **{option: least - 1})


def test_mig_refuses_samples_that_show_a_factor_at_one_level_only():
    with pytest.raises(ValueError, match="2 samples are too few"):
        scores("mig", np.zeros((64, 1)), LevelImages((2,) * 6), seed=1, samples=2)
