"""The code as a package: what importing needs, and an installed copy."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import REPOSITORY

HEAVY = (
    "pytorch_lightning",
    "torchvision",
    "lmdb",
    "wandb",
    "h5py",
    "sklearn",
    "matplotlib",
    "triton",
    "PIL",
    "tqdm",
    "data",
)


def python(code: str, cwd=REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_the_models_need_torch_and_numpy_alone():
    evaluation = ", ".join(
        f"lib.evaluation.{name}" for name in ("likelihood", "loading", "nearest")
    )
    modules = (
        "lib.nn, lib.probability, lib.DensityVAE, lib.DisentanglementVAE.metrics, lib.released, "
        f"lib.synthesis, {evaluation}"
    )
    # What torch brings by itself does not count: its counter of operations imports Triton.
    code = f"""
import sys, numpy, torch, torch.utils.flop_counter
before = set(sys.modules)
import {modules}
print([name for name in {HEAVY!r} if name in set(sys.modules) - before])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


README_EXAMPLE = (REPOSITORY / "README.md").read_text().split("```python\n")[1].split("```")[0]


def test_the_readme_example_runs():
    done = python(README_EXAMPLE + "\nprint(tuple(y.shape), tuple(z.shape))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(8, 64, 32, 32) (8, 32, 64, 64)"


def test_links_and_pictures_of_the_pages_exist():
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
    assert len(pages) >= 10
    for page in pages:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_row_of_the_contract_names_a_test():
    """In the table "what a convolution does, and what the layer does"."""
    sources = "".join(path.read_text() for path in REPOSITORY.glob("tests/**/test_*.py"))
    page = (REPOSITORY / "docs/layer.md").read_text()
    rows = page.split("| with `torch.nn.Conv2d` |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 28
    previous = ""
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names or (row.endswith("| the same test |") and previous), row
        assert all(f"def {name}(" in sources for name in names), row
        previous = row


def test_commands_of_the_pages_name_modules_that_exist():
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        for module in re.findall(
            r"python -m ((?:lib|data|benchmarks|experiments|tests)[\w.]*)", page.read_text()
        ):
            path = REPOSITORY / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
                f"{page.name}: {module}"
            )


def test_an_installed_copy_is_called_sdn(tmp_path):
    """The same files under the package name that pyproject.toml gives them."""
    (tmp_path / "sdn").symlink_to(REPOSITORY / "lib")
    names = "evaluation.likelihood, sdn.evaluation.report, sdn.DensityVAE, sdn.nn, sdn.released"
    done = python(f"import sdn.{names}; print('ok')", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a wheel and an sdist, built without network from what git knows."""
    folder = tmp_path_factory.mktemp("build")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True
    )
    if files.returncode:
        pytest.skip("not a checkout of git")
    for name in files.stdout.decode().split("\0")[:-1]:
        if (REPOSITORY / name).is_file() and not name.startswith(("tests/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    done = python(
        "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_the_readme_example_runs_with_what_was_built(built, tmp_path, kind):
    """Every file of lib/ is in both, and the layers run where nothing of the repository is."""
    (package,) = (built / "dist").glob(kind)
    options = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options.split(), "--target", tmp_path, package],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    source = built / "lib"
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            installed = tmp_path / "sdn" / path.relative_to(source)
            assert installed.read_bytes() == path.read_bytes(), path
    code = README_EXAMPLE.replace("from lib import", "from sdn import")
    done = python(f"{code}\nimport sdn\nprint(sdn.__file__, *y.shape, *z.shape)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == f"{tmp_path}/sdn/__init__.py 8 64 32 32 8 32 64 64".split()


PUBLIC_MODULES = ("lib.nn", "lib.convert", "lib.sweeps")


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_have_docstrings(name):
    """All that a page of pdoc shows of a module, but for overridden methods that torch explains."""
    pdoc = pytest.importorskip("pdoc")
    module = pdoc.doc.Module(importlib.import_module(name))
    missing = [
        member.fullname
        for member in all_members(module)
        if not member.docstring and member.kind in ("class", "function")
    ]
    assert not missing


def all_members(documented):
    """What a module or class itself defines under public names, and what that defines."""
    for member in documented.own_members:
        public = not member.name.startswith("_") and member.name != "extra_repr"
        if public and member.kind != "module":
            yield member
            if member.kind == "class":
                yield from all_members(member)


@pytest.mark.slow
def test_the_page_of_the_api_can_be_made(tmp_path):
    """By the command of docs/README.md."""
    pytest.importorskip("pdoc")
    (command,) = re.findall(r"python -m (pdoc .*)", (REPOSITORY / "docs/README.md").read_text())
    arguments = [tmp_path if each == "api" else each for each in shlex.split(command)]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in PUBLIC_MODULES:
        assert (tmp_path / name.replace(".", "/")).with_suffix(".html").exists(), done.stderr
