"""Networks whose convolutions are replaced: which, by what, and that they compute the same at
first."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from lib import ResSDNLayer, SDNLayer, convert


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.ReLU()),
        nn.Conv2d(8, 4, (3, 5), padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 2, 1),
    )


def test_a_residual_layer_starts_as_the_convolution_that_it_replaces():
    network = small_network().double()
    converted = copy.deepcopy(network)
    assert convert(converted, dirs=[[0, 2], [1]]) == ["0", "2.0", "3"]
    assert [type(converted[i]) for i in (0, 3, 4)] == [ResSDNLayer, ResSDNLayer, nn.Conv2d]
    assert [converted[0].dirs, converted[2][0].dirs, converted[3].dirs] == [(0, 2), (1,), (0, 2)]
    x = torch.randn(2, 3, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(converted(x), network(x), rtol=1e-12, atol=1e-12)


def test_all_parts_of_a_converted_layer_learn():
    """After a first step even those before the zeros of project-out have a gradient."""
    network = small_network()
    convert(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, target = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 4, 4)
    for _ in range(2):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "where, names",
    [
        ("2.*", ["2.0"]),
        (["0", "4"], ["0", "4"]),
        (lambda name, convolution: convolution.stride == (2, 2), ["2.0"]),
    ],
)
def test_what_is_replaced_can_be_chosen(where, names):
    network = small_network()
    assert convert(network, [0], where, residual=False, keep_function=False) == names
    layers = [name for name, each in network.named_modules() if type(each) is SDNLayer]
    assert layers == names


def test_shared_convolutions_stay_shared():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    convert(network)
    assert network[0] is network[2] and type(network[0]) is ResSDNLayer


def test_a_network_of_torchvision_keeps_its_function():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = network(x)
    assert convert(network, [0, 2], "layer4.*.conv?", num_features=16)[0] == "layer4.0.conv1"
    assert network.layer4[0].conv2.sdn.project_in_stage.out_channels == 16
    assert not network.layer4[0].conv2.training
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "module, keywords, message",
    [
        (small_network(), dict(where="nothing"), "no convolution matches where='nothing'"),
        (nn.Conv2d(3, 3, 3), {}, "itself a convolution"),
        (small_network(), dict(residual=False), "keep_function=True needs residual=True"),
    ],
)
def test_what_cannot_be_converted_is_refused(module, keywords, message):
    with pytest.raises(ValueError, match=message):
        convert(module, **keywords)
