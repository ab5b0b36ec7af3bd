"""The code as a package: what importing needs, and an installed copy."""

from __future__ import annotations

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
    code = f"import sys, {modules}\n"
    done = python(code + f"print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_readme_example_runs():
    readme = (REPOSITORY / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    done = python(code + "\nprint(tuple(y.shape), tuple(z.shape))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(8, 64, 32, 32) (8, 32, 64, 64)"


def test_an_installed_copy_is_called_sdn(tmp_path):
    """The same files under the package name that pyproject.toml gives them."""
    (tmp_path / "sdn").symlink_to(REPOSITORY / "lib")
    code = "import sdn.evaluation.likelihood, sdn.evaluation.report, sdn.DensityVAE, sdn.nn, sdn.released; print('ok')"
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"
