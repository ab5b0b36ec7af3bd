"""Checkpoints of the authors' release: the golden numbers in both generations of names, damage, and
conversion."""

from __future__ import annotations

import csv
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import GOLDEN, assert_one_line_error, relative_error, resumable, run

from data.get_dataset import DATASETS
from lib.checkpoint import CheckpointError, read_checkpoint, stored_config
from lib.evaluation.loading import load_model
from lib.released import IMAGE_SHAPES, translate
from lib.training.released import convert
from lib.utils import nats_to_bits_per_dim

OLDER = {
    "project_in_stage": "pre_cnn",
    "sdn_correction_stage": "sdn_update_network",
    "project_out_stage": "post_cnn",
}


def golden(name: str) -> dict:
    return torch.load(GOLDEN / f"{name}.ckpt", map_location="cpu", weights_only=True)


def older_generation(checkpoint: dict) -> dict:
    """The same checkpoint as the authors' earlier program would have named its tensors."""

    def older(name: str) -> str:
        return re.sub("|".join(OLDER), lambda part: OLDER[part[0]], name)

    return checkpoint | {
        "state_dict": {older(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    }


def saved(checkpoint: dict, folder) -> str:
    path = folder / "changed.ckpt"
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("generation", ["newer", "older"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["tiny_8bit", "tiny_5bit"])
@torch.no_grad()
def test_golden_model(name, backend, generation, tmp_path):
    path = GOLDEN / f"{name}.ckpt"
    if generation == "older":
        path = saved(older_generation(golden(name)), tmp_path)
        assert any("pre_cnn" in key for key in golden_names(path))
    model = load_model(path, IMAGE_SHAPES, backend).model
    expected = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}_expected.npz").items()}
    depth = len(model.ladder_layers)
    output = model(expected["x"], [expected[f"noise/{i}"] for i in range(depth)])
    actual = {f"z/{i}": z for i, z in enumerate(output.latents)}
    actual["top_of_bottom_up"] = model.bottom_up(expected["x"])[1]
    actual |= {"kl": output.rates.sum(1), "logpxz": -output.distortion, "params": output.params}
    actual["elbo_bpd"] = nats_to_bits_per_dim(-output.elbo, model.image_shape)
    actual["decode_z"] = model.decode([expected[f"z/{i}"] for i in range(depth)])
    params, _ = model.sample(1, temperature=0.0)
    actual["sample_temperature0"] = model.observation.most_probable(params)
    assert expected.keys() - actual.keys() == {"x", *(f"noise/{i}" for i in range(depth))}
    for key, tensor in actual.items():
        assert relative_error(tensor, expected[key]) < 1e-4, key


def golden_names(path) -> list[str]:
    return list(read_checkpoint(path)["state_dict"])


def test_a_checkpoint_with_dl_is_refused(tmp_path):
    """Its model saw k / (2^nbits - 1) - 0.5, ours would show it k / 2^nbits - 0.5."""
    checkpoint = golden("tiny_8bit")
    checkpoint["hyper_parameters"]["obs_model"] = "DL"
    path = saved(checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match="observation model DL, whose data are .* other"):
        translate(read_checkpoint(path), path)
    with pytest.raises(CheckpointError, match="observation model DL"):
        convert(path, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["tiny_8bit", "tiny_5bit"])
def test_every_stored_tensor_is_used_or_listed(name):
    checkpoint = golden(name)
    released = translate(checkpoint, "golden")
    assert len(released.average) + len(released.current) + len(released.ignored) == len(
        checkpoint["state_dict"]
    )
    assert all(stored.endswith(".mask") for stored in released.ignored)
    (remark,) = released.remarks()
    assert remark.startswith("ignored: ") and all(stored in remark for stored in released.ignored)


def test_the_configuration_is_rebuilt():
    loaded = load_model(GOLDEN / "tiny_5bit.ckpt", IMAGE_SHAPES)
    config, stored = loaded.config, golden("tiny_5bit")["hyper_parameters"]
    assert loaded.remarks and loaded.step == 1234 and not loaded.model.training
    ours = dict(border="keep", block="sdn", highway="auto", dml_tails="approximate")
    assert {name: getattr(config, name) for name in ours} == ours
    others = "dataset lrate free_bits ema_coef random_seed amp".split()
    for name in (*config.architecture(), *others):
        if name not in ours:
            assert getattr(config, name) == stored[name], name
    assert config.root == "data", "folders are the authors'"


def test_settings_may_be_numpy_scalars(tmp_path):
    checkpoint = golden("tiny_8bit")
    settings = checkpoint["hyper_parameters"]
    settings |= dict(
        z_size=np.int64(2),
        lrate=np.float64(0.002),
        free_bits=np.float32(0.25),
        ds_list=[np.int32(0)],
    )
    settings["downsample_first"] = np.bool_(False)
    config = load_model(
        saved(checkpoint | {"global_step": np.int64(7)}, tmp_path), IMAGE_SHAPES
    ).config
    assert (config.z_size, config.lrate, config.free_bits, config.ds_list) == (2, 0.002, 0.25, [0])
    assert config.downsample_first is False
    assert type(config.z_size) is int and type(config.free_bits) is float


class AttributeDict(dict):
    """Stands for the class that pytorch-lightning 0.9 stored hyper-parameters in."""


AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before torch 1.6"])
def test_settings_may_be_the_dictionary_of_lightning_0_9(archive, tmp_path, monkeypatch):
    import pytorch_lightning.utilities.parsing as parsing

    monkeypatch.setattr(parsing, "AttributeDict", AttributeDict)
    checkpoint = golden("tiny_8bit")
    checkpoint["hyper_parameters"] = AttributeDict(checkpoint["hyper_parameters"])
    path = tmp_path / "changed.ckpt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=archive)
    assert b"AttributeDict" in path.read_bytes()
    assert type(read_checkpoint(path)["hyper_parameters"]) is dict
    assert (
        load_model(path, IMAGE_SHAPES).config
        == load_model(GOLDEN / "tiny_8bit.ckpt", IMAGE_SHAPES).config
    )


def test_settings_of_training_that_cannot_be_do_not_stop_an_evaluation(tmp_path):
    checkpoint = golden("tiny_8bit")
    checkpoint["hyper_parameters"] |= dict(
        ema_coef=1.0, figsize=(3, 4), accumulate_grad_batches={0: 2}, lrate=0.25
    )
    path = saved(checkpoint, tmp_path)
    loaded = load_model(path, IMAGE_SHAPES)
    assert loaded.config.lrate == 0.25
    (remark,) = [line for line in loaded.remarks if "cannot be" in line]
    assert remark.startswith("ignored: ema_coef, accumulate_grad_batches, figsize (")
    with pytest.raises(CheckpointError, match="its hyper-parameters cannot be: --ema_coef must be"):
        convert(path, tmp_path / "new.ckpt")


def test_what_is_neither_averaged_nor_a_parameter_is_listed(tmp_path):
    checkpoint = golden("tiny_8bit")
    checkpoint["state_dict"]["scaler.scale"] = torch.zeros(())
    path = saved(checkpoint, tmp_path)
    line = "ignored: scaler.scale (neither averaged nor a parameter of the model)"
    assert line in load_model(path, IMAGE_SHAPES).remarks
    assert line in convert(path, tmp_path / "new.ckpt")


def test_without_decay_the_average_is_the_current_weights(tmp_path):
    checkpoint = golden("tiny_8bit")
    checkpoint["hyper_parameters"]["ema_coef"] = 0.0
    model = load_model(saved(checkpoint, tmp_path), IMAGE_SHAPES).model
    assert torch.equal(model.h, checkpoint["state_dict"]["h"])
    assert not torch.equal(model.h, checkpoint["state_dict"]["ema.shadow_params.h"])


def test_the_sizes_of_the_authors_data_sets_are_those_of_the_registry():
    assert all(DATASETS[name].shape == shape for name, shape in IMAGE_SHAPES.items())


def test_counters_of_the_average_are_ignored_and_half_precision_is_widened(tmp_path):
    checkpoint = golden("tiny_8bit")
    checkpoint["state_dict"] |= {
        "ema.num_updates": torch.tensor(3),
        "ema.shadow_params.h": torch.ones(8).half(),
    }
    released = translate(checkpoint, "golden")
    assert released.ignored["ema.num_updates"] == "a counter of the average"
    assert released.average["h"].dtype == torch.float32


def without(name):
    return lambda c: c["state_dict"].pop(name)


def changed(name, tensor):
    return lambda c: c["state_dict"].update({name: tensor})


def setting(name, value):
    return lambda c: c["hyper_parameters"].update({name: value})


def without_average(checkpoint):
    state = checkpoint["state_dict"]
    for name in [name for name in state if name.startswith("ema.")]:
        del state[name]


GRU = "ladder_layers.0.down_a.sdn.sdn_correction_stage.0.cell.gru.weight_ih"
MASK = "ladder_layers.1.post_model.arnn.conv_a.mask"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"ema.shadow_params.{GRU.replace('.', '^')}"), f"the averaged weights lack {GRU}"),
        (
            changed(f"ema.shadow_params.{GRU.replace('.', '^')}", torch.zeros(180, 60)),
            rf"in the averaged weights {GRU} is \[180, 60\], its hyper-parameters make it "
            r"\[180, 180\]",
        ),
        (
            changed("ema.shadow_params.new^weight", torch.zeros(2)),
            "the averaged weights hold new.weight",
        ),
        (
            changed(MASK, torch.ones(100, 2, 3, 3)),
            f"{MASK} is not the raster-order mask of this model",
        ),
        (
            changed("ladder_layers.9.arnn.mask", torch.ones(2)),
            "ladder_layers.9.arnn.mask is not the raster-order mask",
        ),
        (changed("h", 3), "h is a int, not a dense tensor"),
        (
            without_average,
            r"has no averaged weights \(ema.shadow_params.\*\), which evaluation needs",
        ),
        (lambda c: c["hyper_parameters"].pop("nbits"), "its hyper-parameters lack nbits"),
        (lambda c: c["hyper_parameters"].pop("dataset"), "its hyper-parameters lack dataset"),
        (setting("dataset", "LSUN"), "is of the data set LSUN; known are CIFAR10"),
        (setting("z_size", "many"), "its hyper-parameter z_size cannot be 'many'"),
        (setting("ds_list", 3), "its hyper-parameter ds_list cannot be 3"),
        (setting("depth", float("inf")), "its hyper-parameter depth cannot be inf"),
        (setting("depth", 2.5), "its hyper-parameter depth cannot be 2.5"),
        (setting("downsample_first", "no"), "its hyper-parameter downsample_first cannot be 'no'"),
        (lambda c: c.update(global_step="many"), "its global_step cannot be 'many'"),
        (lambda c: c.update(epoch=-1), "its epoch cannot be -1"),
        (without("h"), "the weights lack h"),
        (
            changed("h", torch.zeros(3)),
            r"in the weights h is \[3\], its hyper-parameters make it \[8\]",
        ),
        (lambda c: c["state_dict"].update({7: torch.zeros(1)}), "its tensors have no names"),
        (changed("h", torch.zeros(8).to_sparse()), "h is a Tensor, not a dense tensor"),
        (
            changed(GRU.replace("sdn_correction_stage", "sdn_update_network"), torch.zeros(1)),
            f"{GRU} is stored twice",
        ),
        (
            setting("sdn_num_dirs", 7),
            "its hyper-parameters cannot be: --sdn_num_dirs must be at most 4; got 7",
        ),
        (setting("depth", 3), "the averaged weights lack ladder_layers.2"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    checkpoint = golden("tiny_8bit")
    change(checkpoint)
    path = saved(checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match=f"changed.ckpt.*{message}") as caught:
        load_model(path, IMAGE_SHAPES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before torch 1.6"])
def test_any_damage_is_one_clear_error(archive, tmp_path):
    """Files cut off anywhere, or with bytes of the dictionary replaced, are read or refused with
    one line."""
    path = tmp_path / "damaged.ckpt"
    torch.save(golden("tiny_5bit"), path, _use_new_zipfile_serialization=archive)
    load_model(path, IMAGE_SHAPES)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: int(generator.integers(len(whole)))]
        for position in generator.integers(0, min(40_000, len(damaged)), trial % 3):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            load_model(path, IMAGE_SHAPES)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused >= 30


def test_conversion_keeps_everything_and_training_goes_on(images, tmp_path):
    """A released checkpoint with the optimizer's moments, of the test's data set, is converted and
    trained on."""
    checkpoint = golden("tiny_8bit")
    names = [
        n for n in checkpoint["state_dict"] if not n.startswith("ema.") and not n.endswith(".mask")
    ]
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for number, name in enumerate(names):
        shape = checkpoint["state_dict"][name].shape
        if "ladder_layers.1.up_b" not in name:  # never got a gradient
            exp_avg, exp_inf = (torch.rand(shape, generator=generator) for _ in range(2))
            moments[number] = {"step": 1234, "exp_avg": exp_avg, "exp_inf": exp_inf}
    checkpoint["optimizer_states"] = [{"state": moments, "param_groups": [{"lr": 0.002}]}]
    checkpoint["hyper_parameters"] |= dict(dataset="ImageNet32", lrate_decay=0.5, amp=False)
    target = tmp_path / "checkpoints/authors/last.ckpt"
    report = convert(saved(checkpoint, tmp_path), target)
    assert (
        f"{target}: ImageNet32, epoch 3, step 1234" in report
        and "optimizer moments: kept" in report
    )

    released = translate(checkpoint, "golden")
    converted = read_checkpoint(target)
    assert stored_config(converted, target) == released.config
    state = converted["state_dict"]
    for prefix, tensors in (("model.", released.current), ("average.module.", released.average)):
        for name, tensor in tensors.items():
            assert torch.equal(state[prefix + name], tensor), name
    loaded = load_model(target, IMAGE_SHAPES)
    assert not loaded.remarks
    assert loaded.fingerprint == load_model(tmp_path / "changed.ckpt", IMAGE_SHAPES).fingerprint

    (line,) = [line for line in report if line.startswith("train on with: ")]
    command = shlex.split(line.removeprefix("train on with: "))
    assert command[:2] == ["python", "train.py"]
    extra = ["--root", images, "--output_dir", tmp_path]
    extra += "--gpus 0 --num_workers 0 --logger none --figsize 2 --max_epochs 4".split()
    done = run("train.py", *command[2:], *extra, *"--batch 4 --batch_val 4".split())
    assert done.returncode == 0, done.stderr
    after = read_checkpoint(target)
    assert (after["epoch"], after["global_step"]) == (4, 1234 + 8), (
        "one epoch of 32 images, the fourth"
    )
    assert after["state_dict"]["average.n_averaged"] == 1234 + 8
    rows = list(csv.DictReader((target.parent / "steps.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1235, 1243))
    assert float(rows[0]["lr"]) == pytest.approx(0.002 * 0.5**3), "three epochs of decay"
    assert after["optimizer_states"][0]["state"][0]["step"] == 1234 + 8
    assert after["optimizer_states"][0]["state"][0]["exp_inf"].max() > 0.9, (
        "moments decay slowly from the stored ones"
    )
    difference = relative_error(after["state_dict"]["average.module.h"], released.average["h"])
    assert 0 < difference < 0.1, "the average moved on, a little"


def test_conversion_without_moments_says_so(tmp_path):
    report = convert(GOLDEN / "tiny_5bit.ckpt", tmp_path / "new.ckpt")
    assert "optimizer moments: not in the file: they start anew" in report
    assert not [line for line in report if line.startswith("train on")]
    assert {path.name for path in tmp_path.iterdir()} == {"new.ckpt"}


def test_conversion_refuses_in_one_line(finished, tmp_path):
    def refused(source, target, *parts):
        done = run("-m lib.released", source, target)
        assert_one_line_error(done, *parts)

    taken = tmp_path / "taken.ckpt"
    taken.write_text("mine")
    refused(GOLDEN / "tiny_8bit.ckpt", taken, "taken.ckpt exists already: give another name")
    assert taken.read_text() == "mine"
    refused(
        finished / "checkpoints/tiny/last.ckpt", tmp_path / "x", "is not in the authors' format"
    )
    refused(tmp_path / "absent.ckpt", tmp_path / "x", "no checkpoint at")
    refused(GOLDEN / "tiny_8bit.ckpt", taken / "x.ckpt", "cannot be written")
    assert {path.name for path in tmp_path.iterdir()} == {"taken.ckpt"}


def test_training_on_a_released_file_says_how_to_convert_it(images, tmp_path):
    folder = tmp_path / "checkpoints/authors"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes((GOLDEN / "tiny_8bit.ckpt").read_bytes())
    flags = [*resumable(images, tmp_path), "--exp_name", "authors"]
    assert_one_line_error(run("train.py", *flags), "convert it: python -m lib.released")


@pytest.mark.parametrize("value", [torch.zeros(0), torch.ones(1), torch.eye(30)], ids=str)
@pytest.mark.parametrize("name", ["amp", "depth", "ds_list", "lrate"])
def test_settings_that_are_tensors_are_refused_in_one_line(name, value):
    checkpoint = torch.load(GOLDEN / "tiny_8bit.ckpt", weights_only=True)
    checkpoint["hyper_parameters"][name] = value
    with pytest.raises(CheckpointError, match=f"hyper-parameter {name} cannot be") as refusal:
        translate(checkpoint, "x.ckpt", training=True)
    assert "\n" not in str(refusal.value)
