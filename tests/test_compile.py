"""Training steps of whole models as torch.compile sees them: one graph, the same losses and gradients."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import SMALL_SDN, relative_error

from lib.DensityVAE import DensityVAE
from lib.DisentanglementVAE.model import DisentanglementVAE
from lib.training import objective
from lib.utils import keyed_noise

LOW = SMALL_SDN | dict(depth=1, ds_list=[0])  # compiling takes seconds for each layer
MODELS = {
    "density": lambda: DensityVAE(4, **LOW),
    "checkpointed": lambda: DensityVAE(4, **LOW, checkpoint_activations=True),
    "gaussian": lambda: DensityVAE(
        (4, 8), **LOW, downsample_first=True, post_model="IsoGaussian", analytic_kl=True, obs_model="DL"
    ),
    "disentanglement": lambda: DisentanglementVAE(z_size=3, sdn_nfeat=4, sdn_dirs=(0, 3)),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, x, noise=None, autocast=False) -> dict[str, torch.Tensor]:
    """Loss, rates and all gradients of a training step, by name."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x, noise)
    loss = objective(output, beta=0.5, free_bits=0.1)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "rates": output.rates.detach(), "params": output.params.detach()} | gradients


def compare(computed, expected, tolerance) -> None:
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(computed[name], value) <= tolerance, name


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, *model.image_shape), dtype=torch.uint8, generator=generator)
    return model, model.observation.encode(images), keyed_noise(model.latent_shapes, 0, range(2))


@pytest.mark.parametrize(
    ("name", "autocast"),
    [("density", False), ("density", True), ("checkpointed", False), ("gaussian", False), ("disentanglement", True)],
)
def test_a_training_step_is_one_graph(name, autocast):
    model, x, noise = build(name)
    expected = step(model, x, noise, autocast)
    torch.manual_seed(1)
    drawn = step(model, x, None, autocast)
    names = list(model.state_dict())

    model.compile(fullgraph=True, backend="aot_eager")
    compare(step(model, x, noise, autocast), expected, 1e-5)
    torch.manual_seed(1)
    compare(step(model, x, None, autocast), drawn, 1e-5)  # the noise is drawn inside the graph
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("name", ["density", "disentanglement"])
def test_batches_of_other_sizes_and_without_gradients(name):
    """As in training: a validation batch of another size, and then training again."""
    model, x, noise = build(name)
    compiled, *_ = build(name)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for batch in (2, 1, 3, 5):
        images = x[torch.arange(batch) % 2]
        torch.manual_seed(batch)
        expected = step(model, images)
        torch.manual_seed(batch)
        compare(step(compiled, images), expected, 1e-5)
        noises = [eps[torch.arange(batch) % 2] for eps in noise]
        with torch.no_grad():
            compare({"elbo": compiled(images, noises).elbo}, {"elbo": model(images, noises).elbo}, 1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", [pytest.param("density", marks=pytest.mark.slow), "disentanglement"])
def test_a_training_step_as_machine_code(name):
    model, x, noise = build(name)
    expected = step(model, x, noise)
    model.compile(fullgraph=True)
    compare(step(model, x, noise), expected, 1e-4)
