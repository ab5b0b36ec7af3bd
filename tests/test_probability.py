"""Likelihoods against the authors' numbers and against the properties that make them
distributions."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib import chunks
from lib.probability import (
    DL,
    DML,
    IAF,
    TAILS,
    IsoGaussian,
    gaussian_kl,
    make_observation,
    quantize,
)
from lib.utils import keyed_noise

LAYERS = np.load(GOLDEN / "layers.npz")


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(LAYERS[name])


@pytest.mark.parametrize(("case", "nbits", "mix"), [("dml_8bit", 8, 5), ("dml_5bit", 5, 3)])
def test_dml_golden(case, nbits, mix):
    dml, params = DML(nbits, mix), golden(f"{case}/params").requires_grad_()
    log_prob = dml.log_prob(params, golden(f"{case}/sample"))
    log_prob.sum().backward()
    assert relative_error(log_prob, golden(f"{case}/log_prob")) < 1e-5
    assert relative_error(params.grad, golden(f"{case}/grad_params")) < 5e-4
    assert relative_error(dml.most_probable(params), golden(f"{case}/mean")) < 1e-5
    sharp = dml.log_prob(golden(f"{case}_sharp/params"), golden(f"{case}_sharp/sample"))
    assert relative_error(sharp, golden(f"{case}_sharp/log_prob")) < 1e-5


def golden_iaf() -> IAF:
    iaf = IAF(z_size=4)
    prefix = "iaf/param/"
    iaf.load_state_dict(
        {k.removeprefix(prefix): golden(k) for k in LAYERS.files if k.startswith(prefix)}
    )
    return iaf


def test_iaf_golden():
    z, log_scale = golden_iaf().flow(golden("iaf/z"), golden("iaf/context"))
    assert relative_error(z, golden("iaf/z_out")) < 1e-5
    assert relative_error(log_scale, golden("iaf/log_scale")) < 1e-5


def iaf_jacobian(z_size: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """dz/dz0 as [H W Z, H W Z] with positions in raster order outermost, and the claimed
    log-determinant."""
    torch.manual_seed(0)
    iaf = IAF(z_size).double()
    for parameter in iaf.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    context = torch.randn(1, iaf.param_channels - 2 * z_size, height, width, dtype=torch.float64)

    def flow(positions_first: torch.Tensor) -> torch.Tensor:
        z0 = positions_first.permute(2, 0, 1)[None]
        return iaf.flow(z0, context)[0][0].permute(1, 2, 0)

    z0 = torch.randn(height, width, z_size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(flow, z0).reshape(z0.numel(), z0.numel())
    return jacobian, -iaf.flow(z0.permute(2, 0, 1)[None], context)[1].sum()


def test_iaf_is_autoregressive_in_raster_order():
    jacobian, log_det = iaf_jacobian(z_size=2, height=3, width=4)
    blocks = jacobian.view(12, 2, 12, 2)
    for here, there in itertools.product(range(12), range(12)):
        block = blocks[here, :, there, :]
        if there > here:
            assert (block == 0).all(), f"position {here} depends on the later position {there}"
        elif there == here:
            assert (block[~torch.eye(2, dtype=bool)] == 0).all(), (
                "channels of one position depend on each other"
            )
    assert blocks[5, :, 0, :].abs().min() > 0, "the earlier neighbours must matter"
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)


def test_iaf_log_prob_is_the_change_of_variables():
    torch.manual_seed(1)
    iaf = IAF(z_size=2).double()
    params = torch.randn(3, iaf.param_channels, 3, 3, dtype=torch.float64)
    noise = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    z, log_q = iaf.sample(params, noise)
    mean, log_variance, context = params.split([2, 2, params.shape[1] - 4], dim=1)
    z0 = mean + (0.5 * log_variance).exp() * noise
    expected_z, log_scale = iaf.flow(z0, context)
    base = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(z0)
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(log_q, base.flatten(1).sum(1) + log_scale.flatten(1).sum(1))


def test_gaussian_matches_torch_and_temperature_scales():
    torch.manual_seed(2)
    gaussian, params = IsoGaussian(3), torch.randn(2, 6, 2, 2)
    noise = torch.randn(2, 3, 2, 2)
    mean, std = params[:, :3], (0.5 * params[:, 3:]).exp()
    z, log_q = gaussian.sample(params, noise, temperature=0.5)
    torch.testing.assert_close(z, mean + 0.5 * std * noise)
    expected = torch.distributions.Normal(mean, std).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(log_q, expected)
    torch.testing.assert_close(gaussian.log_prob(params, z), expected)


def test_closed_form_kl_matches_torch():
    torch.manual_seed(3)
    q, p = torch.randn(2, 6, 2, 2), torch.randn(2, 6, 2, 2)
    normals = [torch.distributions.Normal(x[:, :3], (0.5 * x[:, 3:]).exp()) for x in (q, p)]
    expected = torch.distributions.kl_divergence(*normals).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(q, p), expected)


def test_dml_sums_to_one_over_all_colour_triples():
    torch.manual_seed(4)
    dml = DML(nbits=2, mix_components=3).double()
    params = torch.randn(1, dml.param_channels, 1, 1, dtype=torch.float64)
    levels = torch.tensor(list(itertools.product(range(4), repeat=3)), dtype=torch.float64)
    x = levels[:, :, None, None] * 2 / 3 - 1
    total = dml.log_prob(params.expand(64, -1, -1, -1), x).exp().sum()
    torch.testing.assert_close(total.item(), 1.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize("log_scale", [0.0, -2.0, -6.0])
@pytest.mark.parametrize("mean", [-0.7, 0.0, 0.123, 0.6])
def test_dl_sums_to_one_over_all_levels(nbits, log_scale, mean):
    dl = DL(nbits).double()
    torch.nn.init.constant_(dl.log_scale, log_scale)
    levels = torch.arange(2**nbits, dtype=torch.uint8)[:, None, None, None] << (8 - nbits)
    x = dl.encode(levels).double()
    params = torch.full_like(x, mean)
    assert dl.log_prob(params, x).isfinite().all()
    torch.testing.assert_close(dl.log_prob(params, x).exp().sum().item(), 1.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["DML", "DL"])
@pytest.mark.parametrize("nbits", range(1, 9))
def test_grey_levels_sum_to_one(name, nbits):
    torch.manual_seed(4)
    observation = make_observation(name, nbits, mix_components=3, channels=1).double()
    levels = (torch.arange(2**nbits) << (8 - nbits)).to(torch.uint8)[:, None, None, None]
    x = observation.encode(levels).double()
    for spread in (0.3, 1.0, 5.0):
        params = spread * torch.randn(1, observation.param_channels, 1, 1, dtype=torch.float64)
        total = observation.log_prob(params.expand(len(x), -1, -1, -1), x).exp().sum()
        # In far tails, where a bin has less than 1e-5, DML takes the density at its middle.
        torch.testing.assert_close(total.item(), 1.0, rtol=0, atol=1e-5 * 2**nbits)


def test_grey_dml_is_a_mixture_of_logistics():
    """Against a sum over components with bins from torch's own logistic distribution function."""
    torch.manual_seed(4)
    dml = DML(nbits=3, mix_components=2, channels=1, tails="exact").double()
    params = torch.randn(5, dml.param_channels, 3, 4, dtype=torch.float64)
    images = torch.randint(0, 256, (5, 1, 3, 4), dtype=torch.uint8)
    x = dml.encode(images).double()
    weights, means, scales = params[:, :2].softmax(1), params[:, 2:4], params[:, 4:6].exp()
    level = (images >> 5).double()
    above = torch.where(level == 7, 1.0, torch.sigmoid((x + dml.half_bin - means) / scales))
    below = torch.where(level == 0, 0.0, torch.sigmoid((x - dml.half_bin - means) / scales))
    expected = (weights * (above - below)).sum(1).log().sum((1, 2))
    torch.testing.assert_close(dml.log_prob(params, x), expected)


