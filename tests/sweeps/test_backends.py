"""The sweep's backends against each other, and how they live in autograd."""

import pytest
import torch

from lib.nn import BORDERS, ResSDNLayer, SDNLayer, Sweep, correct_lines
from lib.sweeps import torch_backend

BACKENDS = ["reference", "torch", "lines"]
SHAPES = [(2, 3, 5, 4), (1, 2, 3, 7), (3, 4, 1, 6), (2, 3, 6, 1), (1, 1, 1, 1)]


def run(layer, x, weight, **autocast):
    """Output and all gradients, by name, of sum(output * weight)."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        output = layer(x)
    (output * weight).sum().backward()
    gradients = {
        f"grad {name}": torch.zeros_like(parameter)
        if parameter.grad is None
        else parameter.grad.clone()
        for name, parameter in layer.named_parameters()
    }
    return {"output": output.detach(), "grad input": x.grad} | gradients


def assert_near(computed, expected, tolerance):
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert computed[name].isfinite().all(), name
        difference = (computed[name].double() - value.double()).norm()
        assert difference <= tolerance * value.double().norm() + 1e-30, (
            f"{name}: {difference / value.norm():.1e}"
        )


def twin(layer_class, *arguments, **keywords):
    """The same layer with each backend."""
    reference = layer_class(*arguments, **keywords, backend="reference")
    fast = layer_class(*arguments, **keywords, backend="torch")
    fast.load_state_dict(reference.state_dict())
    return reference, fast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dirs", [[0], [1], [2], [3], [2, 2, 1]], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 2, 1, 3), (1, 1, 3, 1)], ids=str)
def test_gradcheck(shape, dirs, border, backend):
    torch.manual_seed(0)
    layer = SDNLayer(shape[1], 2, 3, dirs, border=border, backend=backend).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 3e-6)], ids=str
)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dirs", [[0], [1], [2], [3], [1, 1], [0, 2, 3, 1, 0]], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference(shape, dirs, border, dtype, tolerance):
    torch.manual_seed(0)
    reference, fast = (
        layer.to(dtype) for layer in twin(SDNLayer, shape[1], 3, 5, dirs, border=border)
    )
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[0], 3, *shape[2:], dtype=dtype)
    expected = run(reference.double(), x.double(), weight.double())
    assert_near(run(fast, x, weight), expected, tolerance)


@pytest.mark.parametrize("block_rows", [1, 8, 10, 16, 10**6])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dirs", [[0], [1], [2], [3]], ids=str)
def test_blocks_of_any_length(monkeypatch, dirs, border, block_rows):
    """Lines are 2 * 4 or 2 * 5 rows long here: blocks of one line, of some, of all, and an
    incomplete last one."""
    monkeypatch.setattr("lib.sweeps.torch_backend.BLOCK_ROWS_CPU", block_rows)
    torch.manual_seed(0)
    reference, fast = (layer.double() for layer in twin(SDNLayer, 3, 3, 4, dirs, border=border))
    x, weight = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64).unbind()
    assert_near(run(fast, x, weight), run(reference, x, weight), 1e-13)


def layouts():
    x = torch.randn(4, 6, 5, 7)
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", torch.randn(4, 6, 7, 5).transpose(2, 3)
    yield "every second", torch.randn(4, 12, 10, 14)[:, ::2, ::2, ::2]
    yield "expanded batch", torch.randn(1, 6, 5, 7).expand(4, 6, 5, 7)
    yield "expanded channels", torch.randn(4, 1, 5, 7).expand(4, 6, 5, 7)
    yield "flipped axes", torch.randn(7, 5, 6, 4).permute(3, 2, 1, 0)


@pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
@pytest.mark.parametrize("layout", range(6))
def test_any_memory_layout(layout, layer_class):
    """In float32 the fast backend errs by no more than twice what the reference does, and by a few
    units of rounding more: sums of the gradients of biases cancel, so that a bound on their
    relative error would depend on the numbers that are drawn."""
    torch.manual_seed(0)
    name, x = list(layouts())[layout]
    reference, fast = twin(layer_class, 6, 3, 5, [0, 3, 1, 2])
    weight = torch.randn(4, 3, 5, 7)
    rounded = run(reference, x, weight)
    exact = run(reference.double(), x.contiguous().double(), weight.double())
    computed = run(fast, x, weight)
    for key, value in exact.items():
        error, usual = ((each[key].double() - value).norm() for each in (computed, rounded))
        assert error <= 2 * usual + 2e-6 * value.norm(), f"{key}: {error / value.norm():.1e}"
    assert_near(
        run(fast, x, torch.ones(1).expand(4, 3, 5, 7)),
        run(fast, x.contiguous(), torch.ones(4, 3, 5, 7)),
        3e-6,
    )


@pytest.mark.parametrize("direction", range(4))
@pytest.mark.parametrize("layout", range(6))
def test_sweep_alone_in_any_memory_layout(layout, direction):
    torch.manual_seed(0)
    name, x = list(layouts())[layout]
    reference, fast = twin(Sweep, 6, direction)
    weight = torch.randn(4, 6, 5, 7)
    assert_near(
        run(fast, x, weight),
        run(reference.double(), x.contiguous().double(), weight.double()),
        3e-6,
    )


@pytest.mark.parametrize("autocast", [{}, dict(dtype=torch.bfloat16)], ids=["float32", "autocast"])
@pytest.mark.parametrize("direction", range(4))
def test_neighbours_gathered_for_one_product(direction, autocast, monkeypatch):
    """What the `torch` backend does on a GPU."""
    torch.manual_seed(0)
    reference, fast = twin(Sweep, 6, direction)
    x, weight = torch.tanh(torch.randn(3, 6, 5, 4)), torch.randn(3, 6, 5, 4)
    usual = run(fast, x, weight, **autocast)
    monkeypatch.setattr(torch_backend, "_by_parts", lambda lines: False)
    monkeypatch.setattr(torch_backend, "BLOCK_ROWS_CPU", 24)  # two lines
    computed = run(fast, x, weight, **autocast)
    # In bfloat16 sums of rounded products differ by a unit or two of rounding.
    assert_near(computed, usual, 2**-7 if autocast else 1e-6)
    assert_near(
        computed, run(reference.double(), x.double(), weight.double()), 2**-6 if autocast else 3e-6
    )


@pytest.mark.parametrize("low_features", [False, True], ids=["float32 features", "low features"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("direction", range(4))
def test_autocast(direction, border, dtype, backend, low_features):
    """Rounding the input and the parameters to the format, once, moves the float64 result by some
    distance: that much is unavoidable. Autocast rounds the operands of every line again, and the
    products too: four times that much, and a unit of rounding more, is allowed. A state or an
    accumulator in the low precision would exceed it (below). Features that come in the low
    precision, from a convolution, leave in it."""
    torch.manual_seed(0)
    sweep = Sweep(16, direction, border=border, backend=backend)
    exact = Sweep(16, direction, border=border, backend="reference").double()
    x, weight = torch.tanh(torch.randn(4, 16, 12, 9)), torch.randn(4, 16, 12, 9)

    def rounded(tensor):
        return tensor.to(dtype).double()

    exact.load_state_dict({name: rounded(value) for name, value in sweep.state_dict().items()})
    moved = run(exact, rounded(x), weight.double())
    exact.load_state_dict(sweep.state_dict())
    expected = run(exact, x.double(), weight.double())
    computed = run(sweep, x.to(dtype) if low_features else x, weight, dtype=dtype)
    assert list(computed) == list(expected)
    for name, value in expected.items():
        of_features = name in ("output", "grad input")
        assert computed[name].dtype == (dtype if low_features and of_features else torch.float32), (
            name
        )
        assert computed[name].isfinite().all(), name
        unavoidable = (moved[name] - value).norm() / value.norm()
        error = (computed[name].double() - value).norm() / value.norm()
        assert error <= 4 * unavoidable + torch.finfo(dtype).eps, (
            f"{name}: {error:.1e}, {unavoidable:.1e}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_not_rounded_under_autocast(backend):
    """With z near 1 a line passes unchanged: to float32 precision, since nothing but products is in
    low precision."""
    sweep = Sweep(8, 2, backend=backend)
    with torch.no_grad():
        sweep.cell.gru.bias_ih[8:16] = 40.0
    x = torch.randn(2, 8, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sweep(x), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_layers_under_autocast(layer_class, backend):
    torch.manual_seed(0)
    layer = layer_class(3, 4, 8, [0, 1, 2, 3], 3, 1, 1, backend=backend)
    x, weight = torch.randn(2, 3, 9, 6), torch.randn(2, 4, 9, 6)
    expected = run(layer, x, weight)
    computed = run(layer, x, weight, dtype=torch.bfloat16)
    assert computed["output"].dtype == torch.bfloat16
    # Six operations in a row, each with two rounded operands and a rounded result of relative error
    # 2^-9 at most.
    assert_near(computed, expected, 6 * 3 * 2**-9)


def test_low_precision_parameters_without_autocast():
    torch.manual_seed(0)
    reference, fast = (layer.bfloat16() for layer in twin(Sweep, 8, 1))
    x, weight = torch.randn(2, 2, 8, 5, 6).unbind()
    computed = run(fast, x.bfloat16(), weight.bfloat16())
    assert all(value.dtype == torch.bfloat16 for value in computed.values())
    # State and gates are rounded too: 6 lines, each with three rounded results of relative error
    # 2^-9 at most.
    assert_near(computed, run(reference.double(), x.double(), weight.double()), 6 * 3 * 2**-9)


def test_no_uninitialised_memory_is_read(monkeypatch):
    torch.manual_seed(0)
    layer = SDNLayer(3, 4, 5, [0, 1, 2, 3])
    keeping = SDNLayer(3, 4, 5, [0, 1, 2, 3], border="keep")
    x, weight = torch.randn(2, 3, 5, 4), torch.randn(2, 4, 5, 4)
    expected = [run(each, x, weight) for each in (layer, keeping)]
    poisoned = []

    def poison(original):
        def allocate(*arguments, **keywords):
            tensor = original(*arguments, **keywords)
            if tensor.is_floating_point():
                poisoned.append(tensor.shape)
                tensor.fill_(float("nan"))
            return tensor

        return allocate

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    computed = [run(each, x, weight) for each in (layer, keeping)]
    assert len(poisoned) >= 2 * 4 * 3
    for one, other in zip(computed, expected, strict=True):
        assert_near(one, other, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dirs", [[0, 1], [2, 3]], ids=str)
def test_empty_batch(dirs, backend):
    layer = SDNLayer(3, 4, 5, dirs, backend=backend)
    x = torch.randn(0, 3, 6, 7, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 4, 6, 7)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_with_retained_graph(backend):
    torch.manual_seed(0)
    layer = SDNLayer(2, 3, 4, [0, 2], backend=backend)
    inputs = (torch.randn(2, 2, 5, 4, requires_grad=True), *layer.parameters())
    y = layer(inputs[0]).square().sum()
    once = torch.autograd.grad(y, inputs, retain_graph=True)
    again = torch.autograd.grad(y, inputs)
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modify", ["add_", "relu_", "zero_", "mul_"])
@pytest.mark.parametrize("direction", [0, 3])
def test_output_modified_in_place(direction, modify, backend):
    """Either autograd refuses, or the gradients are those of the out-of-place operation; never
    wrong ones."""
    torch.manual_seed(0)
    sweep = Sweep(3, direction, backend=backend).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    arguments = (2.0,) if modify in ("add_", "mul_") else ()

    leaf = x.clone().requires_grad_()
    (getattr(sweep(leaf).clone(), modify)(*arguments) * x).sum().backward()
    expected = leaf.grad

    leaf = x.clone().requires_grad_()
    try:
        (getattr(sweep(leaf), modify)(*arguments) * x).sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "is a view" in str(error)
    else:
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_modified_in_place(backend):
    """The features before the sweep are needed by its gradient."""
    sweep = Sweep(3, 2, backend=backend)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    features = x * 1
    y = sweep(features)
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified (by an )?in-?place"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_and_plain_inputs(backend):
    torch.manual_seed(0)
    layer = SDNLayer(2, 3, 4, [0, 2, 3], backend=backend)
    x, weight = torch.randn(2, 2, 5, 4), torch.randn(2, 3, 5, 4)
    expected = run(layer, x, weight)

    layer.zero_grad()
    (layer(x) * weight).sum().backward()  # the input needs no gradient
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"grad {name}"])

    layer.zero_grad()
    frozen = layer.sdn_correction_stage[1].requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (layer(leaf) * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, expected["grad input"])
    assert all(parameter.grad is None for parameter in frozen.parameters())

    layer.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (layer(leaf) * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, expected["grad input"])
    assert not layer(x).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(backend, mode):
    layer = ResSDNLayer(2, 3, 4, [0, 1, 2, 3], backend=backend)
    x = torch.randn(2, 2, 5, 4)
    expected = layer(x)
    with mode():
        y = layer(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
def test_every_parameter_receives_a_gradient(border, backend):
    torch.manual_seed(0)
    layer = SDNLayer(2, 3, 4, [0, 1, 2, 3], border=border, backend=backend)
    gradients = run(layer, torch.randn(2, 2, 5, 4), torch.randn(2, 3, 5, 4))
    assert all(gradient.norm() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_line(backend):
    """A single line has no previous one: with "zeros" it equals a GRU cell on zeros, with "keep" it
    stays."""
    torch.manual_seed(0)
    lines = torch.randn(1, 5, 2, 3)
    cell = torch.nn.GRUCell(9, 3)
    parameters = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    corrected = correct_lines(lines, *parameters, reverse=False, keep_first=False, backend=backend)
    torch.testing.assert_close(corrected.view(-1, 3), cell(torch.zeros(10, 9), lines.view(-1, 3)))
    kept = correct_lines(lines, *parameters, reverse=True, keep_first=True, backend=backend)
    assert torch.equal(kept, lines)
