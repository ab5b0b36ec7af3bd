"""The sweep as an operator of torch: compiled, exported, registered by several copies of the file,
backends chosen."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY
from test_backends import assert_near, run
from torch.utils.flop_counter import FlopCounterMode

from lib.nn import ResSDNLayer, SDNLayer, Sweep, correct_lines
from lib.sweeps import operator, products

LAYERS = [SDNLayer, ResSDNLayer]
OPTIONS = (True, False, torch.float64)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case(layer_class, backend="torch", dirs=(0, 1, 2, 3)):
    torch.manual_seed(0)
    layer = layer_class(3, 4, 5, list(dirs), 3, 1, 1, backend=backend)
    return layer, torch.randn(2, 3, 4, 5), torch.randn(2, 4, 4, 5)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "dtype, product_dtype",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("reverse, keep_first", [(False, False), (True, True)])
def test_registration_is_complete(reverse, keep_first, dtype, product_dtype, requires_grad):
    """Torch's own check: nothing modified or aliased, shapes and strides as announced, gradients
    through AOT autograd.

    Strides are those of a channels_last map, columns as lines, rows as lines."""
    torch.manual_seed(0)
    C = 4
    cell = torch.nn.GRUCell(3 * C, C).to(torch.promote_types(dtype, torch.float32))
    features = torch.tanh(torch.randn(2, C, 3, 5, dtype=dtype)).contiguous(
        memory_format=torch.channels_last
    )
    for to_lines in [(3, 2, 0, 1), (2, 3, 0, 1)]:
        lines = features.permute(to_lines)
        tensors = [
            each.detach()
            for each in (lines, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        ]
        leaves = [each.requires_grad_(requires_grad) for each in tensors]
        options = (reverse, keep_first, product_dtype)
        torch.library.opcheck(operator.SWEEP, (*leaves, *options, requires_grad, "torch"))
        plain = [each.detach() for each in leaves]
        corrected, kept = operator.SWEEP(*plain, *options, True, "torch")
        arguments = (torch.randn_like(lines), *plain, corrected, kept, *options, "torch")
        torch.library.opcheck(operator.SWEEP_BACKWARD, arguments)


@pytest.mark.parametrize("autocast", [{}, dict(dtype=torch.bfloat16)], ids=["float32", "autocast"])
@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_compiled_without_a_graph_break(layer_class, backend, autocast):
    layer, x, weight = case(
        layer_class, backend, dirs=(1,) if backend == "reference" else (0, 1, 2, 3)
    )
    expected = run(layer, x, weight, **autocast)
    names = list(layer.state_dict())
    layer.compile(fullgraph=True, backend="aot_eager")
    computed = run(layer, x, weight, **autocast)
    assert list(layer.state_dict()) == names
    # The reference's lines add their gradients of a weight in autocast's type, in an order that is
    # the compiler's.
    assert_near(computed, expected, 2**-8 if autocast and backend == "reference" else 1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_to_machine_code():
    layer, x, weight = case(ResSDNLayer)
    expected = run(layer, x, weight)
    layer.compile(fullgraph=True)
    assert_near(run(layer, x, weight), expected, 3e-6)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_compiled_once_for_all_batches_and_sizes(layer_class):
    layer, *_ = case(layer_class)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for number, shape in enumerate([(2, 3, 4, 5), (3, 3, 5, 7), (5, 3, 6, 4)]):
        x, weight = torch.randn(shape), torch.randn(shape[0], 4, *shape[2:])
        with torch.compiler.set_stance("default" if number == 0 else "fail_on_recompile"):
            computed = run(compiled, x, weight)
        computed = {name.replace("_orig_mod.", ""): value for name, value in computed.items()}
        assert_near(computed, run(layer, x, weight), 1e-6)


def test_gradients_are_off_in_compiled_inference():
    layer, x, _ = case(SDNLayer)
    expected = layer(x).detach()
    layer.compile(fullgraph=True, backend="aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_exported_stored_and_loaded(layer_class, strict):
    layer, x, _ = case(layer_class)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    sweeps = [node for node in program.graph.nodes if node.target is operator.SWEEP]
    assert len(sweeps) == 4, "a sweep is one node of the graph"
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for images in (x, torch.randn(5, 3, 4, 5)):
        torch.testing.assert_close(loaded(images), layer(images))


def test_several_copies_live_in_one_process(tmp_path):
    """The package under two names, copies of nn.py alone and with the folder beside it, reloads:
    all compute the same, also compiled, and share the operators, so that stored graphs always name
    the same ones."""
    (tmp_path / "sdn").symlink_to(REPOSITORY / "lib")
    for folder, name in (("alone", "sdn_alone"), ("full", "sdn_full"), ("theirs", "nn")):
        (tmp_path / folder).mkdir()
        shutil.copy(REPOSITORY / "lib/nn.py", tmp_path / folder / f"{name}.py")
    for folder in ("full", "theirs"):
        shutil.copytree(REPOSITORY / "lib/sweeps", tmp_path / folder / "sweeps")
    (tmp_path / "theirs/__init__.py").touch()
    program = """
