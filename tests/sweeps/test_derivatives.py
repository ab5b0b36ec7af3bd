"""Derivatives of every kind through a layer are those of the reference, or are refused."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import prune

from lib.nn import ResSDNLayer, SDNLayer

FAST = ["torch", "lines", "auto"]


def pair(layer_class, backend):
    """A layer and its twin with the reference's loop, in float64, and an input."""
    torch.manual_seed(0)
    layer = layer_class(2, 3, 2, [0, 3], backend=backend).double()
    reference = layer_class(2, 3, 2, [0, 3], backend="reference").double()
    reference.load_state_dict(layer.state_dict())
    return layer, reference, torch.randn(2, 2, 3, 4, dtype=torch.float64)


every_layer = pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
every_backend = pytest.mark.parametrize("backend", FAST)


def compiled(function):
    """In one graph, which is made anew each time."""
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def squared(layer):
    return lambda x: layer(x).square().sum()


def parameters_and_loss(layer, x):
    """The layer's parameters, and a function of them and of one image."""
    parameters = {name: each.detach() for name, each in layer.named_parameters()}

    def loss(parameters, image):
        return functional_call(layer, parameters, (image[None],)).square().sum()

    return parameters, loss


WAYS = {
    "grad": lambda layer, x: torch.func.grad(squared(layer))(x),
    "vjp": lambda layer, x: torch.func.vjp(layer, x)[1](torch.ones_like(layer(x)))[0],
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (torch.cos(x),))[1],
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer)(x),
    "hessian": lambda layer, x: torch.func.hessian(squared(layer))(x),
    "vmap": lambda layer, x: torch.vmap(layer)(torch.stack([x, 2 * x, x - 1])),
    "vmap in another dimension": lambda layer, x: torch.vmap(layer, 3, 2)(
        torch.stack([x, 2 * x], dim=3)
    ),
    "grad of grad": lambda layer, x: torch.func.grad(
        lambda y: torch.func.grad(squared(layer))(y).square().sum()
    )(x),
    "functional.jvp": lambda layer, x: torch.autograd.functional.jvp(layer, x, torch.cos(x))[1],
    "functional.hvp": lambda layer, x: torch.autograd.functional.hvp(
        squared(layer), x, torch.cos(x)
    )[1],
    "functional.hessian": lambda layer, x: torch.autograd.functional.hessian(squared(layer), x),
    "functional.jacobian": lambda layer, x: torch.autograd.functional.jacobian(layer, x),
    "functional.jacobian, vectorized": lambda layer, x: torch.autograd.functional.jacobian(
        layer, x, vectorize=True
    ),
    "functional.jacobian, forward": lambda layer, x: torch.autograd.functional.jacobian(
        layer, x, vectorize=True, strategy="forward-mode"
    ),
    "functional.vhp": lambda layer, x: torch.autograd.functional.vhp(
        squared(layer), x, torch.cos(x)
    )[1],
    "forward over reverse": lambda layer, x: torch.func.jvp(
        torch.func.grad(squared(layer)), (x,), (torch.cos(x),)
    )[1],
    "reverse over forward": lambda layer, x: torch.func.grad(
        lambda y: torch.func.jvp(layer, (y,), (torch.cos(x),))[1].square().sum()
    )(x),
    "compiled gradient": lambda layer, x: compiled(torch.func.grad(squared(layer)))(x),
    "compiled jvp": lambda layer, x: compiled(
        lambda y: torch.func.jvp(layer, (y,), (torch.cos(x),))[1]
    )(x),
    "compiled hessian": lambda layer, x: compiled(torch.func.hessian(squared(layer)))(x[:1]),
    "compiled vmap": lambda layer, x: compiled(torch.vmap(lambda y: layer(y)))(
        torch.stack([x, 2 * x])
    ),
    "jvp of a compiled layer": lambda layer, x: torch.func.jvp(
        torch.compile(layer, backend="aot_eager"), (x,), (torch.cos(x),)
    )[1],
}


@every_layer
@every_backend
@pytest.mark.parametrize("way", WAYS)
def test_transforms_of_the_input(layer_class, backend, way):
    layer, reference, x = pair(layer_class, backend)
    torch.testing.assert_close(WAYS[way](layer, x), WAYS[way](reference, x))


@every_layer
@every_backend
def test_gradients_of_single_images_and_stacked_weights(layer_class, backend):
    layer, reference, x = pair(layer_class, backend)
    parameters, loss = parameters_and_loss(layer, x)
    _, expected_loss = parameters_and_loss(reference, x)
    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = [torch.func.grad(expected_loss)(parameters, image) for image in x]
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in expected]))
    stacked = {name: torch.stack([each, 2 * each]) for name, each in parameters.items()}
    torch.testing.assert_close(
        torch.vmap(loss, (0, None))(stacked, x[0]),
        torch.stack([expected_loss({n: v[i] for n, v in stacked.items()}, x[0]) for i in (0, 1)]),
    )


@every_layer
@every_backend
def test_forward_mode(layer_class, backend):
    layer, reference, x = pair(layer_class, backend)
    tangents = []
    for each in (layer, reference):
        with forward_ad.dual_level():
            y = each(forward_ad.make_dual(x, torch.cos(x)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),), check_forward_ad=True)


