"""Nothing in this repository loads a pickle unsafely, runs text, starts a shell, unpacks an archive
or downloads over
http: every Python file is searched, by its syntax, and so are the shell scripts."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY

# The one class that reads pickles, which looks nothing up, as tests/data/sets/test_cifar10.py
# shows.
RESTRICTED = {("data/sets/cifar10.py", "pickle.Unpickler")}
# Tests that show that malicious files would run, that load what they saved themselves, or start our
# own scripts.
SHOWN = {
    "tests/forked.py": {"runpy.run_path"},
    "tests/data/sets/test_cifar10.py": {"eval", "__import__", "os.system", "pickle.loads"},
    "tests/data/sets/test_shapes3d.py": {"pickle.loads"},
    "tests/test_bad_checkpoints.py": {"eval", "os.system", "pickle.loads"},
    "tests/test_nn.py": {"torch.load without weights_only=True"},
}

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp",
    "pty.spawn",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.load", "marshal.loads",
    "shelve.open", "dill.load",
    "dill.loads", "joblib.load", "cloudpickle.load", "cloudpickle.loads", "pandas.read_pickle",
    "pickle.load",
    "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads", "shutil.unpack_archive",
    "runpy.run_path",
    "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.serialization.add_safe_globals",
    "tempfile.mktemp",
    "torch.package.PackageImporter", "torchvision.datasets.CIFAR10", "urllib.request.urlretrieve",
    "code.interact",
    "ssl._create_unverified_context",
}  # fmt: skip
METHODS = {"extractall", "unsafe_load", "load_from_checkpoint"}  # of whatever object


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.splitlines() or [
        str(p.relative_to(REPOSITORY)) for p in REPOSITORY.rglob("*.py")
    ]
    files = [
        REPOSITORY / name for name in names if name.endswith(".py") and not name.startswith(".venv")
    ]
    return sorted(path for path in files if path.is_file())


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each name that a file imports stands for, by its full name."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """`pickle.load` of `from pickle import load as l; l`; an empty text for what is no plain
    name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def unsafe(source: str, path: str) -> Iterator[str]:
    """What a file does that it must not, by line."""
    tree = ast.parse(source)
    names = imported_names(tree)
    copies = {  # pickle.loads(pickle.dumps(...)) reads nothing from outside
        id(call.func)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Call)
        if full_name(call.func, names) == "pickle.loads"
        and full_name(call.args[0].func, names) == "pickle.dumps"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = full_name(node, names)
            if name in FORBIDDEN and (path, name) not in RESTRICTED and id(node) not in copies:
                yield f"{path}:{node.lineno}: {name}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for url in re.findall(r"(?:http|ftp)://[^\s'\"]*", node.value):
                if not re.match(r"http://(localhost|127\.0\.0\.1)\b", url) and url.strip(
                    "/:"
                ) not in ("http", "ftp"):
                    yield f"{path}:{node.lineno}: {url}"
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, names)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name == "torch.load" and not is_true(keyword(node, "weights_only")):
            yield f"{path}:{node.lineno}: torch.load without weights_only=True"
        if (
            method == "fit"
            and keyword(node, "ckpt_path") is not None
            and not is_true(keyword(node, "weights_only"))
        ):
            yield f"{path}:{node.lineno}: a checkpoint is resumed without weights_only=True"
        allow = keyword(node, "allow_pickle")
        if name == "numpy.load" and not (
            allow is None or isinstance(allow, ast.Constant) and allow.value is False
        ):
            yield f"{path}:{node.lineno}: numpy.load with allow_pickle"
        if keyword(node, "shell") is not None:
            yield f"{path}:{node.lineno}: {name} with shell"
        if method in METHODS or (method == "extract" and "tar" in ast.unparse(node.func).lower()):
            yield f"{path}:{node.lineno}: {ast.unparse(node.func)}"
        if keyword(node, "verify") is not None and not is_true(keyword(node, "verify")):
            yield f"{path}:{node.lineno}: {name} does not verify certificates"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_file_does_anything_unsafe(path):
    name = path.relative_to(REPOSITORY).as_posix()
    found = [
        line
        for line in unsafe(path.read_text(), name)
        if line.split(": ")[1] not in SHOWN.get(name, ())
    ]
    if name.startswith("tests/"):  # which name addresses that are to be refused
        found = [line for line in found if not re.search(r": (http|ftp)://", line)]
    assert not found


