"""Checkpoints that are damaged, of another model or version, or malicious: one line, and nothing in
them runs."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from endings import Ending, assert_refused, assert_told, ending_of, generated, leaving_files_alone
from helpers import GOLDEN, TINY
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import train
from lib import released
from lib.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

COMMANDS = {
    "evaluate.py": evaluate.main,
    "train.py": train.main,
    "python -m lib.released": released.main,
}
READERS = st.sampled_from(sorted(COMMANDS))
FRACTIONS = st.floats(0, 1, exclude_max=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With an experiment called tiny, whose checkpoint the tests write, and where training itself
    is left out."""
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints/tiny").mkdir(parents=True)
    return tmp_path


def golden() -> dict:
    """A small checkpoint of the authors' program, of a data set that is there."""
    checkpoint = torch.load(GOLDEN / "tiny_8bit.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["dataset"] = "ImageNet32"
    return checkpoint


def read_with(program: str, folder: Path, images: Path) -> Ending:
    """What a command does with the experiment's last checkpoint; it leaves every file alone."""
    last = folder / "checkpoints/tiny/last.ckpt"
    arguments = {
        "evaluate.py": [
            "--checkpoint",
            last,
            "--root",
            images,
            "--elbo",
            "--limit",
            1,
            "--batch",
            1,
        ],
        "train.py": [*TINY, "--root", images, "--exp_name", "tiny", "--use_checkpoint"],
        "python -m lib.released": [last, folder / "converted.ckpt"],
    }
    shutil.rmtree(folder / "figs", ignore_errors=True)  # which belongs to another checkpoint
    (folder / "converted.ckpt").unlink(missing_ok=True)
    with leaving_files_alone(folder, images):
        ending = ending_of(COMMANDS[program], arguments[program])
    assert_told(ending, program)
    assert (
        ending.status == 2
        or program != "evaluate.py"
        or (folder / "figs/tiny/results.json").exists()
    )
    return ending


@pytest.mark.slow
@generated(75)
@given(
    released_one=st.booleans(),
    cut=st.none() | FRACTIONS,
    changes=st.lists(st.tuples(FRACTIONS, st.integers(1, 255)), max_size=4),
    program=READERS,
)
def test_damaged_bytes(folder, finished, images, released_one, cut, changes, program):
    """Cut off anywhere, or with bits flipped anywhere; of our own files, no flip that changes the
    content goes unseen."""
    last = folder / "checkpoints/tiny/last.ckpt"
    if released_one:
        torch.save(golden(), last)
    whole = (last if released_one else finished / "checkpoints/tiny/last.ckpt").read_bytes()
    damaged = bytearray(whole if cut is None else whole[: int(cut * len(whole))])
    for place, flipped in changes:
        if damaged:
            damaged[int(place * len(damaged))] ^= flipped
    last.write_bytes(damaged)
    ending = read_with(program, folder, images)
    if ending.status == 0 and not released_one:
        ours = read_checkpoint(last)["state_dict"]
        last.write_bytes(whole)
        theirs = read_checkpoint(last)["state_dict"]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


NUMBERS = [True, -1, 0, 1, 1.5, float("nan"), float("inf"), -0.5, 10**9, 2**70]
TEXTS = ["", "x", "0", "a\nb", "\0", "\udcff", "64-true", "3DShapes", b"x"]
LISTS = [[], [1], [None], ["x"], [2**70], (1, 2), {}, {"a": 1}, {1: 2}]
JUNK = st.sampled_from([None, *NUMBERS, *TEXTS, *LISTS])
TENSORS = {
    "empty": lambda tensor: tensor.reshape(-1)[:0],
    "one more dimension": lambda tensor: tensor[None],
    "larger": lambda tensor: torch.cat([tensor.reshape(-1), torch.zeros(3)]),
    "scalar": lambda tensor: torch.tensor(3.0),
    "not numbers": lambda tensor: torch.full(tensor.shape, float("nan")),
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: torch.empty(tensor.shape, device="meta"),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 1.0, 0, torch.qint8),
} | {
    kind: lambda tensor, kind=kind: tensor.to(getattr(torch, kind))
    for kind in ("float64", "float16", "bfloat16", "int32", "bool", "complex64")
}


