"""How many bytes do data-parallel processes exchange for each optimizer step?

    python -m benchmarks.communication --output benchmarks/results/communication_cpu.json

Counts the bytes of gradients and buffers of the models of the recipes (train_*.sh), which
DistributedDataParallel all-reduces and broadcasts. Then trains a small model with two processes
(gloo), with and without accumulated batches,
and compares: all collective operations of 10 optimizer steps as torch's profiler sees them, and the
bytes on the loopback device (Linux; other traffic there counts, too). Exit status 1 if the
gradients are not what was counted, or if more is sent than this explains.

From the recipes' bytes it computes, for numbers of GPUs and assumed seconds per step, the
efficiency by a simple model: see `efficiency`. That is not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

import train
from benchmarks import common
from data.get_dataset import DATASETS
from lib.models import build_model
from lib.training.resume import RunProgress

REPOSITORY = Path(__file__).parent.parent
RECIPES = {
    "CIFAR10": "train_cifar.sh",
    "ImageNet32": "train_imagenet.sh",
    "CelebAHQ256": "train_celeb.sh",
}
SMALL = (
    "--dataset Photos32 --gpus 0 --num_processes 2 --num_workers 0 --logger none --batch 2 --epoch_images 400 "
    "--val_images 2 --downsample_first --depth 4 --ds_list 0 2 --h_size 32 --sdn_max_scale 8 --sdn_nfeat_0 32"
).split()
FIRST, LAST = (
    5,
    15,
)  # of the small model's optimizer steps, what comes after FIRST and until LAST is measured
BUCKET = 25 * 2**20  # bytes at most in one of DistributedDataParallel's all-reduces
GPUS, NODE = (8, 64, 512), 8
STEP_SECONDS = (0.1, 0.5, 2.0)  # forward and backward pass on one GPU; assumed
IN_NODE = {
    "name": "NVLink",
    "bandwidth": 200e9,
    "latency": 5e-6,
}  # bytes/s, s; assumed, as are these:
BETWEEN_NODES = (
    {"name": "100 Gbit/s", "bandwidth": 12.5e9, "latency": 10e-6},
    {"name": "400 Gbit/s", "bandwidth": 50e9, "latency": 10e-6},
)
BACKWARD_SHARE = 2 / 3  # of a step
SMALL_OPERATIONS = 5  # of each step: two all-reduces of flags (ours), broadcasts of the model's buffers (2) and of a flag


def count(flags: list[str]) -> dict[str, int]:
    """Bytes that DistributedDataParallel exchanges for the model of a run, by the shapes of its
    tensors."""
    config = train.parse(flags)
    with torch.device("meta"):
        model = build_model(config, DATASETS[config.dataset].shape[1:])
        training = train.TRAINING[config.task](model, config)
    gradients = [p.numel() * p.element_size() for p in training.parameters() if p.requires_grad]
    buffers = [b.numel() * b.element_size() for b in training.buffers()]
    return {
        "gradient_bytes": sum(gradients),
        "buffer_bytes": sum(buffers),
        "gradient_tensors": len(gradients),
    }


def recipe_flags(script: str, variant: str) -> list[str]:
    """The flags that a recipe gives to train.py."""
    command = ["bash", str(REPOSITORY / script), variant]
    shown = subprocess.run(
        command, env=os.environ | {"SDN_PYTHON": "echo"}, capture_output=True, text=True, check=True
    ).stdout
    return shown.split()[1:]


def small_run(output: str, flags: list[str]) -> None:
    """train.py; process 0 writes down the collective operations of some optimizer steps."""
    batch_end, profiler, loopback = RunProgress.on_train_batch_end, profile(record_shapes=True), {}

    def watched(progress: RunProgress, trainer: Any, *given: Any) -> None:
        before = progress._last_step
        batch_end(progress, trainer, *given)
        if trainer.global_step == before:
            return  # gradients are still being accumulated
        loopback[trainer.global_step] = loopback_bytes()
        if trainer.global_step == FIRST:
            profiler.start()
        if trainer.global_step == LAST:
            profiler.stop()
            operations = Counter(
                f"{event.name.removeprefix('gloo:')} {math.prod(event.input_shapes[0]) if event.input_shapes else 0}"
                for event in profiler.events()
                if event.name.startswith("gloo:")
            )
            if trainer.is_global_zero:
                seen = {
                    "operations": operations,
                    "loopback_bytes": loopback[LAST] - loopback[FIRST],
                }
                Path(output).write_text(json.dumps(seen))

    RunProgress.on_train_batch_end = watched
    train.main(flags)


def loopback_bytes() -> int:
    """Sent over the loopback device since the machine started; 0 where the system does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[9]) for line in lines if line.split()[0] == "lo:"), 0)


