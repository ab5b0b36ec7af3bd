"""How many bytes do data-parallel processes exchange for each optimizer step?

    python -m benchmarks.communication --output benchmarks/results/communication_cpu.json

Counts the bytes of gradients and buffers of the models of the recipes (train_*.sh), which
DistributedDataParallel all-reduces and broadcasts. Then it trains a small model with two processes
(gloo), with and without accumulated batches, and compares: all collective operations of an
optimizer step as torch's profiler sees them, and the bytes of ten on the loopback device (Linux;
other traffic there counts, too). Exit status 1 if the gradients are not what was counted, or if
more is sent than this explains.

From the recipes' bytes it computes, for numbers of GPUs and assumed seconds per step, the
efficiency by a simple model: see `efficiency`. That is not measured.
"""

from __future__ import annotations

import itertools
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
from lib.config import TrainConfig
from lib.training.resume import RunProgress

REPOSITORY = Path(__file__).parent.parent
RECIPES = ("train_cifar.sh", "train_imagenet.sh", "train_celeb.sh")
SMALL = (
    "--dataset Photos32 --gpus 0 --num_processes 2 --num_workers 0 --logger none --batch 2 "
    "--epoch_images 400 --val_images 2 --downsample_first --depth 4 --ds_list 0 2 --h_size 32 "
    "--sdn_max_scale 8 --sdn_nfeat_0 32"
).split()
FIRST, LAST = 5, 16  # optimizer steps: after FIRST one is profiled, those after it are measured
BUCKET = 25 * 2**20  # bytes at most in one of DistributedDataParallel's all-reduces
GPUS, NODE = (8, 64, 512), 8
STEP_SECONDS = (0.1, 0.5, 2.0)  # forward and backward pass on one GPU; assumed
# Bytes/s and seconds for a message; assumed.
IN_NODE = {"name": "NVLink", "bandwidth": 200e9, "latency": 5e-6}
BETWEEN_NODES = (
    {"name": "100 Gbit/s", "bandwidth": 12.5e9, "latency": 10e-6},
    {"name": "400 Gbit/s", "bandwidth": 50e9, "latency": 10e-6},
)
BACKWARD_SHARE = 2 / 3  # of a step
# In each step: two all-reduces of flags, two broadcasts of the model's buffers, one of a flag.
SMALL_OPERATIONS = 5


def count(config: TrainConfig) -> dict[str, int]:
    """Bytes that DistributedDataParallel exchanges for the model of a run, by the shapes of its
    tensors."""
    with torch.device("meta"):
        training = train.TRAINING[config.task](train.make_model(config), config)
    gradients = [p.numel() * p.element_size() for p in training.parameters() if p.requires_grad]
    return {
        "gradient_bytes": sum(gradients),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in training.buffers()),
        "gradient_tensors": len(gradients),
    }


def recipe(script: str, variant: str) -> TrainConfig:
    """The configuration that a recipe gives to train.py."""
    command = ["bash", str(REPOSITORY / script), variant, "--gpus", "0"]
    shown = subprocess.run(
        command, env=os.environ | {"SDN_PYTHON": "echo"}, capture_output=True, text=True, check=True
    ).stdout
    return train.parse(shown.split()[1:])


def small_run(output: str, flags: list[str]) -> None:
    """Runs train.py; process 0 writes down the collective operations of an optimizer step, and the
    bytes of several."""
    batch_end, profiler, loopback = RunProgress.on_train_batch_end, profile(record_shapes=True), {}

    def watched(progress: RunProgress, trainer: Any, *given: Any) -> None:
        batch_end(progress, trainer, *given)
        step = trainer.global_step
        if step in loopback:
            return  # gradients are still being accumulated
        loopback[step] = loopback_bytes()
        if step == FIRST:
            profiler.start()
        if step == FIRST + 1:
            profiler.stop()
        if step == LAST and trainer.is_global_zero:
            operations = Counter(
                (event.name().removeprefix("gloo:"), math.prod((event.shapes() or [[0]])[0]))
                for event in profiler.profiler.kineto_results.events()
                if event.name().startswith("gloo:")
            )
            seen = [list(operations.items()), loopback[LAST] - loopback[FIRST + 1]]
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
    """Trains the small model with two processes; what they exchange beside what was counted.
    SystemExit if they exchange something else."""
    counted = count(train.parse(SMALL))
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/operations.json"
        command = [sys.executable, "-m", "benchmarks.communication", "small", output, *SMALL]
        command += ["--output_dir", folder, "--iters", str(LAST + 1)]
        subprocess.run(
            [*command, "--accumulate_grad_batches", str(accumulate)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        seen, sent = json.loads(Path(output).read_text())
    steps = LAST - FIRST - 1
    operations = [
        {"kind": kind, "elements": elements, "times": number} for (kind, elements), number in seen
    ]
    gradients = sum(
        each["elements"] * 4 * each["times"]
        for each in operations
        if each["kind"] == "all_reduce" and each["elements"] > 2
    )
    sent, expected = sent / steps, 2 * counted["gradient_bytes"]  # both send that, in a ring
    if gradients != counted["gradient_bytes"]:
        sys.exit("the gradients that are exchanged are not those that were counted")
    if sent and not expected <= sent <= 1.05 * expected:
        sys.exit(f"{sent:,.0f} bytes are sent for each step, {expected:,.0f} expected")
    return {
        "processes": 2,
        "accumulate_grad_batches": accumulate,
        "steps": steps,
        **counted,
        "operations_per_step": operations,
        "measured_gradient_bytes": gradients,
        "loopback_bytes_per_step": sent,
        "expected_loopback_bytes_per_step": expected,
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
    parser = common.make_parser(__doc__)
    options = parser.parse_args(arguments)
    result = common.stamp("benchmarks.communication", arguments, "cpu", ("pytorch-lightning",))
    result["recipes"] = recipes = []
    for script, variant in itertools.product(RECIPES, ("sdn", "cnn")):
        config = recipe(script, variant)
        recipes.append({"recipe": config.dataset, "variant": variant, **count(config)})
    result["measured"] = [measure(accumulate) for accumulate in (1, 2)]
    result["assumed"] = {
        "in_node": IN_NODE,
        "between_nodes": BETWEEN_NODES,
        "backward_share": BACKWARD_SHARE,
    }
    result["computed"] = computed = [
        {"recipe": row["recipe"], "variant": row["variant"]}
        | efficiency(row["gradient_bytes"], gpus, seconds, link)
        for row in recipes
        for gpus in GPUS
        for link in (BETWEEN_NODES if gpus > NODE else BETWEEN_NODES[:1])
        for seconds in STEP_SECONDS
    ]
    common.write(result, options.output)
    columns = {"recipe": "", "variant": ""}
    print(common.table(recipes, columns | {"gradient_bytes": ",d", "buffer_bytes": ",d"}))
    for measured in result["measured"]:
        print(json.dumps(measured))
    columns |= {"gpus": "", "link": "", "step_seconds": "", "all_reduce_seconds": ".4f"}
    print(common.table(computed, columns | {"without_overlap": ".0%", "with_overlap": ".0%"}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["small"]:
        small_run(sys.argv[2], sys.argv[3:])
    else:
        main()