def test_the_search_sees_the_programs_and_the_tests():
    names = {path.relative_to(REPOSITORY).as_posix() for path in python_files()}
    assert {
        "train.py",
        "evaluate.py",
        "lib/checkpoint.py",
        "data/sets/cifar10.py",
        "tests/test_security.py",
    } <= names
    assert not [name for name in names if "site-packages" in name]


UNSAFE = [
    "import torch; torch.load('x')",
    "import torch as t; t.load('x', weights_only=False)",
    "from torch import load; load('x')",
    "from torch import load; load('x', weights_only=flag)",
    "import pickle; pickle.load(file)",
    "import pickle as p; p.loads(b'')",
    "from pickle import loads as read; read(b'')",
    "import pickle\nclass Reader(pickle.Unpickler): pass",
    "import pickle; reader = pickle.Unpickler",
    "import pickle; pickle.loads(read(pickle.dumps(layer)))",
    "import pickle; map(pickle.loads, [])",
    "import numpy as np; np.load('x', allow_pickle=True)",
    "import yaml; yaml.load(text)",
    "eval('1')",
    "run = exec",
    "import os; os.system('ls')",
    "import subprocess; subprocess.run('ls', shell=True)",
    "import tarfile; tarfile.open('x').extractall()",
    "with tarfile.open('x') as tar: tar.extract('y')",
    "import shutil; shutil.unpack_archive('x')",
    "import zipfile; zipfile.ZipFile('x').extractall('y')",
    "url = 'http://example.org/x'",
    "trainer.fit(model, ckpt_path=path)",
    "trainer.fit(model, ckpt_path=path, weights_only=False)",
    "Training.load_from_checkpoint('x')",
    "import torch; torch.hub.load('a', 'b')",
    "requests.get(url, verify=False)",
]
SAFE = [
    "import torch; torch.load('x', weights_only=True)",
    "import numpy as np; np.load('x')",
    "import numpy as np; np.load('x', allow_pickle=False)",
    "import json; json.load(file)",
    "import pickle; pickle.loads(pickle.dumps(layer))",
    "import subprocess; subprocess.run(['ls'])",
    "model.eval()",
    "import re; re.compile('x')",
    "import pickle; raise pickle.UnpicklingError('x')",
    "url = 'https://example.org/x'",
    "url = 'http://127.0.0.1:9/x'",
    "trainer.fit(model, ckpt_path=path, weights_only=True)",
]


def test_the_search_finds_what_is_unsafe_and_nothing_else():
    assert [source for source in UNSAFE if not list(unsafe(source, "x.py"))] == []
    assert {source: found for source in SAFE if (found := list(unsafe(source, "x.py")))} == {}


def shell_scripts() -> list[Path]:
    folders = [REPOSITORY, *(REPOSITORY / name for name in ("data", ".ci"))]
    found = [path for folder in folders for path in folder.glob("*.sh")] + list(
        (REPOSITORY / "data").glob("*/*.sh")
    )
    return sorted(found)


def test_scripts_neither_unpack_nor_download_by_themselves():
    scripts = shell_scripts()
    assert {"quickstart.sh", "get_imagenet_data.sh", "get_3dshapes_data.sh"} <= {
        path.name for path in scripts
    }
    for path in scripts:
        text = path.read_text()
        assert "http://" not in text, path
        assert not re.search(
            r"\b(curl|wget|tar -?x|unzip|eval|--trusted-host|--no-check-certificate)\b", text
        ), path
