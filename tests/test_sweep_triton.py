"""The Triton kernels against the reference: on a GPU if there is one, else in Triton's interpreter.

The interpreter must be asked for before Triton is imported, which other tests' libraries do. So
without a GPU the tests are skipped in the common process, and `test_in_the_interpreter` runs this
file in one of its own. To run them directly: `TRITON_INTERPRET=1 python -m pytest
tests/test_sweep_triton.py`.
"""

import functools
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch
from test_nn_backends import assert_near

from lib import nn as sdn
from lib.nn import SDNLayer, correct_lines, correct_lines_reference
from lib.sweeps import triton_backend as sweep_triton
from lib.sweeps.triton_backend import _plan, _plan_by_line, available

correct_lines_triton = functools.partial(correct_lines, backend="triton")
UNAVAILABLE = available()
DEVICE = "cpu" if UNAVAILABLE or sweep_triton.INTERPRETED else "cuda"
SIDES = list(itertools.product([False, True], [False, True]))  # reverse, keep_first
# Lines, positions, batch, channels.
SHAPES = [(3, 5, 3, 5), (1, 4, 2, 3), (4, 3, 1, 16), (3, 1, 3, 20), (2, 3, 2, 1), (1, 1, 1, 1)]
# Float32 sums of up to 60 products through up to 4 lines; errors seen are below 4e-7.
TOLERANCE = 3e-6

kernels = pytest.mark.skipif(
    UNAVAILABLE is not None, reason=f"{UNAVAILABLE}; see test_in_the_interpreter"
)


def random_case(shape, seed=0):
    """Lines, the parameters of a GRU cell, and a weight for each result."""
    torch.manual_seed(seed)
    C = shape[-1]
    cell = torch.nn.GRUCell(3 * C, C)
    tensors = (
        torch.tanh(torch.randn(shape)),
        cell.weight_ih,
        cell.weight_hh,
        cell.bias_ih,
        cell.bias_hh,
    )
    return [tensor.detach().to(DEVICE) for tensor in tensors], torch.randn(shape).to(DEVICE)