import importlib, sys, warnings
sys.path[:0] = ["alone", "full"]
import torch
import lib.nn, sdn.nn, sdn_alone, sdn_full, theirs.nn
old_layer = lib.nn.SDNLayer(2, 2, 3, [0, 3], backend="torch").double()
x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
def gradients(layer):
    return torch.autograd.grad(layer(x).square().sum(), layer.parameters())
modules = [lib.nn, sdn.nn, sdn_alone, sdn_full, theirs.nn]
for reload in (False, True):
    for module in modules:
        if reload:
            importlib.reload(module)
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            layer = module.SDNLayer(2, 2, 3, [0, 3]).double()
            layer.load_state_dict(old_layer.state_dict())
            found = gradients(layer)
        slow = any("run as an open loop" in str(warning.message) for warning in noted)
        assert slow == (module is sdn_alone), [str(warning.message) for warning in noted]
        for one, other in zip(found, gradients(old_layer)):
            torch.testing.assert_close(one, other)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), old_layer(x))
        torch._dynamo.reset()
assert [name for name in dir(torch.ops.sdn) if "sweep" in name] == ["sweep_backward_v1", "sweep_v1"]
try:
    sdn_alone.SDNLayer(2, 2, 3, [0], backend="lines")(x.float())
except RuntimeError as error:
    assert "there is no folder sweeps/ beside nn.py" in str(error)
    print("ok")
"""
    environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr


def test_operations_are_counted():
    """By hand: 12 C x C products a position and direction forward, twice as many backward, beside
    two 1x1 projections."""
    B, C, N = 2, 8, 6
    layer = SDNLayer(C, C, dirs=[0, 3])
    x = torch.randn(B, C, N, N, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    position = 2 * 12 * C * C * B * N * N
    assert counted[torch.ops.sdn.sweep_v1] == 2 * position
    assert counted[torch.ops.sdn.sweep_backward_v1] == 2 * 2 * position
    assert counter.get_total_flops() == 6 * position + 2 * 3 * (2 * C * C * B * N * N)


@pytest.mark.parametrize("way", ["no_grad", "grad"])
def test_an_exported_layer_can_be_trained(way):
    layer, x, weight = case(SDNLayer)
    with torch.set_grad_enabled(way == "grad"):
        exported = torch.export.export(layer, (x,)).module()
    expected, computed = (
        torch.autograd.grad((each(x) * weight).sum(), list(each.parameters()))
        for each in (layer, exported)
    )
    for one, other in zip(computed, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_kept_has_the_shape_that_was_announced():
    """Of a GPU's tensors, without one: coefficients in the products' type, or nothing."""
    lines = SimpleNamespace(shape=(4, 5, 3, 6), device=torch.device("cuda"), dtype=torch.float32)
    expected = products.kept(lines, torch.bfloat16)
    assert expected == ((4, 15, 30), torch.bfloat16)
    assert operator._kept(lines, torch.bfloat16, True, "auto") == expected
    assert operator._kept(lines, torch.bfloat16, True, "torch") == ((4, 15, 24), torch.float32)
    assert operator._kept(lines, torch.bfloat16, False, "auto") == ((0,), torch.bfloat16)


@pytest.mark.parametrize("backend", ["torch", "lines", "reference"])
def test_transposed_parameters(backend, monkeypatch):
    """Weights that lie in another way, also in a compiled graph, which relies on what the operator
    announces. The reference is computed inside the operator here."""
    monkeypatch.setenv("SDN_BACKEND", backend)
    torch.manual_seed(0)
    C = 3
    lines, w_ih, w_hh = torch.randn(4, 5, 2, C), torch.randn(3 * C, 3 * C), torch.randn(C, 3 * C)
    leaves = [lines, w_ih.t(), w_hh.t(), *torch.randn(6 * C)[::2].view(1, -1).expand(2, -1)]
    leaves = [each.double().detach().requires_grad_() for each in leaves]

    def gradients(correct, backend):
        y = correct(*leaves, reverse=True, keep_first=False, backend=backend)
        return torch.autograd.grad(y.square().sum(), leaves)

    expected = gradients(correct_lines, "reference")
    for correct in (correct_lines, torch.compile(correct_lines, backend="inductor")):
        for one, other in zip(gradients(correct, "auto"), expected, strict=True):
            torch.testing.assert_close(one, other)
    plain = [each.detach() for each in leaves]
    saved = operator.SWEEP(*plain, *OPTIONS, True, "auto")
    arguments = (torch.randn_like(plain[0]), *plain, *saved, *OPTIONS, "auto")
    announced = operator._sweep_backward_shapes(*arguments[:-4])
    for one, other in zip(operator.SWEEP_BACKWARD(*arguments), announced, strict=True):
        assert (one.shape, one.stride()) == (other.shape, other.stride())
    # Torch's check asks for the storage of tensors, which those of torch.func, by which the
    # reference is differentiated inside the operator, do not have.
    if backend != "reference":
        torch.library.opcheck(operator.SWEEP_BACKWARD, arguments)


def test_tensors_on_several_devices_are_refused():
    with pytest.raises(
        ValueError, match="features are on meta, parameters on cpu.*: all must be on one device"
    ):
        Sweep(3, 0)(torch.empty(1, 3, 2, 2, device="meta"))