def measure(accumulate: int) -> dict[str, Any]:
    """Trains the small model with two processes; what they exchange beside what was counted."""
    counted = count(SMALL)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "operations.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.communication",
            "small",
            output,
            *SMALL,
            "--output_dir",
            folder,
        ]
        subprocess.run(
            [
                *map(str, command),
                "--iters",
                str(LAST + 1),
                "--accumulate_grad_batches",
                str(accumulate),
            ],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        seen = json.loads(output.read_text())
    steps = LAST - FIRST
    operations = [(*name.split(), number / steps) for name, number in seen["operations"].items()]
    gradients = sum(
        int(n) * 4 * times for kind, n, times in operations if kind == "all_reduce" and int(n) > 2
    )
    return {
        "processes": 2,
        "accumulate_grad_batches": accumulate,
        "steps": steps,
        **counted,
        "operations_per_step": [
            {"kind": k, "elements": int(n), "times": times} for k, n, times in operations
        ],
        "measured_gradient_bytes": gradients,
        "loopback_bytes_per_step": seen["loopback_bytes"] / steps,
        "expected_loopback_bytes_per_step": 2
        * 2
        * (2 - 1)
        / 2
        * counted["gradient_bytes"],  # both send that of a ring
    }


def efficiency(
    gradient_bytes: int, gpus: int, step_seconds: float, between: dict[str, Any]
) -> dict[str, Any]:
    """Step time on one GPU over that on each of several with the same batch each, by a simple
    model.

    A ring all-reduce sends 2(N-1)/N of the gradients through the slowest link, which between nodes
    all GPUs of a node share. Each collective operation takes the time of 2 log2 N messages besides:
    one for each bucket of gradients, the small ones besides. With overlap, all buckets but the last
    can be sent during the backward pass.
    """
    link = IN_NODE if gpus <= NODE else between
    latency = 2 * math.log2(gpus) * link["latency"]
    buckets = math.ceil(gradient_bytes / BUCKET)
    seconds = 2 * (gpus - 1) / gpus * gradient_bytes / link["bandwidth"] + buckets * latency
    waiting = max(seconds / buckets, seconds - BACKWARD_SHARE * step_seconds)
    flags = SMALL_OPERATIONS * latency
    return {
        "gpus": gpus,
        "link": link["name"],
        "step_seconds": step_seconds,
        "all_reduce_seconds": round(seconds, 4),
        "without_overlap": round(step_seconds / (step_seconds + seconds + flags), 3),
        "with_overlap": round(step_seconds / (step_seconds + waiting + flags), 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    result = common.stamp("communication", arguments, "cpu", ("pytorch-lightning",))
    result["recipes"] = recipes = [
        {
            "recipe": name,
            "variant": variant,
            **count([*recipe_flags(script, variant), "--gpus", "0"]),
        }
        for name, script in RECIPES.items()
        for variant in ("sdn", "cnn")
    ]
    result["measured"] = measurements = [measure(accumulate) for accumulate in (1, 2)]
    result["assumed"] = {
        "in_node": IN_NODE,
        "between_nodes": BETWEEN_NODES,
        "backward_share": BACKWARD_SHARE,
    }
    result["computed"] = computed = [
        {
            "recipe": row["recipe"],
            "variant": row["variant"],
            **efficiency(row["gradient_bytes"], gpus, seconds, link),
        }
        for row in recipes
        for gpus in GPUS
        for link in (BETWEEN_NODES if gpus > NODE else BETWEEN_NODES[:1])
        for seconds in STEP_SECONDS
    ]
    common.write(result, options.output)
    print(
        common.table(
            recipes, {"recipe": "", "variant": "", "gradient_bytes": ",d", "buffer_bytes": ",d"}
        )
    )
    for measured in measurements:
        print(json.dumps(measured))
    columns = {
        "recipe": "",
        "variant": "",
        "gpus": "",
        "link": "",
        "step_seconds": "",
        "all_reduce_seconds": ".4f",
    }
    print(common.table(computed, columns | {"without_overlap": ".0%", "with_overlap": ".0%"}))
    for measured in measurements:
        expected, sent = (
            measured["expected_loopback_bytes_per_step"],
            measured["loopback_bytes_per_step"],
        )
        if measured["measured_gradient_bytes"] != measured["gradient_bytes"]:
            sys.exit("the gradients that are exchanged are not those that were counted")
        if sent and not expected <= sent <= 1.05 * expected:
            sys.exit(f"{sent:,.0f} bytes are sent for each step, {expected:,.0f} expected")


if __name__ == "__main__":
    if sys.argv[1:2] == ["small"]:
        small_run(sys.argv[2], sys.argv[3:])
    else:
        main()
