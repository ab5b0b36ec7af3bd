"""SDNLayer and ResSDNLayer: the authors' numbers, what the equations imply, arguments, life as a
module."""

import copy
import doctest
import functools
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import nn as sdn
from lib.nn import ResSDNLayer, SDNLayer, Sweep, make_convolution

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "layers.json").read_text())
BACKENDS = ["reference", "torch"]
ONE_BY_ONE = dict(kernel_size=1, stride=1, padding=0)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "layers.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_authors_numbers(golden, case, backend):
    layer = getattr(sdn, case["cls"])(**case["kwargs"], backend=backend)
    layer.load_state_dict(
        {name: golden[f"{case['name']}/param/{name}"] for name in layer.state_dict()}
    )
    x = golden[f"{case['name']}/input"].clone().requires_grad_()
    output = layer(x)
    (output * golden[f"{case['name']}/output_weight"]).sum().backward()

    computed = {"output": output, "grad/input": x.grad}
    computed |= {f"grad/{name}": parameter.grad for name, parameter in layer.named_parameters()}
    for name, value in computed.items():
        expected = golden[f"{case['name']}/{name}"]
        assert value.shape == expected.shape, name
        assert (value - expected).norm() <= 1e-5 * expected.norm(), name


def cone(direction: int, height: int, width: int) -> torch.Tensor:
    """Whether an output position [height * width] of one sweep may depend on an input position
    [height * width]."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down = (row.flatten()[:, None] - row.flatten()).mul(-1 if direction == 3 else 1)
    right = (column.flatten()[:, None] - column.flatten()).mul(-1 if direction == 1 else 1)
    along, across = (right, down) if direction in (0, 1) else (down, right)
    return (along >= 0) & (across.abs() <= along)


def dependence(layer: torch.nn.Module, channels: int, height: int, width: int) -> torch.Tensor:
    """Norm of the Jacobian's block for each pair of an output and an input position."""
    x = torch.randn(1, channels, height, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, :, :, 0]  # [C, H, W, C, H, W]
    positions = height * width
    return jacobian.reshape(-1, positions, channels, positions).pow(2).sum(dim=(0, 2)).sqrt()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", sdn.BORDERS)
@pytest.mark.parametrize("direction", sdn.DIRECTIONS)
def test_one_sweep_depends_on_its_cone_only(direction, border, backend):
    torch.manual_seed(0)
    sweep = Sweep(3, direction, border=border, backend=backend).double()
    blocks = dependence(sweep, 3, 5, 6)
    inside = cone(direction, 5, 6)
    assert (blocks[~inside] == 0).all()
    assert (blocks[inside] > 0).all()


@pytest.mark.parametrize("dirs", [[0, 2], [0, 1], [3, 1], [0, 1, 2, 3], [3, 1, 0, 2]], ids=str)
def test_several_sweeps_depend_on_the_product_of_their_cones(dirs):
    """Four directions, in any order, reach everything; two do not: with [0, 2] the top left sees
    itself only."""
    torch.manual_seed(0)
    height, width = 5, 4
    layer = SDNLayer(2, 2, 3, dirs).double()
    blocks = dependence(layer, 2, height, width)
    reached = torch.eye(height * width)
    for direction in dirs:
        reached = (cone(direction, height, width).float() @ reached > 0).float()
    assert torch.equal(blocks != 0, reached.bool())
    assert bool(reached.all()) == (len(set(dirs)) == 4)
    if dirs == [0, 2]:
        assert blocks[0].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("direction", sdn.DIRECTIONS)