EXTRA = ["average.module.x", "model.x", "ladder_layers.9.h", "x", 7, "é"]  # names of tensors


def settings_of(checkpoint: dict) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(checkpoint["hyper_parameters"]) + ["unknown", ""])


def change(checkpoint: dict, data: st.DataObject) -> dict:
    """The checkpoint with something in it that is missing, another, or too much."""
    kind = data.draw(st.sampled_from(["setting", "setting", "entry", "tensor", "tensor", "whole"]))
    if kind == "whole":
        return data.draw(JUNK | st.just(checkpoint["state_dict"]))
    place = {"setting": "hyper_parameters", "tensor": "state_dict"}.get(kind)
    part = dict(checkpoint[place]) if place else dict(checkpoint)
    name = data.draw(
        settings_of(checkpoint) if kind == "setting" else st.sampled_from(sorted(part))
    )
    how = data.draw(st.sampled_from(["junk", "junk", "missing", "extra"]))
    if how == "missing":
        part.pop(name, None)
    elif how == "extra":
        part[data.draw(st.sampled_from(EXTRA))] = torch.ones(2)
    elif kind == "tensor" and isinstance(part[name], torch.Tensor) and data.draw(st.integers(0, 3)):
        part[name] = TENSORS[data.draw(st.sampled_from(sorted(TENSORS)))](part[name])
    else:
        part[name] = data.draw(JUNK | st.just(torch.zeros(3)) | st.just(torch.zeros(0)))
    return checkpoint | {place: part} if place else part


@pytest.mark.slow
@generated(140)
@given(released_one=st.booleans(), data=st.data(), program=READERS)
def test_other_content(folder, finished, images, released_one, data, program):
    """Settings, tensors and counters that are missing, of another type, another shape, or
    unknown."""
    original = (
        golden() if released_one else read_checkpoint(finished / "checkpoints/tiny/last.ckpt")
    )
    changed = change(original, data)
    if isinstance(changed, dict) and not released_one:
        write_checkpoint(changed, folder / "checkpoints/tiny/last.ckpt")
    else:
        torch.save(changed, folder / "checkpoints/tiny/last.ckpt")
    read_with(program, folder, images)


class Runs:
    """Pickled as a call of a function."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


# Every way of the pickle machine to make a call, of one that leaves a file.
OPCODES = {
    "REDUCE": lambda module, name, arg: b"\x80\x02c%b\n%b\n%b\x85R." % (module, name, text(arg)),
    "INST": lambda module, name, arg: b"(%bi%b\n%b\n." % (text(arg), module, name),
    "OBJ": lambda module, name, arg: b"\x80\x02(c%b\n%b\n%bo." % (module, name, text(arg)),
    "NEWOBJ": lambda module, name, arg: b"\x80\x02c%b\n%b\n%b\x85\x81." % (module, name, text(arg)),
    "NEWOBJ_EX": lambda module, name, arg: (
        b"\x80\x04c%b\n%b\n%b\x85}\x92." % (module, name, text(arg))
    ),
    "STACK_GLOBAL": lambda module, name, arg: (
        b"\x80\x04%b%b\x93%b\x85R." % (text(module.decode()), text(name.decode()), text(arg))
    ),
    "dotted": lambda module, name, arg: b"\x80\x04%b%b\x93%b\x85R." % (
        text("torch.serialization"), text("os.system"), text(arg)
    ),
    "persistent": lambda module, name, arg: (
        b"\x80\x02(c%b\n%b\n%b\x85Rtq\x00Q." % (module, name, text(arg))
    ),
}  # fmt: skip
CALLS = {
    "os.system": (b"os", b"system", "touch canary"),
    "posix.system": (b"posix", b"system", "touch canary"),
    "eval": (b"builtins", b"eval", "open('canary', 'w')"),
    "exec": (b"builtins", b"exec", "open('canary', 'w')"),
    "Python 2": (b"__builtin__", b"eval", "open('canary', 'w')"),
    "mkdir": (b"os", b"mkdir", "canary"),
    "Popen": (b"subprocess", b"getoutput", "touch canary"),
    "torch": (b"torch.utils.collect_env", b"run", "touch canary"),
    "numpy": (b"numpy.testing._private.utils", b"runstring", "open('canary', 'w')"),
    "timeit": (b"timeit", b"timeit", "open('canary', 'w')"),
}


def zipped(pickled: bytes, **others: bytes) -> bytes:
    """A file as torch.save writes it since 1.6."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {
            "data.pkl": pickled,
            "version": b"3\n",
            "byteorder": b"little",
        }.items():
            archive.writestr(f"archive/{name}", content)
        for name, content in others.items():
            archive.writestr(f"archive/{name.replace('__', '/').replace('_pkl', '.pkl')}", content)
    return buffer.getvalue()


