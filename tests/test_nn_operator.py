"""The sweep as an operator of torch: compiled, exported, registered by several copies of the file,
backends chosen."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY
from test_nn_backends import assert_near, run

from lib import nn as sdn
from lib.nn import KERNEL_FILES, ResSDNLayer, SDNLayer, Sweep

LAYERS = [SDNLayer, ResSDNLayer]


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
        torch.library.opcheck(sdn._SWEEP, (*leaves, *options, requires_grad, "torch"))
        plain = [each.detach() for each in leaves]
        corrected, gates = sdn._SWEEP(*plain, *options, True, "torch")
        arguments = (torch.randn_like(lines), *plain, corrected, gates, *options, "torch")
        torch.library.opcheck(sdn._SWEEP_BACKWARD, arguments)


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
    sweeps = [node for node in program.graph.nodes if node.target is sdn._SWEEP]
    assert len(sweeps) == 4, "a sweep is one node of the graph"
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for images in (x, torch.randn(5, 3, 4, 5)):
        torch.testing.assert_close(loaded(images), layer(images))


def test_several_copies_live_in_one_process(tmp_path):
    """The package under two names, copies beside and without the kernels, one of another version,
    and a reload: each computes what it did alone, also compiled, and with the operator of its own
    file."""
    (tmp_path / "sdn").symlink_to(REPOSITORY / "lib")
    source = (REPOSITORY / "lib/nn.py").read_text()
    for name in ("mine", "theirs/inner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mine/sdn_copy.py").write_text(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/sdn_full.py").write_text(source)
    for name in KERNEL_FILES:
        (tmp_path / "full" / name).write_text((REPOSITORY / "lib" / name).read_text())
    changed = source.replace(
        "bool keep_first, ScalarType product_dtype, bool diff",
        "bool keep_first, ScalarType p, bool diff",
    )
    changed = changed.replace(
        "torch.lerp(candidate, lines[line], z, out=corrected[line])", "corrected[line] = 7.0"
    )
    assert changed.count(" p, bool") == 1 and changed.count("= 7.0") == 1
    (tmp_path / "theirs/inner/nn.py").write_text(changed)
    (tmp_path / "theirs/__init__.py").touch()
    (tmp_path / "theirs/inner/__init__.py").touch()
    program = """
import importlib, sys, warnings
warnings.simplefilter("error")
sys.path[:0] = ["mine", "full"]
import torch
import lib.nn, sdn.nn, sdn_copy, sdn_full, theirs.inner.nn
old_layer = lib.nn.SDNLayer(2, 2, 3, [0, 3], backend="torch")
modules = [lib.nn, sdn.nn, sdn_copy, sdn_full, theirs.inner.nn]
operators = {module._SWEEP for module in modules} | {module._SWEEP_BACKWARD for module in modules}
assert len(operators) == 10, operators
importlib.reload(sdn.nn)
importlib.reload(lib.nn)
assert len(operators | {lib.nn._SWEEP, sdn.nn._SWEEP}) == 12
assert sdn_copy._triton_kernels() is None
with_kernels = lib.nn._triton_kernels(), sdn.nn._triton_kernels(), sdn_full._triton_kernels()
names = [module.__name__ for module in with_kernels]
assert names == ["lib.sweeps.triton_backend", "sdn.sweep_triton", "sdn_full_sweep_triton"], names
assert len({module.kernels for module in with_kernels}) == 3
x = torch.randn(2, 2, 4, 5)
expected = [gradient.clone() for gradient in torch.autograd.grad(old_layer(x).square().sum(), old_layer.parameters())]
for module in modules:
    layer = module.SDNLayer(2, 2, 3, [0, 3], backend="torch")
    layer.load_state_dict(old_layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for function in (layer, compiled):
        y = function(x)
        assert torch.equal(y, old_layer(x)) == (module is not theirs.inner.nn)
        gradients = torch.autograd.grad(y.square().sum(), layer.parameters())
        if module is not theirs.inner.nn:
            assert all(torch.equal(one, other) for one, other in zip(gradients, expected))
    torch._dynamo.reset()
try:
    sdn_copy.SDNLayer(2, 2, 3, [0], backend="triton")(x)
except RuntimeError as error:
    assert "there is no sweep_triton.py and sweep_kernels.py beside nn.py" in str(error)
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


def test_triton_on_a_cpu_is_refused(monkeypatch):
    sweep, features = Sweep(3, 0, backend="triton"), torch.randn(1, 3, 2, 2)
    monkeypatch.setattr(sdn, "_why_not_triton", lambda device: "there is no CUDA device")
    with pytest.raises(
        RuntimeError,
        match="'triton' cannot run: there is no CUDA device; 'torch' and 'reference' can",
    ):
        sweep(features)
    monkeypatch.setattr(sdn, "_why_not_triton", lambda device: None)
    monkeypatch.setattr(sdn, "_triton_kernels", lambda: SimpleNamespace(INTERPRETED=False))
    with pytest.raises(ValueError, match="'triton' needs a CUDA device, got cpu"):
        sweep(features)


def test_tensors_on_several_devices_are_refused():
    with pytest.raises(
        ValueError, match="features are on meta, parameters on cpu.*: all must be on one device"
    ):
        Sweep(3, 0)(torch.empty(1, 3, 2, 2, device="meta"))


def test_auto_takes_triton_where_it_runs(monkeypatch):
    cpu, cuda = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda"))
    monkeypatch.setattr(sdn, "_triton_kernels", lambda: SimpleNamespace(INTERPRETED=False))
    monkeypatch.setattr(sdn, "_why_not_triton", lambda device: None)
    assert sdn._resolved("auto", cuda, torch.bfloat16) == "triton"
    assert sdn._resolved("triton", cuda, torch.float32) == "triton"
    assert sdn._resolved("torch", cuda, torch.bfloat16) == "torch"
    assert sdn._resolved("auto", cuda, torch.float64) == "torch"
    assert sdn._resolved("auto", cpu, torch.float32) == "torch"
    with pytest.raises(ValueError, match="does not compute in float64"):
        sdn._resolved("triton", cuda, torch.float64)

    monkeypatch.setattr(sdn, "_why_not_triton", lambda device: "of the test")
    with pytest.warns(
        UserWarning, match="use backend 'torch', not the faster 'triton': of the test"
    ):
        assert sdn._resolved("auto", cuda, torch.bfloat16) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sdn._resolved("auto", cuda, torch.bfloat16) == "torch", "and says so once"
