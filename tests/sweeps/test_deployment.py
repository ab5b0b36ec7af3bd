"""A layer leaves the program that made it: exported, traced, counted, copied, put on other devices,
checkpointed."""

import io
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib import nn as sdn
from lib.nn import ResSDNLayer, SDNLayer
from lib.sweeps import operator, torch_internals
from lib.utils import MaskedConv2d

every_layer = pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case(layer_class, **keywords):
    torch.manual_seed(0)
    return layer_class(2, 3, 4, [0, 3], **keywords), torch.randn(2, 2, 5, 4)


def gradients(function, parameters):
    return torch.autograd.grad(function, list(parameters), retain_graph=True)


def assert_trains_as(found, layer, x):
    """Output and gradients of all parameters, in the same order, are those of the layer."""
    torch.testing.assert_close(found(x), layer(x))
    for one, other in zip(
        gradients(found(x).square().sum(), found.parameters()),
        gradients(layer(x).square().sum(), layer.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every_layer
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_all_batches_and_sizes(layer_class, strict):
    layer, x = case(layer_class)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("w")}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=strict)
    exported = program.module()
    for shape in [(2, 2, 5, 4), (3, 2, 7, 9)]:
        assert_trains_as(exported, layer, torch.randn(shape))


@every_layer
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torch_jit(layer_class):
    """Works for other sizes, after it was stored, and with gradients."""
    layer, x = case(layer_class)
    traced = torch.jit.trace(layer, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for shape in [(2, 2, 5, 4), (3, 2, 7, 9)]:
        assert_trains_as(loaded, layer, torch.randn(shape))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripts_are_refused_by_torch_jit():
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(SDNLayer(2, 3, 4, [0]))


@every_layer
@pytest.mark.parametrize("upsample", [False, True])
def test_a_sweep_is_one_node_of_a_symbolic_trace(layer_class, upsample):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            more = dict(kernel_size=4, stride=2, padding=1) if upsample else {}
            self.layer = layer_class(2, 3, dirs=[0, 3, 1], upsample=upsample, **more)

        def forward(self, x):
            return torch.relu(self.layer(x))

    network, x = Network(), torch.randn(2, 2, 5, 4)
    traced = torch.fx.symbolic_trace(network)
    sweeps = [node for node in traced.graph.nodes if node.target is sdn.correct_lines]
    assert len(sweeps) == 3
    assert_trains_as(traced, network, x)
    assert (
        sum(
            n.target is sdn.correct_lines
            for n in torch.fx.symbolic_trace(network.layer).graph.nodes
        )
        == 3
    )


@every_layer
def test_hooks_on_every_module(layer_class):
    """As those who count operations by hooks register them."""
    layer, x = case(layer_class)
    before, after = [], []
    for module in layer.modules():
        module.register_forward_pre_hook(lambda module, inputs: before.append(module))
        module.register_forward_hook(lambda module, inputs, output: after.append(module))
    layer(x)
    containers = (nn.ModuleList, nn.ModuleDict)
    called = [module for module in layer.modules() if not isinstance(module, containers)]
    assert set(before) == set(after) == set(called)


@every_layer
def test_made_on_the_device_meta(layer_class):
    layer, x = case(layer_class)
    arguments = (2, 3, 4, [0, 3])
    with torch.device("meta"):
        empty = layer_class(*arguments)
    assert empty(x.to("meta")).shape == layer(x).shape
    skipped = nn.utils.skip_init(layer_class, *arguments)
    assigned = layer_class(*arguments, device="meta")
    for other, how in (
        (empty.to_empty(device="cpu"), {}),
        (skipped, {}),
        (assigned, {"assign": True}),
    ):
        other.load_state_dict(layer.state_dict(), **how)
        assert torch.equal(other(x), layer(x))


def test_masks_outlive_the_device_meta():
    """They are in no state dict, so that nothing would fill them."""
    layer = MaskedConv2d(2, 3, include_centre=False)
    with torch.device("meta"):
        empty = MaskedConv2d(2, 3, include_centre=False)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    expected = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert torch.equal(empty.mask[0, 0], expected)
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(empty.bfloat16().mask[0, 0], expected.bfloat16())


@every_layer
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations(layer_class, use_reentrant):
    layer, x = case(layer_class)
    leaf = x.clone().requires_grad_()
    inputs = [leaf, *layer.parameters()]
    expected = torch.autograd.grad(layer(leaf).square().sum(), inputs)
    checkpoint(layer, leaf, use_reentrant=use_reentrant).square().sum().backward()
    for one, other in zip(inputs, expected, strict=True):
        assert torch.equal(one.grad, other)


def test_what_is_kept_does_not_depend_on_memory_where_it_is_asked_twice(monkeypatch):
    """Of a GPU's tensors, without one: between a pass and its repetition by a checkpoint the free
    memory changes, and what is saved must not."""
    device = SimpleNamespace(type="cuda")
    lines = SimpleNamespace(device=device, is_cuda=True, numel=lambda: 2**26)
    memory = SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    known = not torch_internals.may_have_saved_tensors_hooks()  # from torch 2.8 on
    assert operator._should_keep(lines, torch.bfloat16) is known
    memory.total_memory = 2**30
    assert operator._should_keep(lines, torch.bfloat16) is False
    memory.total_memory = 2**40
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert operator._should_keep(lines, torch.bfloat16) is False
    assert operator._should_keep(lines, torch.bfloat16) is known


@every_layer
def test_data_parallel_without_devices(layer_class):
    layer, x = case(layer_class)
    assert torch.equal(nn.DataParallel(layer)(x), layer(x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled_in_every_mode(mode):
    layer, x = case(ResSDNLayer)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    assert_trains_as(compiled, layer, x)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_ahead_of_time(tmp_path):
    """AOTInductor: machine code that calls the sweeps' operator."""
    layer, x = case(SDNLayer)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for images in (x, torch.randn(5, 2, 5, 4)):
            torch.testing.assert_close(loaded(images), layer(images))
