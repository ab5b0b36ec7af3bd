"""The β-VAE: architecture, objective's parts, generation, and what the shared evaluation asks of
it."""

from __future__ import annotations

import pytest
import torch

from lib.DisentanglementVAE.model import DisentanglementVAE
from lib.nn import SDNLayer


def model_of(seed: int = 0, **changes) -> DisentanglementVAE:
    torch.manual_seed(seed)
    return DisentanglementVAE(**dict(z_size=4) | changes)


def data_of(model: DisentanglementVAE, batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (batch, *model.image_shape), dtype=torch.uint8, generator=generator
    )
    return model.observation.encode(images)


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def convolution(inputs: int, outputs: int, kernel: int = 4) -> int:
    return inputs * outputs * kernel**2 + outputs


@pytest.mark.parametrize("sdn_nfeat", [0, 200])
def test_parameters_are_those_of_the_specification(sdn_nfeat):
    model = DisentanglementVAE(z_size=10, sdn_nfeat=sdn_nfeat)
    encoder = (
        convolution(3, 32)
        + convolution(32, 32)
        + convolution(32, 64)
        + convolution(64, 64)
        + linear(1024, 20)
    )
    decoder = (
        linear(10, 256)
        + linear(256, 1024)
        + convolution(64, 64)
        + convolution(64, 32)
        + convolution(32, 3)
    )
    C = sdn_nfeat
    gru = 3 * C * 3 * C + 3 * C * C + 6 * C
    to_scale_32 = convolution(32, C) + gru + convolution(C, 32, 1) if C else convolution(32, 32)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == encoder + decoder + to_scale_32 + 1, (
        "1: the scale of the discretized logistic"
    )
    layers = [module for module in model.modules() if isinstance(module, SDNLayer)]
    assert len(layers) == bool(C)
    for layer in layers:
        assert [sweep.direction for sweep in layer.sdn_correction_stage] == [0]
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.05) for weight in weights)
    assert not [name for name, _ in model.named_parameters() if "parametrizations" in name], (
        "no weight norm"
    )


@pytest.mark.parametrize(
    "changes", [{}, dict(sdn_nfeat=6), dict(obs_model="DML", mix_components=2), dict(nbits=5)]
)
def test_shapes_fit_and_every_parameter_learns(changes):
    model = model_of(**changes)
    output = model(data_of(model, 3))
    assert output.rates.shape == (3, 4) and output.distortion.shape == (3,)
    assert output.params.shape == (3, model.observation.param_channels, 64, 64)
    (z,) = output.latents
    assert z.shape == (3, 4)
    torch.testing.assert_close(output.elbo, -output.distortion - output.rates.sum(1))
    (-output.elbo.mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_closed_form_is_the_mean_of_the_one_sample_estimate():
    model = model_of()
    q_params = torch.tensor([[0.5, -1.0, 0.0, 2.0, -1.0, 0.5, 0.0, -2.0]])  # means, log-variances
    exact = model.top_down(1, posterior=[q_params])[1]
    normal = torch.distributions.Normal(q_params[:, :4], torch.exp(0.5 * q_params[:, 4:]))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(exact, expected)
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        many = model.top_down(
            4000, posterior=[q_params.expand(4000, -1)], noise=[noise], one_sample_kl=True
        )[1]
    error = (many.mean(0) - expected[0]).abs()
    assert (error < 4 * many.std(0) / 4000**0.5 + 1e-6).all()


def test_noise_makes_a_pass_reproducible_and_decoding_inverts_it():
    model = model_of(sdn_nfeat=6).eval()
    x = data_of(model, 2)
    noise = [torch.randn(2, 4)]
    with torch.no_grad():
        first, second = model(x, noise), model(x, noise)
        assert torch.equal(first.params, second.params)
        torch.testing.assert_close(model.decode(first.latents), first.params)
        mean = model.represent(x)
        torch.testing.assert_close(model(x, [torch.zeros(2, 4)]).latents[0], mean)


def test_samples_follow_the_temperature():
    model = model_of().eval()
    noise = [torch.randn(3, 4)]
    with torch.no_grad():
        _, (z,) = model.sample(3, temperature=0.5, noise=noise)
        torch.testing.assert_close(z, 0.5 * noise[0])
        params, (given,) = model.sample(3, latents=[z])
        assert torch.equal(given, z)
        torch.testing.assert_close(params, model.decode([z]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(image_size=32), "for images of 64x64, got 32x32"),
        (dict(image_size=(64, 48)), "for images of 64x64, got 64x48"),
        (dict(z_size=0), "z_size must be at least 1, got 0"),
        (dict(obs_model="Bernoulli"), "obs_model must be one of DML, DL"),
        (dict(sdn_nfeat=4, sdn_dirs=[4]), "dirs"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        DisentanglementVAE(**arguments)


def test_images_of_another_size_are_refused():
    model = model_of()
    with pytest.raises(
        ValueError, match=r"images must be \[batch, 3, 64, 64\], got \[2, 3, 32, 32\]"
    ):
        model(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("obs_model", ["DML", "DL"])
def test_grey_scenes(obs_model):
    model = DisentanglementVAE(channels=1, obs_model=obs_model)
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    output = model(model.observation.encode(images))
    output.elbo.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    drawn = model.observation.sample(model.sample(3)[0])
    assert drawn.shape == (3, 1, 64, 64)
