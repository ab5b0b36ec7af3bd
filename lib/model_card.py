"""The README.md of a published model, written from what its run and its evaluations left."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .config import TrainConfig
from .flags import changed_flags

PAPER = "https://openreview.net/forum?id=I4c4K9vBNny"
HEAD = """---
library_name: sdn
license: mit
pipeline_tag: unconditional-image-generation
tags: [vae, spatial-dependency-networks]
---
"""


def model_card(
    title: str,
    class_name: str,
    config: TrainConfig,
    *,
    shape: tuple[int, int, int],
    parameters: int,
    step: int,
    provenance: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """Markdown with the metadata of the Hugging Face Hub.

    Arguments:
        title: Name of the model.
        class_name: Of its class.
        config: Of its run.
        shape: (C, H, W) of its images.
        parameters: Number of its weights.
        step: Optimizer steps of the run.
        provenance: Plain values: what wrote the checkpoint (commit, command, versions).
        results: Of evaluations, by name, as `results.json` has them.
    """
    channels, height, width = shape
    changed = shlex.join(changed_flags(config))
    lines = [
        HEAD + f"# {title}",
        "",
        f"A {class_name} ([Miladinović et al., ICLR 2021]({PAPER})) with {parameters:,} weights "
        f"for images of {channels} x {height}x{width} (channels, height, width), trained on "
        f"{config.dataset} for {step:,} optimizer steps.",
        "",
        "```python",
        f"from sdn.{class_name} import {class_name}",
        "from sdn.synthesis import sample_images",
        "",
        f'model = {class_name}.from_pretrained("PATH OR REPOSITORY")',
        "# uint8 [16, C, H, W]",
        "images = sample_images(model, 16, temperature=0.8, seed=0, batch=16)",
        "```",
        "",
        "## Training",
        "",
        f"Flags of `train.py` that differ from their defaults: `{changed}`",
        "",
        *(f"- {name}: `{value}`" for name, value in provenance.items()),
        "",
        "## Results",
        "",
    ]
    rows = [_row(name, result) for name, result in results.items()]
    rows = [row for row in rows if row]
    if rows:
        lines += ["| evaluation | result | command |", "|---|---|---|", *rows]
    else:
        lines.append("Not evaluated yet.")
    return "\n".join(lines) + "\n"


def _row(name: str, result: Mapping[str, Any]) -> str | None:
    bits, error = result.get("bits_per_dim"), result.get("standard_error")
    if not isinstance(bits, int | float):
        return None
    spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
    images = result.get("images", "")
    command = str(result.get("command", "")).replace("|", r"\|")
    return f"| {name} | {bits:.4f}{spread} bits/dim, {images} images | `{command}` |"
