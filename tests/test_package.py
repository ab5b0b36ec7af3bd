"""The code as a package: what importing needs, and an installed copy."""

from __future__ import annotations

import re
import subprocess
import sys

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


def test_the_readme_example_runs():
    readme = (REPOSITORY / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    done = python(code + "\nprint(tuple(y.shape), tuple(z.shape))")
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
    code = "import sdn.evaluation.likelihood, sdn.evaluation.report, sdn.DensityVAE, sdn.nn, sdn.released; print('ok')"
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"
