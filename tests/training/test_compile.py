"""Training steps of whole models as torch.compile sees them: one graph, the same losses and
gradients."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from helpers import SMALL_SDN, TINY, csv_rows, relative_error, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.config import TrainConfig
from lib.DensityVAE import DensityVAE
from lib.DisentanglementVAE.model import DisentanglementVAE
from lib.sweeps import torch_backend
from lib.training.base import objective
from lib.training.run import compile_options
from lib.utils import keyed_noise

LOW = SMALL_SDN | dict(depth=1, ds_list=[0])  # compiling takes seconds for each layer
MODELS = {
    "density": lambda: DensityVAE(4, **LOW),
    "checkpointed": lambda: DensityVAE(4, **LOW, checkpoint_activations=True),
    "gaussian": lambda: DensityVAE(
        (4, 8),
        **LOW,
        downsample_first=True,
        post_model="IsoGaussian",
        analytic_kl=True,
        obs_model="DL",
    ),
    "disentanglement": lambda: DisentanglementVAE(z_size=3, sdn_nfeat=4, sdn_dirs=(0, 3)),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model, x, noise=None, autocast=False) -> dict[str, torch.Tensor]:
    """Loss, rates and all gradients of a training step, by name."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x, noise)
    loss = objective(output, beta=0.5, free_bits=0.1)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {
        "loss": loss.detach(),
        "rates": output.rates.detach(),
        "params": output.params.detach(),
    } | gradients


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
    [
        ("density", False),
        ("density", True),
        ("checkpointed", False),
        ("gaussian", False),
        ("disentanglement", True),
    ],
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
            compare(
                {"elbo": compiled(images, noises).elbo}, {"elbo": model(images, noises).elbo}, 1e-5
            )


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_training_step_as_machine_code():
    """Of the smaller model; the other is compiled in a whole run below."""
    model, x, noise = build("disentanglement")
    expected = step(model, x, noise)
    model.compile(fullgraph=True)
    compare(step(model, x, noise), expected, 1e-4)


class Devices(TorchDispatchMode):
    """Notes every tensor that is not on the device meta."""

    def __init__(self):
        super().__init__()
        self.calls, self.elsewhere = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [
            each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)
        ]
        self.elsewhere += [function for each in tensors if not each.is_meta]
        self.calls += 1
        return result


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_stays_on_its_device(name):
    """What CUDA graphs need, and what keeps a GPU busy: no tensor of another device, and no number
    that is read: a tensor without content raises when one is."""
    with torch.device("meta"), Devices() as devices:
        model = MODELS[name]()
        output = model(torch.zeros(2, *model.image_shape))
        objective(output, beta=0.5, free_bits=0.1).backward()
    assert devices.calls > 100 and devices.elsewhere == []


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("product_dtype", [torch.float32, torch.float16])
def test_a_sweep_stays_on_its_device(reverse, product_dtype):
    """The inside of the operator, which the test above does not see."""
    with torch.device("meta"), torch.no_grad(), Devices() as devices:
        lines, cell = torch.zeros(4, 5, 3, 6), torch.nn.GRUCell(18, 6)
        weights = (cell.weight_ih, cell.weight_hh)
        shape, dtype = torch_backend.kept(lines, product_dtype)
        gates = torch.empty(shape, dtype=dtype)
        biases, how = (cell.bias_ih, cell.bias_hh), (reverse, False, product_dtype)
        corrected = torch_backend.sweep(lines, *weights, *biases, *how, gates)
        torch_backend.sweep_backward(corrected, lines, *weights, *biases, corrected, *how, gates)
    assert devices.calls > 100 and devices.elsewhere == []


def test_graphs_are_replayed_where_the_kernels_cannot_run(monkeypatch):
    """torch's backend "cudagraphs" runs the same graph step by step where there is no GPU."""
    gpu, cpu = {"accelerator": "gpu"}, {"accelerator": "cpu"}
    replayed = {"backend": "cudagraphs", "dynamic": False}
    module = sys.modules["lib.training.run"]  # the package's `run` is the function
    monkeypatch.setattr(module, "why_no_triton", lambda device: "of the test")
    assert compile_options(TrainConfig(), gpu) == replayed
    assert compile_options(TrainConfig(), cpu) == {}
    assert compile_options(TrainConfig(accumulate_grad_batches=2), gpu) == {}
    monkeypatch.setattr(module, "why_no_triton", lambda device: None)
    assert compile_options(TrainConfig(), gpu) == {}
    assert compile_options(TrainConfig(backend="torch"), gpu) == replayed

    model, x, noise = build("density")
    expected = step(model, x, noise)
    model.compile(fullgraph=True, **replayed)
    compare(step(model, x, noise), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_run_is_the_same_run(tmp_path, images):
    """With noise by image, `--compile` changes rounding only: losses, validation, and the run goes
    on without it. So do two processes, which compile the same code side by side."""
    common = [
        *TINY,
        "--root",
        images,
        "--make_checkpoint",
        "--output_dir",
        tmp_path,
        "--noise",
        "image",
    ]
    common += [
        "--depth",
        1,
        "--ds_list",
        0,
        "--free_bits",
        0,
    ]  # whose mean is that of a process's own images
    # Batches of the same size, so that the code is compiled once.
    one, two = ["--accumulate_grad_batches", 2], ["--num_processes", 2]
    for name, flags in (
        ("plain", one),
        ("compiled", [*one, "--compile"]),
        ("two", [*two, "--compile"]),
    ):
        done = run("train.py", *common, *flags, "--exp_name", name, "--iters", 4)
        assert done.returncode == 0, done.stderr
    done = run(
        "train.py", *common, *one, "--exp_name", "compiled", "--iters", 5, "--use_checkpoint"
    )
    assert done.returncode == 0, done.stderr
    names = ("plain", "compiled", "two")
    plain, *others = (csv_rows(tmp_path / f"checkpoints/{name}/steps.csv") for name in names)
    assert [[int(row["step"]) for row in rows] for rows in others] == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4],
    ]
    for name, rows in zip(names[1:], others, strict=True):
        for one, other in zip(plain, rows, strict=False):
            if name != "two":  # logged is the loss of the first process's images
                assert float(other["neg_elbo"]) == pytest.approx(float(one["neg_elbo"]), rel=1e-4)
            assert float(other["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-3)
    plain, *others = (csv_rows(tmp_path / f"checkpoints/{name}/epochs.csv") for name in names)
    for rows in others:
        assert float(rows[0]["val_neg_elbo"]) == pytest.approx(
            float(plain[0]["val_neg_elbo"]), rel=1e-3
        )
