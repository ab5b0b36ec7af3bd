"""Networks with sweeps, exported to ONNX and run by onnxruntime on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from lib.nn import ResSDNLayer, SDNLayer
from lib.sweeps import onnx_scan

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow
SIZES = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_computes_the_same(program, network, path, shapes):
    """An exported program, stored, and the network it came from, on random maps of some shapes."""
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in shapes:
        x = torch.randn(shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = network(x)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


def number_of_scans(program):
    return sum(node.op_type == "Scan" for node in program.model.graph)


@pytest.mark.parametrize(
    "layer_class, border, dirs", [(SDNLayer, "keep", [1, 2]), (ResSDNLayer, "zeros", [0, 3])]
)
def test_one_file_for_all_batches_and_sizes(tmp_path, layer_class, border, dirs):
    torch.manual_seed(0)
    layer = layer_class(2, 3, 4, dirs, 3, 1, 1, border=border).eval()
    program = torch.onnx.export(
        layer, (torch.randn(2, 2, 5, 4),), dynamo=True, dynamic_shapes=SIZES, verbose=False
    )
    assert number_of_scans(program) == 2, "a sweep is one operator"
    shapes = [(2, 2, 5, 4), (3, 2, 7, 9), (1, 2, 1, 1)]
    assert_computes_the_same(program, layer, tmp_path / "layer.onnx", shapes)


def test_a_network_that_changes_scales(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        ResSDNLayer(2, 4, 4, 2, 1, dirs=[3]),
        nn.ReLU(),
        SDNLayer(4, 2, 4, 2, 1, dirs=[2], upsample=True),
    ).eval()
    x = torch.randn(2, 2, 6, 8)
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    assert number_of_scans(program) == 2
    assert_computes_the_same(program, network, tmp_path / "network.onnx", [x.shape])


def test_lines_are_unrolled_where_torch_has_no_scan(tmp_path, monkeypatch):
    """As by `backend="reference"`: the batch may vary, the size of the maps may not."""
    torch.manual_seed(0)
    monkeypatch.setattr(onnx_scan, "find_scan", lambda: None)
    layer = SDNLayer(2, 3, dirs=[0, 3]).eval()
    x = torch.randn(2, 2, 3, 4)
    program = torch.onnx.export(
        layer, (x,), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False
    )
    assert number_of_scans(program) == 0
    assert_computes_the_same(program, layer, tmp_path / "layer.onnx", [x.shape, (3, 2, 3, 4)])
