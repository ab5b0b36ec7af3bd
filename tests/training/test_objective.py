"""The objective: β and its schedule, free bits, and what several processes make of it."""

from __future__ import annotations

import pytest
import torch

from lib.DensityVAE import Output
from lib.DisentanglementVAE import DisentanglementVAE
from lib.training.base import annealed_beta, objective


def output_with(rates: list[list[float]]) -> Output:
    """Of a batch of images with these rates [B, layers] and a distortion of 2 nats each."""
    return Output(torch.full((len(rates),), 2.0), torch.tensor(rates), [], torch.empty(0))


def test_beta_rises_linearly_to_its_final_value():
    """The paper: from 0 over the first 100,000 iterations; a rate of 1 is no annealing."""
    betas = [annealed_beta(500, 1e-5, step) for step in (0, 1, 50_000, 100_000, 300_000)]
    assert betas == pytest.approx([0, 0.005, 250, 500, 500])
    assert [annealed_beta(32, 1.0, step) for step in (0, 1, 2)] == [32, 32, 32]
    assert [annealed_beta(32, 0.5, step) for step in (0, 1, 2, 3)] == [0, 16, 32, 32]


def test_the_objective_weighs_the_kl_in_nats():
    model = DisentanglementVAE(z_size=3)
    output = model(
        model.observation.encode(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    )
    distortion, rates = output.distortion.mean(), output.rates.mean(0)
    torch.testing.assert_close(objective(output, beta=32), distortion + 32 * rates.sum())
    torch.testing.assert_close(objective(output, beta=32, free_bits=1e9), distortion + 32 * 3e9)
    assert objective(output).item() == pytest.approx(-output.elbo.mean().item(), rel=1e-6)


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_without_free_bits_negative_rates_count_too(beta):
    """One-sample rates may be negative; clamped at 0 they would make the loss larger than -ELBO,
    and another one for each way to share out the images among processes."""
    rates = [[-0.5, 0.1], [0.3, 0.2]]
    together = objective(output_with(rates), beta=beta)
    assert together.item() == pytest.approx(2 + beta * (-0.1 + 0.15))
    apart = [objective(output_with([of_image]), beta=beta) for of_image in rates]
    assert torch.stack(apart).mean().item() == pytest.approx(together.item())


def test_without_free_bits_a_negative_rate_has_a_gradient():
    output = output_with([[-0.5]])
    output.rates.requires_grad_()
    objective(output).backward()
    assert output.rates.grad.item() == 1


def test_free_bits_are_per_layer():
    """A layer whose mean rate is below the free bits costs these and has no gradient."""
    output = output_with([[-0.5, 1.0], [0.3, 3.0]])
    output.rates.requires_grad_()
    loss = objective(output, beta=3.0, free_bits=0.25)
    assert loss.item() == pytest.approx(2 + 3 * (0.25 + 2.0))
    loss.backward()
    assert output.rates.grad.tolist() == [[0, 1.5], [0, 1.5]]
