"""Samples, interpolations and neighbourhoods: what must be equal is, and what must differ does."""

from __future__ import annotations

import pytest
import torch
from helpers import SMALL_SDN

from lib.DensityVAE import DensityVAE
from lib.synthesis import encode, interpolate, neighborhood, reconstruct, sample_images

DEPTH = SMALL_SDN["depth"]


@pytest.fixture(scope="module")
def model() -> DensityVAE:
    """A small model whose prior depends on the layers above, so that what is drawn shows."""
    torch.manual_seed(0)
    model = DensityVAE((8, 12), **SMALL_SDN).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model.h.normal_()
    return model


@pytest.fixture(scope="module")
def images(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, *model.image_shape), dtype=torch.uint8, generator=generator)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to one level, which another batch size may round differently."""
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1


@pytest.mark.parametrize("output", ["most_probable", "sample"])
def test_samples_are_reproducible_and_do_not_depend_on_the_batch_size(model, output):
    draw = dict(temperature=0.9, seed=3, output=output)
    samples = sample_images(model, 6, batch=6, **draw)
    assert samples.dtype == torch.uint8 and samples.shape == (6, 3, 8, 12)
    assert torch.equal(samples, sample_images(model, 6, batch=6, **draw))
    assert close(samples, sample_images(model, 6, batch=4, **draw))
    assert close(samples[:2], sample_images(model, 2, batch=1, **draw)), (
        "fewer samples are the first ones"
    )
    assert not close(samples, sample_images(model, 6, batch=6, **draw | dict(seed=4)))
    assert not close(samples, sample_images(model, 6, batch=6, **draw | dict(temperature=0.2)))


def test_reconstructions_are_decoded_encodings_and_depend_on_the_index(model, images):
    latents = encode(model, images, [5, 9], seed=2, batch=1)
    assert [tuple(z.shape) for z in latents] == [(2, *shape) for shape in model.latent_shapes]
    observation = model.observation
    with torch.no_grad():
        decoded = observation.to_uint8(observation.most_probable(model.decode(latents)))
    assert close(decoded, reconstruct(model, images, seed=2, batch=2, indices=[5, 9]))
    assert not close(decoded, reconstruct(model, images, seed=2, batch=2))
    assert close(
        reconstruct(model, images, seed=2, batch=1), reconstruct(model, images, seed=2, batch=2)
    )


def test_an_interpolation_of_all_layers_leads_from_one_reconstruction_to_the_other(model, images):
    latents = encode(model, images, [0, 1], seed=2, batch=2)
    ends = [[z[i : i + 1] for z in latents] for i in (0, 1)]
    every = dict(layers=DEPTH, temperature=1.0, frames=5, seed=2)
    frames = interpolate(model, *ends, batch=5, **every)
    reconstructions = reconstruct(model, images, seed=2, batch=2)
    assert close(frames[[0, -1]], reconstructions) and not close(frames[:1], frames[-1:])
    with torch.no_grad():
        middle = model.decode([(a + b) / 2 for a, b in zip(*ends, strict=True)])
        middle = model.observation.to_uint8(model.observation.most_probable(middle))
    assert close(frames[2:3], middle)
    assert close(frames, interpolate(model, *ends, batch=2, **every))


def test_an_interpolation_of_some_layers_changes_with_these_alone(model, images):
    latents = encode(model, images, [0, 1], seed=2, batch=2)
    ends = [[z[i : i + 1] for z in latents] for i in (0, 1)]
    some = dict(layers=1, frames=3, batch=3)
    still = interpolate(model, ends[0], ends[0], temperature=1.0, seed=2, **some)
    assert close(still[:1], still[1:2]) and close(still[:1], still[2:]), (
        "the layers below have the same noise"
    )
    moving = interpolate(model, *ends, temperature=1.0, seed=2, **some)
    assert close(moving[0], still[0]) and not close(moving[0], moving[2])
    changed = [ends[1][0], *ends[0][1:]]
    assert close(moving, interpolate(model, ends[0], changed, temperature=1.0, seed=2, **some)), (
        "lower ones unused"
    )
    assert not close(moving, interpolate(model, *ends, temperature=1.0, seed=3, **some))
    at_zero = [interpolate(model, *ends, temperature=0.0, seed=seed, **some) for seed in (2, 3)]
    assert torch.equal(*at_zero)


def test_a_neighborhood_keeps_the_top_layers_and_draws_the_others(model, images):
    latents = encode(model, images[:1], [7], seed=2, batch=1)
    around = dict(index=7, layers=1, temperature=1.0, count=8, seed=2)
    drawn = neighborhood(model, latents, batch=8, **around)
    assert close(drawn, neighborhood(model, latents, batch=3, **around))
    assert not any(close(drawn[i], drawn[j]) for i in range(8) for j in range(i))
    assert close(drawn[:4], neighborhood(model, latents, batch=8, **around | dict(count=4)))
    for change in (dict(index=8), dict(seed=3)):
        assert not close(drawn, neighborhood(model, latents, batch=8, **around | change))
    everything = neighborhood(model, latents, batch=8, **around | dict(layers=DEPTH))
    centre = reconstruct(model, images[:1], seed=2, batch=1, indices=[7])
    assert close(everything, centre.expand(8, -1, -1, -1))
    cold = neighborhood(model, latents, batch=8, **around | dict(temperature=0.0))
    assert close(cold, cold[:1].expand(8, -1, -1, -1))


@pytest.mark.parametrize("layers", [0, DEPTH + 1])
def test_layers_that_a_model_lacks_are_refused(model, images, layers):
    latents = encode(model, images[:1], [0], seed=0, batch=1)
    common = dict(layers=layers, temperature=1.0, seed=0, batch=1)
    with pytest.raises(ValueError, match=f"layers must be 1 ... {DEPTH}"):
        interpolate(model, latents, latents, frames=2, **common)
    with pytest.raises(ValueError, match=f"layers must be 1 ... {DEPTH}"):
        neighborhood(model, latents, index=0, count=1, **common)
    with pytest.raises(ValueError, match="frames must be at least 2"):
        interpolate(model, latents, latents, frames=1, **common | dict(layers=1))
