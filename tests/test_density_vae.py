"""The density VAE: golden numbers, assembly, generation, and the ELBO of a data set."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from helpers import SMALL, SMALL_SDN

from lib.DensityVAE import DensityVAE
from lib.DensityVAE.blocks import BLOCKS, HALF_SCALE, SAME_SCALE, Highway, choose_block
from lib.evaluation.elbo import negative_elbo
from lib.nn import ResSDNLayer
from lib.training.base import objective
from lib.utils import keyed_noise


def small_model(seed: int = 0, image_size=8, **changes) -> DensityVAE:
    torch.manual_seed(seed)
    return DensityVAE(image_size, **(SMALL_SDN | changes))


def random_images(model: DensityVAE, batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (batch, *model.image_shape), dtype=torch.uint8, generator=generator
    )


VARIANTS = {
    "sdn": {},
    "cnn": dict(sdn_max_scale=0, sdn_nfeat_0=0, sdn_num_dirs=0),
    "gaussian": dict(post_model="IsoGaussian"),
    "analytic": dict(post_model="IsoGaussian", analytic_kl=True),
    "dl": dict(obs_model="DL"),
    "downsample first": dict(downsample_first=True, image_size=16),
    "wide": dict(image_size=(8, 12)),
    "five bits": dict(nbits=5),
    "conv5": dict(block="conv5"),
    "conv3x4, highway": dict(block="conv3x4", highway="on", downsample_first=True, image_size=16),
    "sdn, no highway": dict(highway="off"),
    "one layer": dict(depth=1, ds_list=[]),
    "to scale 1": dict(image_size=4, depth=5, ds_list=[0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_and_shapes_fit(variant):
    model = small_model(**VARIANTS[variant])
    torch.nn.init.normal_(
        model.h
    )  # it starts at zero, and so would the gradients of what follows it
    x = model.observation.encode(random_images(model, 2))
    output = model(x)
    depth = len(model.ladder_layers)
    assert output.distortion.shape == (2,) and output.rates.shape == (2, depth)
    assert [tuple(z.shape) for z in output.latents] == [
        (2, *shape) for shape in model.latent_shapes
    ]
    assert output.params.shape == (2, model.observation.param_channels, *model.image_shape[1:])
    torch.testing.assert_close(output.elbo, -output.distortion - output.rates.sum(1))
    objective(output, free_bits=0.0).backward()
    for name, parameter in model.named_parameters():
        one_position = variant == "to scale 1" and name.split(".")[:2] in [
            ["ladder_layers", i] for i in "1234"
        ]
        if parameter.requires_grad and one_position:
            assert parameter.grad is not None, (
                name
            )  # one position has no neighbours, so some weights are idle
        elif parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert name.startswith(f"ladder_layers.{depth - 1}.up_b"), name


@pytest.mark.parametrize("variant", ["sdn", "downsample first", "wide"])
def test_noise_makes_a_pass_reproducible_and_decode_inverts_it(variant):
    model = small_model(**VARIANTS[variant])
    x = model.observation.encode(random_images(model, 2))
    noise = keyed_noise(model.latent_shapes, 0, range(2))
    first, second = model(x, noise), model(x, noise)
    assert torch.equal(first.params, second.params) and torch.equal(first.rates, second.rates)
    torch.testing.assert_close(model.decode(first.latents), first.params)


@torch.no_grad()
def test_fixed_layers_stay_and_the_others_are_drawn():
    model = small_model()
    _, latents = model.sample(3, generator=torch.Generator().manual_seed(0))
    given = [latents[0], None, latents[2]]
    _, mixed = model.sample(3, generator=torch.Generator().manual_seed(1), latents=given)
    assert torch.equal(mixed[0], latents[0]) and torch.equal(mixed[2], latents[2])
    assert not torch.equal(mixed[1], latents[1])
    again = [model.sample(3, temperature=0.0, latents=given)[0] for _ in range(2)]
    assert torch.equal(*again), "at temperature 0 nothing is random"


@torch.no_grad()
def test_rows_of_a_batch_are_independent():
    model = small_model().double()
    x = model.observation.encode(random_images(model, 3)).double()
    noise = [eps.double() for eps in keyed_noise(model.latent_shapes, 0, range(3))]
    whole = model(x, noise)
    alone = model(x[1:2], [eps[1:2] for eps in noise])
    torch.testing.assert_close(alone.params, whole.params[1:2])
    torch.testing.assert_close(alone.rates, whole.rates[1:2])


def test_sdn_is_placed_featured_and_directed_as_specified():
    model = DensityVAE(
        16, h_size=8, z_size=2, depth=4, ds_list=[1, 2], mix_components=1,
        sdn_min_scale=8, sdn_max_scale=16, sdn_nfeat_0=80, sdn_nfeat_diff=20, sdn_num_dirs=3,
    )  # fmt: skip
    blocks = [block for layer in model.ladder_layers for block in (layer.down_a, layer.down_b)]
    assert [isinstance(block, ResSDNLayer) for block in blocks] == [True] * 6 + [False] * 2
    sdn = [block.sdn for block in [*blocks[:6], model.last_layer[1]]]
    features = [layer.project_in_stage.out_channels for layer in sdn]
    assert features == [80, 80, 80, 80, 60, 60, 80], (
        "drops after the downsampling layer 1; the last layer starts anew"
    )
    directions = [layer.dirs for layer in sdn]
    assert directions == [
        (0, 1, 2),
        (3, 0, 1),
        (2, 3, 0),
        (1, 2, 3),
        (0, 1, 2),
        (3, 0, 1),
        (2, 3, 0, 1),
    ]


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("highway", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_have_the_shapes_and_parameters_of_their_description(kind, highway, upsample):
    """In 5, out 6: a block with a highway has an ungated one with 12 outputs, and the plain
    convolution."""
    kernel, k = (HALF_SCALE, 4) if upsample else (SAME_SCALE, 3)
    made = choose_block(kind, highway, num_features=7, dirs=(0, 2))(
        5, 6, **kernel, upsample=upsample
    )
    size = 8 if upsample else 4
    assert made(torch.randn(2, 5, 4, 4)).shape == (2, 6, size, size)
    out = 12 if highway else 6
    hidden = max(5, out)
    sdn = 5 * 7 * k**2 + 7 + 2 * (3 * 7 * 4 * 7 + 6 * 7) + 7 * out + out
    deeper = lambda number: (  # noqa: E731
        5 * hidden * k**2
        + hidden
        + (number - 2) * (hidden**2 * 9 + hidden)
        + hidden * out * 9
        + out
    )
    own = {
        "sdn": sdn,
        "conv3": 5 * out * k**2 + out,
        "conv5": 5 * out * (k + 2) ** 2 + out,
        "conv3x2": deeper(2),
        "conv3x4": deeper(4),
    }[kind]
    assert count(made) == own + (5 * 6 * k**2 + 6 if highway else 0)


def test_a_highway_gates_with_the_plain_convolution():
    made = choose_block("conv5", highway=True)(4, 4, **SAME_SCALE, upsample=False)
    x = torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        made.block.weight[4:], made.block.bias[4:] = (
            0,
            torch.tensor([30.0, -30.0, 0.0, 0.0]),
        )  # the gates
    y, transform, plain = made(x), made.block(x)[:, :4], made.cnn(x)
    torch.testing.assert_close(y[:, 0], plain[:, 0])
    torch.testing.assert_close(y[:, 1], transform[:, 1])
    torch.testing.assert_close(y[:, 2:], (plain[:, 2:] + transform[:, 2:]) / 2)


def test_blocks_stand_where_the_sdn_layers_would():
    """The lowest ladder layer of two is at a scale that is too large; the last layer too."""
    model = small_model(block="conv5", highway="on", sdn_max_scale=4, depth=2, ds_list=[0])
    assert [isinstance(layer.down_a, Highway) for layer in model.ladder_layers] == [False, True]
    plain, baseline = small_model(block="conv3"), small_model(sdn_max_scale=0)
    assert plain.state_dict().keys() == baseline.state_dict().keys() and count(plain) == count(
        baseline
    )


def test_sdn_features_never_fall_below_fifty_nor_rise():
    for first, expected in ((70, [70, 50]), (30, [30, 30])):
        model = DensityVAE(
            8, h_size=8, z_size=2, depth=2, ds_list=[0], mix_components=1,
            sdn_max_scale=8, sdn_nfeat_0=first, sdn_nfeat_diff=128, sdn_num_dirs=1,
        )  # fmt: skip
        assert [
            layer.down_a.sdn.project_in_stage.out_channels for layer in model.ladder_layers
        ] == expected


def test_free_bits_follow_the_paper():
    class Fixed:
        distortion = torch.tensor([10.0, 20.0])
        rates = torch.tensor([[0.0, 3.0], [0.5, 5.0]])  # means 0.25 and 4

    assert objective(Fixed, free_bits=1.0) == 15 + 1 + 4
    assert objective(Fixed, free_bits=0.0) == 15 + 0.25 + 4


def test_analytic_kl_is_the_expectation_of_the_estimate():
    analytic = small_model(post_model="IsoGaussian", analytic_kl=True, depth=1, ds_list=[])
    sampled = small_model(post_model="IsoGaussian", depth=1, ds_list=[])
    x = analytic.observation.encode(random_images(analytic, 1)).expand(4000, -1, -1, -1)
    with torch.no_grad():
        estimates, exact = sampled(x).rates[:, 0], analytic(x).rates[:, 0]
    assert abs(estimates.mean() - exact[0]) < 4 * estimates.std() / math.sqrt(4000)


def test_evaluation_counts_real_images_once_whatever_the_batch():
    model = small_model()
    images, indices = random_images(model, 5), torch.arange(5)
    whole = [(images, indices)]
    padded = [
        (images[:3], indices[:3]),
        (torch.cat([images[3:], images[:1]]), torch.tensor([3, 4, -1])),
        (images[:1], torch.tensor([-1])),
    ]
    a, b = (negative_elbo(model, batches, seed=0) for batches in (whole, padded))
    assert a["images"] == b["images"] == 5
    assert a["bits_per_dim"] == pytest.approx(b["bits_per_dim"], rel=1e-5)
    assert a["standard_error"] == pytest.approx(b["standard_error"], rel=1e-4)
    assert a["bits_per_dim"] == pytest.approx(a["distortion"] + sum(a["rate_per_layer"]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32_with_likelihoods_in_float32(dtype):
    model = small_model()
    x = model.observation.encode(random_images(model, 2))
    noise = keyed_noise(model.latent_shapes, 0, range(2))
    exact = model(x, noise)
    with torch.autocast("cpu", dtype=dtype):
        output = model(x, noise)
    assert output.distortion.dtype == output.rates.dtype == torch.float32
    torch.testing.assert_close(output.elbo, exact.elbo, rtol=0.02, atol=0)
    objective(output, free_bits=0.0).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(h_size=0), "h_size must be at least 1, got 0"),
        (dict(ds_list=[3]), r"ds_list entries must lie in 0 ... 2 \(depth 3\), got \[3\]"),
        (dict(post_model="Flow"), "post_model must be one of IAF, IsoGaussian, got 'Flow'"),
        (dict(prior_model="IAF"), "prior_model must be one of IsoGaussian, got 'IAF'"),
        (dict(obs_model="MSE"), "obs_model must be one of DML, DL"),
        (dict(sdn_num_dirs=5), "sdn_num_dirs 1 to 4"),
        (dict(sdn_nfeat_0=0), "sdn_nfeat_0 must be at least 1"),
        (dict(block="conv7"), "block must be one of sdn, conv3, .*, got 'conv7'"),
        (dict(highway="maybe"), "highway must be one of auto, on, off, got 'maybe'"),
        (dict(analytic_kl=True), "analytic_kl needs post_model IsoGaussian"),
        (dict(image_size=7), "images of 7x7 cannot be halved 2 times.* divisible by 4"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


def test_wrong_inputs_say_what_is_allowed():
    model = small_model()
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, 8, 8\], got \[1, 3, 9, 9\]"):
        model(torch.zeros(1, 3, 9, 9))
    with pytest.raises(ValueError, match="latents must have one entry for each of the 3 layers"):
        model.sample(1, latents=[None])
    with pytest.raises(ValueError, match=r"noise\[0\] must be \[1, 2, 2, 2\]"):
        model.sample(1, noise=[torch.zeros(1, 2, 3, 3), None, None])


def test_cnn_baseline_needs_no_sdn_arguments():
    assert not any(isinstance(m, ResSDNLayer) for m in DensityVAE(8, **SMALL).modules())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", ["sdn", "analytic", "downsample first"])
def test_checkpointed_activations_change_memory_alone(variant, autocast):
    """Loss and gradients are equal bit for bit, also with noise drawn by the model; what is kept
    shrinks."""
    plain = small_model(**VARIANTS[variant])
    saving = small_model(**VARIANTS[variant], checkpoint_activations=True)
    x = plain.observation.encode(random_images(plain, 2))
    results, kept = [], []
    for model in (plain, saving):
        torch.manual_seed(1)
        numbers = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: numbers.append(t.numel()) or t,  # noqa: B023
            lambda t: t,
        )
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        loss = objective(output, free_bits=0.1)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
        kept.append(sum(numbers))
        with torch.no_grad():
            assert not model(x).distortion.requires_grad
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2, "the likelihood's are left"


@pytest.mark.parametrize("obs_model", ["DML", "DL"])
@pytest.mark.parametrize("downsample_first", [False, True])
@pytest.mark.parametrize(("channels", "image_size"), [(1, (8, 16)), (3, (16, 8)), (1, 8)])
def test_grey_and_oblong_images(channels, image_size, obs_model, downsample_first):
    model = small_model(
        image_size=image_size,
        channels=channels,
        obs_model=obs_model,
        downsample_first=downsample_first,
    )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert model.image_shape == (channels, height, width)
    images = torch.randint(0, 256, (2, channels, height, width), dtype=torch.uint8)
    output = model(model.observation.encode(images))
    objective(output, free_bits=0.0).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    params, _ = model.sample(3)
    drawn = model.observation.to_uint8(model.observation.sample(params))
    assert drawn.shape == (3, channels, height, width) and drawn.dtype == torch.uint8


@pytest.mark.parametrize("size", [(s, t) for s in range(1, 41, 3) for t in (s, 24, 32)])
@pytest.mark.parametrize("ds_list", [[0], [0, 1], [0, 1, 2]])
def test_sizes_that_cannot_be_halved_are_refused_with_those_that_can(size, ds_list):
    try:
        model = small_model(image_size=size, ds_list=ds_list)
    except ValueError as error:
        message = str(error)
    else:
        for (_, h, w), (_, below_h, below_w) in itertools.pairwise(model.latent_shapes):
            assert (below_h, below_w) in ((h, w), (2 * h, 2 * w)), "maps are halved exactly"
        return
    assert message.startswith(
        f"images of {size[0]}x{size[1]} cannot be halved {len(ds_list)} times"
    )
    factor = int(re.search(r"height and width are divisible by (\d+)$", message)[1])
    for height, width in ((1, 1), (1, 2), (3, 2)):
        small_model(image_size=(factor * height, factor * width), ds_list=ds_list)