def test_translation_equivariance(direction):
    """With zero biases in all three stages an object on a zero background may be moved; it must
    stay away from the edges along a line, where neighbours are missing. With several directions the
    effect of the edges comes back."""
    torch.manual_seed(0)
    layer = SDNLayer(2, 3, 4, [direction]).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.zero_()
    lines, positions = 12, 28
    image = torch.zeros(1, 2, lines, positions, dtype=torch.float64)
    image[:, :, 4:6, 13:15] = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    moved = image.roll((1, 2), dims=(2, 3))
    if direction in (0, 1):
        outputs = [layer(x.transpose(2, 3)).transpose(2, 3) for x in (image, moved)]
    else:
        outputs = [layer(x) for x in (image, moved)]
    before, after = outputs[0][:, :, :-1, :-2], outputs[1][:, :, 1:, 2:]
    assert before.abs().max() > 0.01
    torch.testing.assert_close(after, before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("upsample", [False, True])
def test_residual_layer_equals_its_formula(upsample):
    torch.manual_seed(0)
    layer = ResSDNLayer(3, 5, 4, [0, 3], 4, 2, 1, upsample).double()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    sdn_out, gate = layer.sdn(x)[:, :5], layer.sdn(x)[:, 5:]
    expected = torch.sigmoid(gate) * layer.cnn(x) + (1 - torch.sigmoid(gate)) * sdn_out
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (2, 5, 12, 16) if upsample else (2, 5, 3, 4)


def test_output_keeps_the_memory_format():
    x = torch.randn(2, 3, 5, 6)
    for layer in (SDNLayer(3, 4, 4, [0, 2]), ResSDNLayer(3, 4, 4, [0, 2])):
        assert layer(x).is_contiguous()
        assert layer(x.contiguous(memory_format=torch.channels_last)).is_contiguous(
            memory_format=torch.channels_last
        )
        torch.testing.assert_close(layer(x), layer(x.contiguous(memory_format=torch.channels_last)))


NAMES = [
    "project_in_stage.weight",
    "project_in_stage.bias",
    "sdn_correction_stage.0.cell.gru.weight_ih",
    "sdn_correction_stage.0.cell.gru.weight_hh",
    "sdn_correction_stage.0.cell.gru.bias_ih",
    "sdn_correction_stage.0.cell.gru.bias_hh",
    "project_out_stage.weight",
    "project_out_stage.bias",
]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_parameter_names(backend):
    assert list(SDNLayer(2, 3, 4, [2], backend=backend).state_dict()) == NAMES
    residual = ResSDNLayer(2, 3, 4, [2], backend=backend)
    assert list(residual.state_dict()) == [f"sdn.{name}" for name in NAMES] + [
        "cnn.weight",
        "cnn.bias",
    ]


def test_parameter_counts_of_the_paper():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(SDNLayer(200, 200, 200, [0], **ONE_BY_ONE)) == 561_600
    assert count(SDNLayer(200, 200, 200, [0, 1], **ONE_BY_ONE)) == 1_042_800
    assert count(SDNLayer(200, 200, 200, [0, 1, 2, 3], **ONE_BY_ONE)) == 2_005_200
    assert count(make_convolution(200, 200, 3, 1, 1, False)) == 360_200
    assert count(make_convolution(200, 200, 5, 1, 2, False)) == 1_000_200


def test_sweep_parameters_start_as_a_gru_cell():
    cell = Sweep(100, 0).cell.gru
    for parameter in cell.parameters():
        parameter = parameter.detach()
        assert parameter.abs().max() <= 0.1
        assert parameter.std() == pytest.approx(0.1 / 3**0.5, rel=0.15)


DIRS = r"dirs must be a non-empty sequence of 0 \(columns, left to right\), 1 .*, got "
WRONG_ARGUMENTS = [
    *(
        (dict(dirs=dirs), DIRS + re.escape(repr(dirs)))
        for dirs in ([4], [-1], [0, True], ["0"], [], 3, None)
    ),
    (dict(in_ch=0), "in_channels must be an integer >= 1, got 0"),
    (dict(out_ch=-2), "out_channels must be an integer >= 1, got -2"),
    (dict(num_features=0), "num_features must be an integer >= 1, got 0"),
    (dict(num_features=2.0), "num_features must be an integer >= 1, got 2.0"),
    (dict(num_features=True), "num_features must be an integer >= 1, got True"),
    (dict(border="none"), "border must be one of 'zeros', 'keep', got 'none'"),
    (dict(backend="cuda"), "backend must be one of 'auto', 'reference', 'torch'.*, got 'cuda'"),
    (dict(init="best"), "init must be one of 'paper', 'deep', got 'best'"),
    (dict(output_padding=1), "output_padding needs upsample=True"),
    (dict(upsample=True), "needs stride >= 2, got kernel_size=1, stride=1, padding=0; 4, 2, 1"),
    (dict(upsample=True, stride=2, padding="same"), "needs padding in numbers"),
    (
        dict(upsample=True, stride=3, kernel_size=2),
        "needs kernel_size >= stride.*got kernel_size=2, stride=3",
    ),
    (
        dict(upsample=True, stride=2, kernel_size=2, padding=1),
        r"needs .*kernel_size > 2 \* padding, got kernel_size=2",
    ),
]


@pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
@pytest.mark.parametrize("changed, message", WRONG_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_wrong_arguments(layer_class, changed, message):
    arguments = dict(in_ch=2, out_ch=3, num_features=4, dirs=[0]) | changed
    with pytest.raises(ValueError, match=message):
        layer_class(**arguments)


@pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
@pytest.mark.parametrize(
    "keywords, shape",
    [
        (dict(kernel_size=0), (2, 2, 8, 8)),
        (dict(kernel_size=2.5), (2, 2, 8, 8)),
        (dict(kernel_size=(1, 2, 3)), (2, 2, 8, 8)),
        (dict(kernel_size=1, stride=0), (2, 2, 8, 8)),
        (dict(kernel_size=1, padding=-1), (2, 2, 8, 8)),
        (dict(kernel_size=1, padding="some"), (2, 2, 8, 8)),
        (dict(kernel_size=1, groups=3), (2, 2, 8, 8)),
        (dict(kernel_size=3), (2, 3, 8, 8)),
        (dict(kernel_size=3), (3, 8, 8)),
        (dict(kernel_size=3), (8, 8)),
        (dict(kernel_size=3), (2, 2, 8, 2)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_a_convolution_refuses_is_refused_in_its_words(layer_class, keywords, shape):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as of_convolution:
        torch.nn.Conv2d(2, 3, **keywords)(torch.randn(shape))
    with pytest.raises(of_convolution.type) as refused:
        layer_class(2, 3, **keywords, dirs=[0])(torch.randn(shape))
    # Then comes the shape of the input, to which a batch of one is added.
    assert (
        str(refused.value).partition("input")[0] == str(of_convolution.value).partition("input")[0]
    )


@pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
@pytest.mark.parametrize(
    "arguments, keywords",
    [
        ((6, 4, 3, 1, 1), {}),
        ((6, 4), dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2))),
        ((6, 4, np.int64(3)), dict(padding="same", groups=2)),
        ((6, 4, 3, 1, 0, 2, 2, False), {}),
        ((6, 4, 3), dict(padding=1, padding_mode="reflect", bias=False)),
        ((6, 4, 3), dict(padding="valid", dilation=(1, 2))),
    ],
    ids=str,
)
def test_the_signature_is_that_of_a_convolution(layer_class, arguments, keywords):
    """`partial(layer, dirs=...)` stands where a convolution's class does: same arguments, by place
    or name, same attributes, same shapes of output, also without a batch and for an empty one."""
    convolution = torch.nn.Conv2d(*arguments, **keywords)
    layer = functools.partial(layer_class, dirs=[0, 3])(*arguments, **keywords)
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    for name in names.split():
        assert getattr(layer, name) == getattr(convolution, name), name
    assert (layer.bias is None) == (convolution.bias is None)
    for shape in [(2, 6, 9, 8), (6, 9, 8), (0, 6, 9, 8)]:
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == convolution(x).shape
        y.sum().backward()
        assert x.grad.shape == x.shape
    assert torch.equal(layer(x[:0]), layer(x)[:0])


@pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
def test_transposed_convolutions_take_their_arguments_too(layer_class):
    keywords = dict(kernel_size=3, stride=2, padding=1)
    convolution = torch.nn.ConvTranspose2d(4, 6, **keywords, output_padding=1)
    layer = layer_class(4, 6, **keywords, output_padding=1, upsample=True, dirs=[2])
    x = torch.randn(2, 4, 5, 7)
    assert layer(x).shape == convolution(x).shape and layer.output_padding == (1, 1)
    chosen = layer_class(4, 6, **keywords, upsample=True, dirs=[2])
    assert chosen(x, output_size=(10, 13)).shape == (2, 6, 10, 13)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        layer_class(4, 6, dirs=[0])(x, output_size=(5, 7))


@pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
def test_both_orders_of_arguments_make_the_same_layer(layer_class):
    of_paper = [
        layer_class(3, 5, 8, [0, 2], 4, 2, 1, True),
        layer_class(3, 5, 8, [0, 2], kernel_size=4, stride=2, padding=1, upsample=True),
        layer_class(3, 5, 8, dirs=[0, 2], kernel_size=4, stride=2, padding=1, upsample=True),
        layer_class(
            in_ch=3, out_ch=5, num_features=8, dirs=[0, 2], kernel_size=4, stride=2, padding=1,
            upsample=True,
        ),
    ]  # fmt: skip
    as_convolution = layer_class(3, 5, 4, 2, 1, dirs=[0, 2], num_features=8, upsample=True)
    for layer in of_paper:
        assert repr(layer) == repr(as_convolution)


@pytest.mark.parametrize(
    "arguments, keywords, message",
    [
        ((3, 4, 3), {}, "missing 1 required keyword-only argument: 'dirs'"),
        ((3,), dict(dirs=[0]), "missing 1 required positional argument: 'out_channels'"),
        ((3, 4), dict(dirs=[0], in_ch=3), "multiple values for argument 'in_channels'"),
        ((3, 4, 8, [0], 1, 1, 0, False, 1), {}, "multiple values for argument 'in_channels'"),
        ((3, 4), dict(dirs=[0], kernel=3), "unexpected keyword argument 'kernel'"),
        (tuple(range(1, 11)), dict(dirs=[0]), "takes from 3 to 10 positional arguments"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, keywords, message):
    with pytest.raises(TypeError, match=message):
        SDNLayer(*arguments, **keywords)


@pytest.mark.parametrize("layer_class", [SDNLayer, ResSDNLayer])
def test_device_and_dtype_and_new_parameters(layer_class):
    layer = layer_class(2, 3, dirs=[0, 1], device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    first = [parameter.clone() for parameter in layer.parameters()]
    assert all(parameter.isfinite().all() for parameter in first)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(map(torch.equal, first, layer.parameters()))


def test_the_gates_of_deep_stacks_are_open_at_first():
    torch.manual_seed(0)
    paper = Sweep(50, 0)
    torch.manual_seed(0)
    deep = Sweep(50, 0, init="deep")
    difference = deep.cell.gru.bias_ih - paper.cell.gru.bias_ih
    torch.testing.assert_close(difference.chunk(3)[1], torch.full((50,), 2.0))
    assert not difference.chunk(3)[0].any() and not difference.chunk(3)[2].any()


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(copied):
    layer = ResSDNLayer(2, 3, 4, [0, 3], border="keep")
    if copied == "deepcopy":
        other = copy.deepcopy(layer)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(2, 2, 5, 4)
    assert torch.equal(other(x), layer(x))
    assert repr(other) == repr(layer)


def test_repr_tells_the_sweeps():
    assert "rows, bottom to top, border='keep', backend='torch'" in repr(
        Sweep(2, 3, border="keep", backend="torch")
    )


def test_docstring_examples():
    result = doctest.testmod(sdn)
    assert result.attempted >= 2
    assert result.failed == 0


ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from nn import SDNLayer
torch.manual_seed(0)
layer = SDNLayer(1, 1, num_features=6, dirs=[0, 1, 2, 3])
image, target = torch.randn(4, 1, 6, 6), torch.randn(4, 1, 6, 6)
optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
losses = []
for _ in range(40):
    optimizer.zero_grad()
    loss = (layer(image) - target).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses
"""


def test_the_file_alone_trains(tmp_path):
    """Copied to an empty folder, with nothing of the repository on the path (-I)."""
    shutil.copy(sdn.__file__, tmp_path / "nn.py")
    run = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