def run(correct, tensors, weight, reverse=False, keep_first=False, autocast=None):
    """Output and all gradients, by name, of sum(output * weight)."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        output = correct(*leaves, reverse=reverse, keep_first=keep_first)
    (output * weight).sum().backward()
    names = ("lines", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return {"output": output.detach()} | {
        f"grad {name}": g for name, g in zip(names, gradients, strict=True)
    }


def exact(tensors, weight, *arguments):
    return run(
        correct_lines_reference,
        [tensor.double() for tensor in tensors],
        weight.double(),
        *arguments,
    )


def poison(monkeypatch):
    """From here on uninitialised memory is NaN; returns the list of sizes that it will be given
    for."""
    sizes = []

    def poisoned(original):
        def allocate(*arguments, **keywords):
            tensor = original(*arguments, **keywords)
            if tensor.is_meta or not tensor.is_floating_point():
                return tensor
            sizes.append(tensor.numel())
            return tensor.fill_(float("nan"))

        return allocate

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    return sizes


@pytest.mark.skipif(UNAVAILABLE is None, reason="the kernels run in this process")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this version of Triton's interpreter does not work with this version of NumPy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_in_the_interpreter" not in done.stdout and " passed" in done.stdout


@kernels
@pytest.mark.parametrize(
    "shape, reverse, keep_first",
    [(shape, *sides) for shape in SHAPES[:2] for sides in SIDES]
    + [(shape, bool(index % 2), bool(index // 2 % 2)) for index, shape in enumerate(SHAPES[2:])],
)
def test_equals_reference(shape, reverse, keep_first):
    tensors, weight = random_case(shape)
    computed = run(correct_lines_triton, tensors, weight, reverse, keep_first)
    assert all(value.dtype == torch.float32 for value in computed.values())
    assert_near(computed, exact(tensors, weight, reverse, keep_first), TOLERANCE)


@kernels
@pytest.mark.parametrize("reverse, keep_first", SIDES)
@pytest.mark.parametrize("block_rows", [1, 12])
def test_blocks_of_some_lines(monkeypatch, block_rows, reverse, keep_first):
    """Three lines of 6 rows: blocks of one line, of two with an incomplete last one."""
    monkeypatch.setattr(sweep_triton, "BLOCK_ROWS", block_rows)
    tensors, weight = random_case((3, 3, 2, 4))
    computed = run(correct_lines_triton, tensors, weight, reverse, keep_first)
    assert_near(computed, exact(tensors, weight, reverse, keep_first), TOLERANCE)


@kernels
@pytest.mark.parametrize(
    "shape, images", [((2, 20, 2, 17), 1), ((2, 5, 3, 17), 2), ((2, 9, 2, 17), 2)], ids=str
)
def test_tiles(monkeypatch, shape, images):
    """Several tiles of rows and of channels, the last ones incomplete; a batch that programs do not
    divide."""
    tile = dict(
        images=images, PARTS=1, ROWS=16, CHANNELS=16, REDUCTION=16, num_warps=4, num_stages=2
    )
    monkeypatch.setattr(sweep_triton, "_plan", lambda *arguments: tile)
    tensors, weight = random_case(shape)
    assert_near(
        run(correct_lines_triton, tensors, weight, True), exact(tensors, weight, True), TOLERANCE
    )


@kernels
@pytest.mark.parametrize("reverse, keep_first", [(False, False), (True, True)])
def test_a_launch_for_each_line(monkeypatch, reverse, keep_first):
    """Lines of which two programs compute some of the channels each, in one block of lines and in
    two."""
    tensors, weight = random_case((3, 2, 2, 17))
    monkeypatch.setattr(sweep_triton, "BY_LINE", True)
    plan = sweep_triton._plan_by_line
    monkeypatch.setattr(
        sweep_triton,
        "_plan_by_line",
        lambda *a: plan(*a) | dict(CHANNELS=16, REDUCTION=16, PARTS=2),
    )
    computed = run(correct_lines_triton, tensors, weight, reverse, keep_first)
    assert_near(computed, exact(tensors, weight, reverse, keep_first), TOLERANCE)
    monkeypatch.setattr(sweep_triton, "BLOCK_ROWS", 8)
    assert_near(
        run(correct_lines_triton, tensors, weight, reverse, keep_first), computed, TOLERANCE
    )


@pytest.mark.skipif(sweep_triton.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plan(dtype):
    for positions, batch, C, multiprocessors, backward in itertools.product(
        (1, 3, 4, 16, 63, 64, 65, 256),
        (1, 2, 32, 128),
        (1, 5, 16, 50, 200, 360, 424),
        (8, 82, 132),
        (False, True),
    ):
        plan = _plan(positions, batch, C, dtype, multiprocessors, backward)
        by_line = _plan_by_line(positions, batch, C, dtype, multiprocessors)
        assert plan["PARTS"] == 1 and by_line["PARTS"] * by_line["CHANNELS"] >= C
        for tile in (plan, by_line):
            assert 1 <= tile["images"] <= batch
            assert tile["images"] == 1 or tile["images"] * positions <= tile["ROWS"]
            assert all(
                tile[name] >= 16 and tile[name].bit_count() == 1
                for name in ("ROWS", "CHANNELS", "REDUCTION")
            )
            stage = tile["ROWS"] + (1 if backward else 3) * tile["CHANNELS"]
            assert stage * tile["REDUCTION"] * dtype.itemsize * tile["num_stages"] <= 96 * 1024


def layouts():
    """Features [B, C, H, W] = [2, 6, 3, 4] as networks produce them and as nobody should."""
    x = torch.randn(2, 6, 3, 4)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "channels first": x,
        "every second": torch.randn(2, 6, 6, 8).contiguous(memory_format=torch.channels_last)[
            :, :, ::2, ::2
        ],
        "expanded": torch.randn(1, 1, 3, 4).expand(2, 6, 3, 4),
    }


@kernels
@pytest.mark.parametrize("to_lines", [(3, 2, 0, 1), (2, 3, 0, 1)], ids=["columns", "rows"])
@pytest.mark.parametrize("layout", layouts())
def test_any_memory_layout(layout, to_lines):
    """Views as Sweep makes them; those of channels_last features are used as they lie, and so is
    the result."""
    lines = layouts()[layout].to(DEVICE).permute(to_lines)
    (_, *parameters), weight = random_case(lines.shape)
    tensors = [lines, *parameters]
    if layout == "expanded":
        weight = weight[:1, :1].expand(
            lines.shape
        )  # the incoming gradient is laid out in another way, too
    computed = run(correct_lines_triton, tensors, weight)
    assert_near(computed, exact(tensors, weight), TOLERANCE)
    if layout == "channels_last":
        assert computed["output"].stride() == lines.stride()


@kernels
@pytest.mark.parametrize("low_features", [False, True], ids=["float32 features", "low features"])
@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, saturated, low_features):
    """As in test_nn_backends: rounding input and parameters once moves the exact result by some
    distance; four times that and a unit of rounding more is allowed. With z near 1 it is 1 - z that
    matters: a rounded z fails."""
    tensors, weight = random_case((4, 3, 2, 16))
    if saturated:
        tensors[3][16:32] += 6.0
    moved = exact([tensor.to(dtype) for tensor in tensors], weight)
    expected = exact(tensors, weight)
    lines = tensors[0].to(dtype) if low_features else tensors[0]  # the type of the result
    computed = run(correct_lines_triton, [lines, *tensors[1:]], weight, autocast=dtype)
    for name, value in expected.items():
        assert computed[name].dtype == (
            lines.dtype if name in ("output", "grad lines") else torch.float32
        ), name
        assert computed[name].isfinite().all(), name
        unavoidable = (moved[name] - value).norm() / value.norm()
        error = (computed[name].double() - value).norm() / value.norm()
        assert error <= 4 * unavoidable + torch.finfo(dtype).eps, (
            f"{name}: {error:.1e}, {unavoidable:.1e}"
        )


@kernels
def test_state_is_not_rounded_under_autocast():
    tensors, _ = random_case((3, 3, 1, 8))
    tensors[3][8:16] = 40.0  # z = 1: lines pass unchanged
    with torch.autocast(DEVICE, torch.bfloat16):
        corrected = correct_lines_triton(*tensors, reverse=False, keep_first=False)
    torch.testing.assert_close(corrected, tensors[0], rtol=1e-6, atol=1e-6)


@kernels
def test_low_precision_without_autocast():
    tensors, weight = random_case((4, 3, 2, 8))
    computed = run(
        correct_lines_triton, [tensor.bfloat16() for tensor in tensors], weight.bfloat16()
    )
    assert all(value.dtype == torch.bfloat16 for value in computed.values())
    # State and gates are rounded too: 4 lines, each with three rounded results of relative error
    # 2^-9 at most.
    assert_near(computed, exact(tensors, weight), 4 * 3 * 2**-9)


@kernels
@pytest.mark.parametrize("reverse, keep_first", [(False, False), (True, True)])
@pytest.mark.parametrize("block_rows", [12, 10**6])
def test_no_uninitialised_memory_is_read(monkeypatch, block_rows, reverse, keep_first):
    monkeypatch.setattr(sweep_triton, "BLOCK_ROWS", block_rows)
    tensors, weight = random_case((3, 3, 2, 5))
    expected = run(correct_lines_triton, tensors, weight, reverse, keep_first)
    sizes = poison(monkeypatch)
    computed = run(correct_lines_triton, tensors, weight, reverse, keep_first)
    assert len(sizes) >= 4
    assert_near(computed, expected, 0)  # runs are equal bit for bit, too


@kernels
def test_memory(monkeypatch):
    """Between the passes input and output are kept, and during them there is room for a block, not
    for the sweep."""
    (lines, *parameters), weight = random_case((8, 3, 2, 4))
    monkeypatch.setattr(sweep_triton, "BLOCK_ROWS", 6)
    sizes = poison(monkeypatch)
    leaf = lines.requires_grad_()
    corrected = correct_lines_triton(leaf, *parameters, reverse=False, keep_first=False)
    saved = sum(tensor.numel() for tensor in corrected.grad_fn.saved_tensors)
    assert saved == 2 * lines.numel() + 9 * 4 * 4 + 3 * 4 * 4 + 2 * 3 * 4
    corrected.backward(weight)
    # A line is 8 padded rows: itself and its neighbours, five numbers per feature. Input and output
    # have 192 numbers.
    gates = (3 * 8 + 1) * 5 * 4
    assert (
        sizes.count(lines.numel()) == 2
        and max(size for size in sizes if size != lines.numel()) == gates
    )
    with torch.no_grad():
        again = correct_lines_triton(leaf, *parameters, reverse=False, keep_first=False)
    assert again.grad_fn is None and torch.equal(again, corrected)


@kernels
def test_autograd_contract():
    tensors, weight = random_case((2, 3, 1, 4))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    corrected = correct_lines_triton(*leaves, reverse=True, keep_first=False)
    result = (corrected.square() * weight).sum()
    once = torch.autograd.grad(result, leaves, retain_graph=True)
    again = torch.autograd.grad(result, leaves, create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again[0].sum().backward()

    features = leaves[0] * 1
    corrected = correct_lines_triton(features, *leaves[1:], reverse=False, keep_first=False)
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified (by an )?in-?place"):
        corrected.sum().backward()


@kernels
def test_parameters_of_any_layout():
    """Transposed weights, as tied ones may be; their gradients are contiguous, as torch.compile
    expects them."""
    tensors, weight = random_case((2, 3, 1, 5))
    turned = [tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in tensors]
    assert not turned[1].is_contiguous()
    leaves = [tensor.requires_grad_() for tensor in turned]
    output = correct_lines_triton(*leaves, reverse=True, keep_first=False)
    gradients = torch.autograd.grad((output * weight).sum(), leaves)
    names = ("lines", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    computed = {f"grad {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    expected = exact(tensors, weight, True)
    assert_near(computed, {name: expected[name] for name in computed}, TOLERANCE)


@kernels
def test_tf32_asked_for_in_the_new_way():
    """torch.get_float32_matmul_precision() raises then."""
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this version of torch has the old way only")
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        tensors, weight = random_case((2, 3, 1, 4))
        computed = run(correct_lines_triton, tensors, weight)
    finally:
        settings.fp32_precision = before
    assert_near(computed, exact(tensors, weight), 8 * 2**-11)


@kernels
def test_only_some_gradients():
    tensors, weight = random_case((2, 3, 1, 4))
    expected = exact(tensors, weight)
    for position, name in [(0, "grad lines"), (3, "grad bias_ih")]:
        leaves = [
            tensor.detach().requires_grad_(index == position)
            for index, tensor in enumerate(tensors)
        ]
        correct_lines_triton(*leaves, reverse=False, keep_first=False).backward(weight)
        assert_near({name: leaves[position].grad}, {name: expected[name]}, TOLERANCE)


@kernels
def test_empty_batch():
    tensors, weight = random_case((3, 4, 0, 5))
    computed = run(correct_lines_triton, tensors, weight)
    assert computed["output"].shape == (3, 4, 0, 5)
    assert all((value == 0).all() for value in computed.values())


@kernels
def test_float64_is_refused_except_under_autocast():
    tensors, _ = random_case((2, 3, 1, 4))
    tensors = [tensor.double() for tensor in tensors]
    with pytest.raises(ValueError, match="float64; 'torch' and 'reference' do"):
        correct_lines_triton(*tensors, reverse=False, keep_first=False)
    with torch.autocast(DEVICE, torch.bfloat16):
        computed = correct_lines_triton(*tensors, reverse=False, keep_first=False)
        expected = correct_lines(*tensors, reverse=False, keep_first=False, backend="torch")
    assert computed.dtype == expected.dtype == torch.float32
    assert_near({"output": computed}, {"output": expected}, 2**-8)


@kernels
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_in_a_layer_also_compiled(autocast):
    torch.manual_seed(0)
    layer = SDNLayer(2, 3, 4, [0, 3], backend="triton").to(DEVICE)
    reference = SDNLayer(2, 3, 4, [0, 3], backend="reference").to(DEVICE).double()
    reference.load_state_dict(layer.state_dict())
    x, weight = torch.randn(2, 2, 3, 4, device=DEVICE), torch.randn(2, 3, 3, 4, device=DEVICE)

    def result(layer, x, weight):
        with torch.autocast(
            DEVICE, autocast, enabled=autocast is not None and x.dtype == torch.float32
        ):
            y = layer(x)
        gradients = torch.autograd.grad((y * weight).sum(), layer.parameters())
        names = (name for name, _ in reference.named_parameters())
        return {"output": y.detach()} | dict(zip(names, gradients, strict=True))

    expected = result(reference, x.double(), weight.double())
    # With rounded operands of relative error 2^-9: two projections and two sweeps of up to four
    # lines.
    tolerance = TOLERANCE if autocast is None else 8 * 2**-8
    assert_near(result(layer, x, weight), expected, tolerance)
    layer.compile(fullgraph=True, backend="aot_eager")
    assert_near(result(layer, x, weight), expected, tolerance)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_is_complete(dtype):
    tensors, _ = random_case((3, 2, 2, 4))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(sdn._SWEEP, (*leaves, True, False, dtype, True, "triton"))


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    specification = importlib.util.spec_from_file_location(
        "sweep_triton_alone",
        sweep_triton.__file__,
        submodule_search_locations=[os.path.dirname(sweep_triton.__file__)],
    )
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    specification.loader.exec_module(module)
    assert module.available() == "Triton is not installed"
    monkeypatch.setattr(sdn, "_why_not_triton", module.available)
    tensors = [tensor.cpu() for tensor in random_case((2, 3, 1, 4))[0]]
    with pytest.raises(RuntimeError, match="Triton is not installed; 'torch' and 'reference' can"):
        correct_lines_triton(*tensors, reverse=False, keep_first=False)
    correct_lines(*tensors, reverse=False, keep_first=False)  # "auto" can