def tarred(pickled: bytes) -> bytes:
    """A file as torch.save wrote it before 0.2."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return buffer.getvalue()


OLD_START = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001))
HARMLESS = pickle.dumps({"state_dict": {}, "hyper_parameters": {}, "global_step": 0}, protocol=2)
CONTAINERS = {
    "bare": lambda pickled: pickled,
    "zip": zipped,
    "zip in a zip": lambda pickled: zipped(zipped(pickled), data__0=zipped(pickled)),
    "compiled": lambda pickled: zipped(HARMLESS, constants_pkl=pickled, code__x=b""),
    "before torch 1.6": lambda pickled: OLD_START + pickle.dumps({}, protocol=2) + pickled,
    "in its first number": lambda pickled: pickled + OLD_START,
    "in its system's description": lambda pickled: OLD_START + pickled + HARMLESS,
    "before torch 0.2": tarred,
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("opcode", OPCODES)
def test_nothing_in_a_malicious_file_runs(opcode, container, folder, images):
    last = folder / "checkpoints/tiny/last.ckpt"
    for call in CALLS.values():
        last.write_bytes(CONTAINERS[container](OPCODES[opcode](*call)))
        with pytest.raises(CheckpointError, match=r"last\.ckpt"):
            read_checkpoint(last)
    for program in COMMANDS:
        assert_refused(read_with(program, folder, images), program, "last.ckpt")
    assert not (folder / "canary").exists()


@pytest.mark.parametrize(
    "place", ["state_dict", "hyper_parameters", "global_step", "callbacks", "new"]
)
def test_nothing_in_a_malicious_entry_of_a_good_checkpoint_runs(place, folder, finished, images):
    """Also where the file is otherwise right; in a dictionary's values or keys."""
    good = read_checkpoint(finished / "checkpoints/tiny/last.ckpt")
    for call in (
        Runs(os.mkdir, "canary"),
        Runs(eval, "open('canary', 'w')"),
        Runs(os.system, "touch canary"),
    ):
        values = [call, {"x": call}, [call]]
        if isinstance(good.get(place), dict):
            values.append(good[place] | {"x": call})
        for value in values:
            write_checkpoint(good | {place: value}, folder / "checkpoints/tiny/last.ckpt")
            for program in COMMANDS:
                ending = read_with(program, folder, images)
                assert_refused(ending, program, "only tensors and plain values are loaded")
    assert not (folder / "canary").exists()


@pytest.mark.parametrize(
    "opcode", [name for name in OPCODES if name not in ("NEWOBJ", "NEWOBJ_EX", "persistent")]
)
def test_the_malicious_files_would_run(opcode, folder):
    """The canary of the tests above can sing."""
    argument = "touch canary" if opcode == "dotted" else "canary"
    pickle.loads(OPCODES[opcode](b"os", b"mkdir", argument))
    assert (folder / "canary").exists()