@every_layer
@every_backend
def test_forward_mode_through_a_backward_pass(layer_class, backend):
    """The tangent comes with the gradient of the output, after a forward pass without one."""
    layer, reference, x = pair(layer_class, backend)
    found = []
    for each in (layer, reference):
        leaf = x.clone().requires_grad_()
        y = each(leaf)

        def backward(weight, y=y, leaf=leaf):
            return torch.autograd.grad(y, leaf, weight, retain_graph=True)[0]

        weight, tangent = torch.ones_like(y), torch.cos(y.detach())
        with forward_ad.dual_level():
            gradient = backward(forward_ad.make_dual(weight, tangent))
            assert not gradient.requires_grad
            found.append([forward_ad.unpack_dual(gradient).tangent])
        found[-1].append(torch.func.jvp(backward, (weight,), (tangent,))[1])
        found[-1].append(backward(tangent))  # a gradient is linear in that of the output
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found[0][0], found[0][2])


@every_layer
@every_backend
def test_complex_numbers(layer_class, backend):
    layer, reference, x = pair(layer_class, backend)
    found = []
    for each in (layer, reference):
        leaf = torch.complex(x, torch.sin(x)).requires_grad_()
        y = each.to(torch.complex128)(leaf)
        loss = (y * torch.arange(y.numel()).view_as(y)).abs().square().sum()
        found.append([y, *torch.autograd.grad(loss, [leaf, *each.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_derivatives_under_autocast(backend, dtype):
    """They err by no more than twice what the reference's do, and by a unit of rounding more."""

    def derivatives(layer, x, **autocast):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", enabled=bool(autocast), **autocast):
            y = layer(leaf)
        (gradient,) = torch.autograd.grad(y.to(x.dtype).sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    layer, reference, x = pair(SDNLayer, backend)
    exact = derivatives(reference, x)
    found, usual = (
        (derivatives(each.float(), x.float(), dtype=dtype) - exact).norm() / exact.norm()
        for each in (layer, reference)
    )
    assert found <= 2 * usual + torch.finfo(dtype).eps, (found, usual)


@every_layer
@every_backend
def test_second_derivatives(layer_class, backend):
    """As a penalty on gradients asks for them: of the gradient's norm, with respect to parameters
    and input."""
    layer, reference, x = pair(layer_class, backend)
    found = []
    for each in (layer, reference):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(each(leaf).sum(), leaf, create_graph=True)
        penalty = gradient.square().sum()
        found.append(torch.autograd.grad(penalty, [leaf, *each.parameters()], allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    assert torch.autograd.gradgradcheck(layer, (x.requires_grad_(),), fast_mode=True)


@every_backend
def test_many_output_gradients_at_once(backend):
    layer, reference, x = pair(SDNLayer, backend)
    found = []
    for each in (layer, reference):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        many = torch.stack([torch.ones_like(y), torch.cos(y.detach())])
        found += torch.autograd.grad(y, leaf, many, is_grads_batched=True)
    torch.testing.assert_close(*found)


def test_second_derivatives_of_a_compiled_layer_are_refused():
    layer, _, x = pair(SDNLayer, "torch")
    torch._dynamo.reset()
    leaf = x.clone().requires_grad_()
    y = torch.compile(layer, backend="aot_eager")(leaf)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_a_gradient_without_a_graph_is_not_differentiated():
    layer, _, x = pair(SDNLayer, "torch")
    leaf = x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    assert not gradient.requires_grad


@pytest.mark.parametrize("how", ["spectral_norm", "weight_norm", "prune"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_on_a_cell_run(how):
    """Hooks that compute a weight before each forward pass of the GRU cell."""
    layer = SDNLayer(2, 2, 4, [0])
    cell = layer.sdn_correction_stage[0].cell.gru
    x = torch.randn(1, 2, 3, 3)
    before = layer(x)
    if how == "prune":
        prune.random_unstructured(cell, "weight_hh", 0.5)
        original = cell.weight_hh_orig
    else:
        getattr(nn.utils, how)(cell, "weight_hh")
        original = cell.weight_hh_v if how == "weight_norm" else cell.weight_hh_orig
    layer(x).sum().backward()
    assert original.grad.norm() > 0
    if how == "weight_norm":
        torch.testing.assert_close(layer(x), before)
        with torch.no_grad():
            cell.weight_hh_g.mul_(2)
    assert (layer(x) - before).abs().max() > 1e-6


def test_parametrizations_work():
    torch.manual_seed(0)
    layer, reference = (SDNLayer(2, 2, 4, [0, 3], backend=b) for b in ("torch", "reference"))
    reference.load_state_dict(layer.state_dict())
    for each in (layer, reference):
        torch.manual_seed(1)  # of the first power iteration
        nn.utils.parametrizations.spectral_norm(each.sdn_correction_stage[0].cell.gru, "weight_ih")
        each.eval()
    x = torch.randn(2, 2, 5, 4)
    torch.testing.assert_close(layer(x), reference(x))
    layer(x).sum().backward()
    name = "sdn_correction_stage.0.cell.gru.parametrizations.weight_ih.original"
    assert dict(layer.named_parameters())[name].grad.norm() > 0
