"""What the examples share: the arms, training, scores, the choice of a rate, records, promises."""

import json

import pytest
import torch

from examples import common, comparison, enclosed, networks


@pytest.mark.parametrize("arm", enclosed.ARMS)
def test_arm_takes_any_size_and_every_parameter_learns(arm):
    torch.manual_seed(0)
    network = enclosed.ARMS[arm]()
    network(torch.randn(2, 1, 19, 21)).square().mean().backward()
    assert network(torch.randn(1, 1, 19, 21)).shape == (1, 1, 19, 21)
    still = [n for n, p in network.named_parameters() if p.grad is None]
    assert not still
    parameters = sum(p.numel() for p in network.parameters())
    if "large" in arm:
        assert parameters > 300_000
    elif arm in networks.variants(1):
        assert 24_000 < parameters < 65_000
    else:
        assert 24_000 < parameters < 36_000


def test_intersection_over_union_of_right_wrong_and_empty():
    x = torch.full((1, 1, 4, 4), -1.0)
    x[..., :2] = 1  # the network, an identity, finds the left half
    ones = torch.ones_like(x)
    assert common.intersection_over_union(torch.nn.Identity(), (x, (x > 0).float(), ones)) == 1
    assert common.intersection_over_union(torch.nn.Identity(), (x, ones, ones)) == 0.5
    assert common.intersection_over_union(torch.nn.Identity(), (-ones, 0 * ones, ones)) == 1


def test_scores_do_not_depend_on_how_many_pictures_are_scored_together():
    torch.manual_seed(0)
    x, truth = torch.randn(7, 1, 64, 64), (torch.rand(7, 1, 64, 64) < 0.5).float()
    weight = (torch.rand(7, 1, 64, 64) < 0.5).float()
    one_by_one = [
        common.intersection_over_union(torch.nn.Identity(), parts)
        for parts in zip(x.split(1), truth.split(1), weight.split(1), strict=True)
    ]
    together = common.intersection_over_union(torch.nn.Identity(), (x, truth, weight))
    assert together == pytest.approx(sum(one_by_one) / 7)


def test_training_visits_every_picture_of_every_size_and_is_seeded():
    seen = []

    class Watching(torch.nn.Conv2d):
        def forward(self, x):
            seen.append((x.shape[-1], sorted(x[:, 0, 0, 0].tolist())))
            return super().forward(x)

    def pictures(size):
        x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, size, size)
        return x, torch.zeros_like(x), torch.ones_like(x)

    def weights(seed):
        network, steps, seconds = common.train(
            lambda: Watching(1, 1, 1),
            [pictures(16), pictures(24)],
            steps=4,
            learning_rate=0.1,
            seed=seed,
            batch_size=2,
        )
        assert (steps, network.training) == (4, False) and seconds > 0
        return network.weight.item()

    assert weights(0) == weights(0) != weights(1)
    for size, batches in ((16, seen[0:4:2]), (24, seen[1:4:2])):
        assert [s for s, _ in batches] == [size, size]
        assert sorted(batches[0][1] + batches[1][1]) == [0, 1, 2, 3]


def test_gradients_are_reduced_to_the_norm_that_is_given():
    class Watching(torch.optim.AdamW):
        norms = []

        def step(self, *arguments):
            (group,) = self.param_groups
            self.norms.append(sum(p.grad.square().sum() for p in group["params"]).sqrt().item())
            return super().step(*arguments)

    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = (x, (x > 0).float(), torch.ones_like(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watching)
        for clip in (1e-3, 1e3):
            common.train(
                lambda: torch.nn.Conv2d(1, 1, 1),
                [pictures],
                steps=1,
                learning_rate=0.1,
                seed=0,
                clip=clip,
                batch_size=4,
            )
    assert Watching.norms[0] == pytest.approx(1e-3, rel=1e-2)
    assert Watching.norms[1] > 0.01


def test_rate_is_chosen_at_the_training_size_only(tmp_path, monkeypatch):
    """The middle rate is best at the training size, another one at the larger size."""

    def train(build, sets, *, learning_rate, seed, **_):
        return Rated(learning_rate), 1, 0.0

    class Rated(torch.nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate = rate

        def forward(self, x):  # zero counts as outside, so the sign decides
            good = self.rate == (3e-3 if x.shape[-1] == 32 else 1e-2)
            return torch.full_like(x, 1.0 if good else -1.0)

    def make(count, size, seed):
        ones = torch.ones(count, 1, size, size)
        return ones, ones, ones

    monkeypatch.setattr(common, "train", train)
    results = tmp_path / "results.jsonl"
    parser = comparison.parser("", {"arm": None}, ["arm"], steps=1, sizes=[32, 64])
    flags = ["--select", "--tests", "1", "--pictures", "1", "--results", str(results)]
    scores = comparison.compare("test", {"arm": None}, make, comparison.parse(parser, flags))
    assert scores == {"arm": {32: [1.0] * 3, 64: [0.0] * 3}}
    runs = [json.loads(line) for line in results.read_text().splitlines()]
    assert [run["learning_rate"] for run in runs] == [1e-3, 3e-3, 1e-2, 3e-3, 3e-3, 3e-3]
    assert [run["seed"] for run in runs] == [1000, 1000, 1000, 0, 1, 2]
    assert [list(run["iou"]) for run in runs] == [["32"]] * 3 + [["32", "64"]] * 3


def test_table_has_mean_and_deviation():
    table = common.table({"a": {32: [0.5, 1.0], "photographs": [0.25, 0.25]}})
    assert table.splitlines()[0] == "| arm | seeds | 32 | photographs |"
    assert table.splitlines()[2] == "| a | 2 | 0.7500 ± 0.3536 | 0.2500 ± 0.0000 |"


def test_a_missed_promise_is_status_1(capsys):
    scores = {"SDN": {64: [1.0], 96: [0.9, 0.8]}}
    means = comparison.means(scores, "SDN")
    assert comparison.missed(means, {"SDN at 64": 0.99, "SDN at 256": 0.99}) == 0
    assert comparison.missed(means, {"SDN at 96": 0.99}) == 1
    assert "promise missed: SDN at 96: 0.8500 < 0.99" in capsys.readouterr().err
    assert comparison.missed({"SDN at 96": float("nan")}, {"SDN at 96": 0.99}) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--sizes", "8"],
        ["--train_sizes", "8"],
        ["--seconds", "0"],
        ["--seconds", "inf"],
        ["--learning_rate", "-1"],
        ["--clip", "nan"],
        ["--steps", "0"],
    ],
)
def test_flags_that_cannot_work_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as refused:
        enclosed.main(flags)
    assert refused.value.code == 2
    assert flags[0] in capsys.readouterr().err
