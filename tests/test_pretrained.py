"""Models as folders: written, read, published, and started from."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import GOLDEN, SMALL_SDN, TINY, assert_one_line_error, run

import evaluate
import publish
from lib.checkpoint import CheckpointError, read_checkpoint
from lib.DensityVAE import DensityVAE
from lib.DisentanglementVAE import DisentanglementVAE
from lib.released import IMAGE_SHAPES
from lib.transfer import initialize_from, weights_of

pytest.importorskip("safetensors")

MODELS = [
    (DensityVAE, ((16, 8),), SMALL_SDN | dict(channels=1)),
    (DisentanglementVAE, (), dict(z_size=3, sdn_nfeat=4, sdn_dirs=range(2))),
]


@pytest.mark.parametrize(("kind", "positional", "arguments"), MODELS)
def test_a_model_comes_back_from_its_folder(kind, positional, arguments, tmp_path):
    model = kind(*positional, **arguments).eval()
    model.save_pretrained(tmp_path / "model", {"note": "kept"})
    again = kind.from_pretrained(tmp_path / "model")
    assert not again.training and again.arguments == model.arguments
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    x = torch.rand(2, *model.image_shape) - 0.5
    noise = [torch.randn(2, *shape) for shape in model.latent_shapes]
    assert torch.equal(model(x, noise).params, again(x, noise).params)
    assert json.loads((tmp_path / "model/config.json").read_text())["note"] == "kept"
    assert kind.from_pretrained(tmp_path / "model", backend="torch").arguments["backend"] == "torch"


def test_the_hubs_mixin_reads_the_folder(tmp_path):
    mixin = pytest.importorskip("huggingface_hub").PyTorchModelHubMixin
    model = DensityVAE(16, **SMALL_SDN)
    model.save_pretrained(tmp_path)

    class Theirs(torch.nn.Module, mixin):
        def __init__(self, image_size: int, h_size: int, depth: int, ds_list: list):
            super().__init__()
            given = SMALL_SDN | dict(h_size=h_size, depth=depth, ds_list=ds_list)
            self.inner = DensityVAE(image_size, **given)

        def load_state_dict(self, state, *args, **kwargs):
            return self.inner.load_state_dict(state)

        def state_dict(self, *args, **kwargs):
            return self.inner.state_dict()

    assert torch.equal(Theirs.from_pretrained(str(tmp_path)).inner.h, model.h)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    DensityVAE(16, **SMALL_SDN).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a DensityVAE, not a DisentanglementVAE"):
        DisentanglementVAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit together"):
        DensityVAE.from_pretrained(tmp_path, h_size=12)
    with pytest.raises(CheckpointError, match="by which run it was trained"):
        read_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        DensityVAE.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no folder of a model"):
        DensityVAE.from_pretrained(tmp_path)


def test_a_run_is_published_with_its_card(finished, tmp_path, capsys):
    target, path = tmp_path / "mine", finished / "checkpoints/tiny/last.ckpt"
    figs = finished / "figs/tiny"
    loaded = evaluate.open_model(path, "auto", "cpu")
    result = {"elbo": dict(bits_per_dim=5.25, standard_error=0.125, images=11, command="a | b")}
    figs.mkdir(parents=True, exist_ok=True)
    (figs / "results.json").write_text(json.dumps(result))
    (figs / ".weights").write_text(loaded.fingerprint)
    try:
        publish.main(["--checkpoint", str(path), str(target), "--output_dir", str(finished)])
    finally:
        (figs / "results.json").unlink()
        (figs / ".weights").unlink()
    card = (target / "README.md").read_text()
    assert "trained on ImageNet32 for 6 optimizer steps" in card
    assert r"| elbo | 5.2500 ± 0.1250 bits/dim, 11 images | `a \| b` |" in card
    assert "- torch: `" in card and "--h_size 8" in card
    published = evaluate.open_model(target, "auto", "cpu")
    assert (published.fingerprint, published.step) == (loaded.fingerprint, 6)
    assert str(finished) not in (target / "config.json").read_text()
    assert torch.equal(DensityVAE.from_pretrained(target).h, loaded.model.h)
    with pytest.raises(SystemExit, match="2"):
        publish.main(["--checkpoint", str(path), str(target)])
    assert "exists already" in capsys.readouterr().err


def test_what_fits_is_taken_module_by_module():
    path = GOLDEN / "tiny_8bit.ckpt"
    loaded = evaluate.open_model(path, "auto", "cpu")
    size = IMAGE_SHAPES[loaded.config.dataset][1]
    architecture = loaded.config.architecture()
    same = DensityVAE(size, **architecture)
    lines = initialize_from(same, path)
    assert len(lines) == 1
    stored = weights_of(path)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in same.state_dict().items())

    grey = DensityVAE(size, channels=1, **architecture | dict(depth=architecture["depth"] + 1))
    before = {name: tensor.clone() for name, tensor in grey.state_dict().items()}
    lines = initialize_from(grey, path)
    after = grey.state_dict()
    assert any("of another shape there" in line and "first_layer" in line for line in lines)
    assert any("not in the checkpoint" in line and "ladder_layers" in line for line in lines)
    # The norms would fit, but not the weights that they belong to.
    norm = "first_layer.parametrizations.weight.original0"
    assert torch.equal(after[norm], before[norm]) and torch.equal(after["h"], stored["h"])
    with pytest.raises(CheckpointError, match="nothing of it fits"):
        initialize_from(DisentanglementVAE(), path)


def test_a_run_starts_from_other_weights_and_goes_on_from_its_own(finished, images, tmp_path):
    start = finished / "checkpoints/tiny/last.ckpt"
    flags = [*TINY, "--root", images, "--output_dir", tmp_path, "--exp_name", "tuned"]
    flags += ["--init_from", start, "--make_checkpoint", "--use_checkpoint"]
    done = run("train.py", *flags, "--iters", 1, "--lrate", 1e-9)
    assert done.returncode == 0, done.stderr
    assert f"--init_from {start}: " in done.stderr and "modules" in done.stderr
    own = weights_of(tmp_path / "checkpoints/tuned/last.ckpt")
    for name, tensor in weights_of(start).items():
        torch.testing.assert_close(own[name], tensor, atol=1e-6, rtol=0)
    resumed = run("train.py", *flags, "--iters", 2, "--lrate", 1e-9)
    assert resumed.returncode == 0 and "modules" not in resumed.stderr, resumed.stderr
    flags[flags.index(start)] = tmp_path / "none.ckpt"
    flags[flags.index("tuned")] = "other"
    assert_one_line_error(run("train.py", *flags), "none.ckpt")


def test_a_beta_vae_starts_from_one_with_fewer_dimensions(beta_run):
    start = beta_run / "checkpoints/beta/last.ckpt"
    model = DisentanglementVAE(z_size=4, sdn_nfeat=4)
    lines = initialize_from(model, start)
    assert any("of another shape there" in line for line in lines)