def log_bin_of_logistic(level, nbits, mean, log_scale):
    """log P(level) of a discretized logistic with open edges, to 1500 digits."""
    with mpmath.workdps(1500):
        mean, scale = mpmath.mpf(mean), mpmath.exp(mpmath.mpf(log_scale))
        half = mpmath.mpf(1) / (2**nbits - 1)
        x = 2 * half * level - 1

        def below(value):
            return 1 / (1 + mpmath.exp(-(value - mean) / scale))

        low = mpmath.mpf(0) if level == 0 else below(x - half)
        high = mpmath.mpf(1) if level == 2**nbits - 1 else below(x + half)
        return float(mpmath.log(high - low))


@pytest.mark.parametrize("nbits", [1, 5, 8])
def test_exact_tails_of_dml_against_many_digits(nbits):
    """Each level under logistics from a needle to almost flat, whose far tails have 1e-900."""
    dml = DML(nbits, mix_components=1, channels=1, tails="exact").double()
    levels = sorted({0, 1, 2**nbits // 2, 2**nbits - 2, 2**nbits - 1} & {*range(2**nbits)})
    for level, mean, log_scale in itertools.product(
        levels, (-1.0, -0.7, 0.123, 0.9), (-7.0, -5.5, -2.0, 0.0, 9.0, 300.0)
    ):
        params = torch.tensor([0.0, mean, log_scale], dtype=torch.float64).view(1, 3, 1, 1)
        x = torch.full((1, 1, 1, 1), 2 * level / (2**nbits - 1) - 1, dtype=torch.float64)
        expected = log_bin_of_logistic(level, nbits, mean, log_scale)
        assert dml.log_prob(params, x).item() == pytest.approx(expected, rel=1e-11, abs=1e-13)
        # In float32 the position itself is rounded, which a needle feels as 1e-7 * exp(7).
        single = dml.log_prob(params.float(), x.float()).item()
        assert single == pytest.approx(expected, rel=2e-4, abs=1e-3)


def test_the_approximate_tails_of_dml_are_31_nats_too_low_at_5_bits():
    """What the field's form costs, and the exact form beside it: two levels from the mean of a
    needle, and one where both agree."""
    approximate, exact = (DML(5, 1, channels=1, tails=tails).double() for tails in TAILS)
    mean = 2 * 15 / 31 - 1
    for level, error in ((17, -31.0), (15, 0.0)):
        params = torch.tensor([0.0, mean, -7.0], dtype=torch.float64).view(1, 3, 1, 1)
        x = torch.full((1, 1, 1, 1), 2 * level / 31 - 1, dtype=torch.float64)
        expected = log_bin_of_logistic(level, 5, mean, -7.0)
        assert exact.log_prob(params, x).item() == pytest.approx(expected, rel=1e-12)
        found = approximate.log_prob(params, x).item()
        assert found - expected == pytest.approx(error, abs=0.2)


@pytest.mark.parametrize("nbits", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_with_exact_tails_dml_sums_to_one(nbits, channels):
    """Also where the levels are far in the tails; of colour images up to 2 bits, 64 triples."""
    if channels == 3 and nbits > 2:
        pytest.skip("a million colours")
    torch.manual_seed(4)
    dml = DML(nbits, mix_components=3, channels=channels, tails="exact").double()
    levels = torch.arange(2**nbits, dtype=torch.float64) * 2 * dml.half_bin - 1
    x = torch.cartesian_prod(*[levels] * channels).view(-1, channels, 1, 1)
    for spread in (0.3, 1.0, 5.0, 50.0):
        params = spread * torch.randn(1, dml.param_channels, 1, 1, dtype=torch.float64)
        total = dml.log_prob(params.expand(len(x), -1, -1, -1), x).exp().sum()
        torch.testing.assert_close(total.item(), 1.0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_exact_tails(dtype):
    """Finite everywhere, and those of finite differences."""
    torch.manual_seed(9)
    for nbits, scale in itertools.product((1, 5, 8), (1.0, 30.0, 1e3, 1e6)):
        dml = DML(nbits, 2, tails="exact")
        params = (scale * torch.randn(2, dml.param_channels, 4, 4, dtype=dtype)).requires_grad_()
        x = dml.encode(torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)).to(dtype)
        value = dml.log_prob(params, x)
        value.sum().backward()
        assert value.isfinite().all() and params.grad.isfinite().all()
    dml = DML(5, 2, tails="exact")
    params = torch.randn(1, dml.param_channels, 2, 2, dtype=torch.float64).requires_grad_()
    x = dml.encode(torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8)).double()
    assert torch.autograd.gradcheck(lambda params: dml._log_prob(params, x), params)


@pytest.mark.parametrize("nbits", range(1, 9))
def test_dml_data_are_the_quantized_levels(nbits):
    dml = DML(nbits)
    images = torch.arange(256, dtype=torch.uint8)
    x = dml.encode(images)
    assert x.min() == -1 and x.max() == 1
    assert len(x.unique()) == 2**nbits
    expected = torch.floor(images.double() / 2 ** (8 - nbits)) / (2**nbits - 1) * 2 - 1
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-6)
    if nbits == 8:
        assert (dml.to_uint8(x) == images).all()


@pytest.mark.parametrize("name", ["DML", "DL"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("nbits", [1, 3, 8])
def test_samples_follow_the_distribution(name, channels, nbits):
    """Draws lie at the levels, colours are as frequent as they are probable, and the average
    log-probability is minus the entropy, both computed by enumeration."""
    torch.manual_seed(5)
    observation = make_observation(name, nbits, mix_components=2, channels=channels)
    if name == "DL":
        torch.nn.init.constant_(observation.log_scale, -1.5)
    params = 0.7 * torch.randn(1, observation.param_channels, 1, 1)
    many = params.expand(20_000, -1, -1, -1)
    x = observation.sample(many, torch.Generator().manual_seed(0))
    assert x.shape == (20_000, channels, 1, 1)
    levels = observation.encode((torch.arange(2**nbits) << (8 - nbits)).to(torch.uint8))
    distance, level = (x[..., 0] - levels).abs().min(dim=2)  # [20_000, C]
    assert distance.max() < 1e-6
    if nbits == 8 and channels == 3:
        return
    colours = torch.cartesian_prod(*[levels] * channels).view(-1, channels, 1, 1)
    log_prob = observation.log_prob(params.expand(len(colours), -1, -1, -1), colours)
    number = (level * 2 ** (nbits * torch.arange(channels).flip(0))).sum(1)
    drawn = number.bincount(minlength=len(colours)) / len(x)
    assert (drawn - log_prob.exp()).abs().max() < 5 * 0.5 / math.sqrt(len(x))
    entropy = -(log_prob.exp() * log_prob).sum()
    surprise = -observation.log_prob(many, x)
    assert abs(surprise.mean() - entropy) < 5 * surprise.std() / math.sqrt(len(x)) + 1e-3


def test_sampling_is_seeded_and_inside_the_range():
    for name, channels in itertools.product(("DML", "DL"), (1, 3)):
        observation = make_observation(name, 8, 3, channels)
        params = 3 * torch.randn(2, observation.param_channels, 4, 5)
        first, second = (
            observation.sample(params, torch.Generator().manual_seed(7)) for _ in range(2)
        )
        assert (first == second).all()
        for image in (first, observation.most_probable(params)):
            assert image.shape == (2, channels, 4, 5)
            assert observation.to_uint8(image).dtype == torch.uint8
            assert image.abs().max() <= (1 if name == "DML" else 0.5)


@pytest.mark.parametrize("name", ["DML", "DL"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_prob_is_float32_for_narrow_parameters(name, dtype):
    """A 32x32 image's log-probability would overflow or lose all digits in 16 bits."""
    torch.manual_seed(6)
    observation = make_observation(name, 8, 5)
    x = observation.encode(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    params = torch.randn(2, observation.param_channels, 32, 32).to(dtype)
    log_prob = observation.log_prob(params, x)
    assert log_prob.dtype == torch.float32 and log_prob.isfinite().all()
    torch.testing.assert_close(log_prob, observation.log_prob(params.float(), x))


@pytest.mark.parametrize("name", ["DML", "DL"])
def test_gradients_are_finite_at_extremes(name):
    observation = make_observation(name, 8, 2)
    params = (1e3 * torch.randn(2, observation.param_channels, 4, 4)).requires_grad_()
    x = observation.encode(torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8))
    observation.log_prob(params, x).sum().backward()
    assert params.grad.isfinite().all()


def test_wrong_arguments_say_what_is_allowed():
    with pytest.raises(ValueError, match="nbits must be an integer from 1 to 8, got 9"):
        DML(nbits=9)
    with pytest.raises(ValueError, match="mix_components must be at least 1"):
        DML(mix_components=0)
    with pytest.raises(ValueError, match="obs_model must be one of DML, DL, got 'DLM'"):
        make_observation("DLM", 8, 1)
    for observation in (DML, DL):
        with pytest.raises(ValueError, match="channels must be 1 .grey. or 3 .colour., got 2"):
            observation(channels=2)
    with pytest.raises(ValueError, match="images must be uint8"):
        quantize(torch.zeros(1, 3, 2, 2), 8)


def test_masked_entries_receive_no_gradient():
    iaf = IAF(z_size=2)
    z, log_scale = iaf.flow(torch.randn(1, 2, 4, 4), torch.randn(1, iaf.param_channels - 4, 4, 4))
    (z.sum() + log_scale.sum()).backward()
    mask = iaf.arnn.conv_a.mask.expand_as(iaf.arnn.conv_a.weight)
    gradient = iaf.arnn.conv_a.weight.grad
    assert (gradient[mask == 0] == 0).all() and (gradient[mask == 1] != 0).any()


def test_keyed_noise_depends_on_nothing_but_its_keys():
    shapes = [(2, 3, 3), (1, 5, 4)]
    both = keyed_noise(shapes, 1, [4, 9], [0, 3])
    alone = keyed_noise(shapes, 1, [9], [3])
    for layer, shape in enumerate(shapes):
        assert both[layer].shape == (2, *shape)
        assert (both[layer][1] == alone[layer][0]).all()
        assert not torch.allclose(both[layer][0], both[layer][1])
    assert not torch.equal(keyed_noise(shapes, 2, [9], [3])[0], alone[0])
    flat = torch.cat([eps.flatten(1) for eps in keyed_noise([(1000,)], 0, range(100))])
    assert abs(flat.mean()) < 0.02 and abs(flat.std() - 1) < 0.02
    assert F.cosine_similarity(flat[0], flat[1], dim=0).abs() < 0.15


@pytest.mark.parametrize("limit", [1, 30, 170, 500, 10**6])
def test_dml_in_chunks_equals_dml_at_once(monkeypatch, limit):
    """Chunks of one row, of some rows, the last ones incomplete, of some images, of all."""
    monkeypatch.setattr(chunks, "WHOLE", 0)
    monkeypatch.setattr(chunks, "CHUNK_CPU", limit)
    torch.manual_seed(7)
    dml = DML(8, 2)
    params = torch.randn(5, dml.param_channels, 7, 4, dtype=torch.float64, requires_grad=True)
    x = dml.encode(torch.randint(0, 256, (5, 3, 7, 4), dtype=torch.uint8)).double()
    weight = torch.randn(5, dtype=torch.float64)
    expected = dml._log_prob(params, x)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), params)
    computed = dml.log_prob(params, x)
    (gradient,) = torch.autograd.grad((computed * weight).sum(), params)
    torch.testing.assert_close(computed, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(dml.log_prob(params, x), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dml_in_chunks_rounds_gradients_once(monkeypatch, dtype):
    monkeypatch.setattr(chunks, "WHOLE", 0)
    monkeypatch.setattr(chunks, "CHUNK_CPU", 50)
    torch.manual_seed(8)
    dml = DML(8, 2)
    params = torch.randn(2, dml.param_channels, 5, 4).to(dtype).requires_grad_()
    x = dml.encode(torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8))
    scale = 1e-4  # of a gradient that float16 could not hold before the loss is scaled
    (expected,) = torch.autograd.grad((dml._log_prob(params, x) * scale).sum(), params)
    with torch.autocast("cpu", dtype):
        log_prob = dml.log_prob(params, x)
    (gradient,) = torch.autograd.grad((log_prob * scale).sum(), params)
    assert log_prob.dtype == torch.float32 and gradient.dtype == dtype
    assert (
        relative_error(gradient, expected) < 1e-4
    )  # most are equal; vectorized functions differ in the last bit


def test_dml_needs_no_memory_but_a_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "WHOLE", 0)
    monkeypatch.setattr(chunks, "CHUNK_CPU", 1000)
    dml = DML(8, 5)
    params, x = (
        torch.randn(2, dml.param_channels, 32, 32, requires_grad=True),
        torch.zeros(2, 3, 32, 32),
    )
    sizes = []

    class NewTensors(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            leaves = [
                [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
                for tree in (arguments, result)
            ]
            known, given = ([t.untyped_storage().data_ptr() for t in tensors] for tensors in leaves)
            sizes.extend(
                t.numel() for t, place in zip(leaves[1], given, strict=True) if place not in known
            )
            return result

    with NewTensors():
        dml.log_prob(params, x).sum().backward()
    assert len(sizes) > 1000
    # The parameters of a chunk are 10 / 3 of it, the gradient is as large as all parameters.
    assert [size for size in sizes if size > 4 * 1000] == [params.numel()]
