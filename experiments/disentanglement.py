"""The disentanglement experiment (paper, section 6): β-VAEs with CNN and SDN decoders, for several
β and seeds.

Trains and evaluates each, then gathers them (experiments.disentanglement_results). Further flags,
such as --iters or --batch, go to train.py. The same command goes on after an interruption: runs
that are finished are skipped, others continue from their last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import train
from data.errors import DataError
from data.get_dataset import get_dataset
from lib.checkpoint import CheckpointError, read_checkpoint, stored_config
from lib.cli import OneLineParser, one_line_errors
from lib.config import ConfigError, TrainConfig
from lib.DisentanglementVAE.metrics import METRICS, FactorData, MetricError
from lib.evaluation.disentanglement import DEFAULT_METRICS, FewerLevels
from lib.evaluation.results import read_results
from lib.files import exclusive_folder, locked

from . import disentanglement_results
from .naming import DECODERS, Run

LOCK = ".experiment.lock"  # of an experiment in the folder of a run
REPOSITORY = Path(__file__).resolve().parent.parent
BETAS = [1.0, 32.0, 100.0, 300.0, 500.0]
SEEDS = list(range(10))
ANNEALED = 1 / 3  # part of the iterations in which β rises: the paper's 100,000 of 300,000
# Flags of train.py, beside those of its groups Run, Hardware and Logging, that runs of one
# experiment may differ in.
FREE = "num_workers root batch_val epoch_images val_images beta_final sdn_max_scale".split()
OURS = {
    "task": "it is disentanglement",
    "exp_name": "use --name",
    "random_seed": "use --seeds",
    "beta_final": "use --betas",
    "sdn_max_scale": "use --decoders",
    "sdn_min_scale": "use --decoders",
    "make_checkpoint": "it always does",
    "use_checkpoint": "it always does",
    "max_epochs": "use --iters",
}


@dataclass
class Experiment:
    """What is to be done.

    runs: In order. config: What all runs share. train_flags: For train.py. metrics, levels, limit:
        Of the evaluation.
    """

    runs: list[Run]
    config: TrainConfig
    train_flags: list[str]
    metrics: list[str]
    levels: list[int]
    limit: int
    children: set[subprocess.Popen] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def weights(self, run: Run) -> Path:
        return Path(self.config.output_dir) / "checkpoints" / run.folder / "last.ckpt"

    def results(self, run: Run) -> dict[str, Any]:
        return read_results(Path(self.config.output_dir) / "figs" / run.folder / "results.json")


def make_parser() -> OneLineParser:
    parser = OneLineParser("train_3dshapes.sh", description=__doc__)
    add = parser.add_argument
    add("--name", default="3dshapes", help="of the experiment: runs are NAME_cnn_beta1_seed0, ...")
    add("--betas", type=float, nargs="+", default=BETAS, help="weights of the KL, once annealed")
    choices = dict(choices=DECODERS, default=list(DECODERS))
    add("--decoders", nargs="+", help="networks to compare", **choices)
    add("--seeds", type=int, nargs="+", default=SEEDS, help="of the runs of each beta and decoder")
    add("--jobs", type=int, default=1, help="runs at a time; several GPUs are given out in turn")
    add("--limit", type=int, default=10_000, help="validation images of the final ELBO")
    choices = dict(choices=METRICS, default=DEFAULT_METRICS)
    add("--metrics", nargs="+", help="scores to compute", **choices)
    add("--levels", type=int, nargs="+", help="see evaluate.py; default: all levels")
    return parser


def main(arguments: list[str] | None = None) -> None:
    flags, train_flags = make_parser().parse_known_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors("train_3dshapes.sh", ConfigError, DataError, MetricError, CheckpointError):
        try:
            experiment = prepare(flags, train_flags)
            failed = carry_out(experiment, flags.jobs)
            if failed:
                told = f"{len(failed)} runs failed: {', '.join(failed)}"
                print(f"train_3dshapes.sh: error: {told}", file=sys.stderr)
            output_dir = experiment.config.output_dir
            disentanglement_results.main(["--name", flags.name, "--output_dir", output_dir])
        except KeyboardInterrupt:
            print("\ninterrupted: the same command goes on", file=sys.stderr)
            sys.exit(130)
    sys.exit(1 if failed else 0)


def prepare(flags: argparse.Namespace, train_flags: list[str]) -> Experiment:
    """Checks everything that can be checked before the first run starts."""
    given = vars(train.make_parser().parse_args(train_flags))
    for name, instead in OURS.items():
        if name in given:
            raise ConfigError(f"--{name} is set by the experiment: {instead}")
    if "beta_rate" not in given:
        iters = given.get("iters", TrainConfig.for_task(task="disentanglement").iters)
        beta_rate = min(1.0, 1 / max(1.0, ANNEALED * iters))
        train_flags = [*train_flags, "--beta_rate", f"{beta_rate:.6g}"]
    train_flags = ["--task", "disentanglement", *train_flags]
    for name in ("jobs", "limit"):
        if (number := getattr(flags, name)) < 1:
            raise ConfigError(f"--{name} must be at least 1; got {number}")
    # Seeds are outermost, so that what is finished can be compared.
    order = itertools.product(*map(dict.fromkeys, (flags.seeds, flags.betas, flags.decoders)))
    try:
        runs = [Run(flags.name, decoder, beta, seed) for seed, beta, decoder in order]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    first = ["--exp_name", runs[0].folder, "--random_seed", str(max(flags.seeds))]
    config = train.parse([*train_flags, *first])
    train.choose_devices(config)
    if config.gpus and config.gpus > 1:
        raise ConfigError(
            f"--gpus {config.gpus}: each run is on one GPU; --jobs {config.gpus} uses as many"
        )
    for package, name in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if not importlib.util.find_spec(package):
            raise ConfigError(f"the evaluation needs the package {name}: pip install {name}")
    scenes = get_dataset(config.dataset, config.root, "train")
    if not isinstance(scenes, FactorData):
        raise ConfigError(
            f"--dataset {config.dataset} has no factors: use 3DShapes or Shapes3DRendered"
        )
    levels = FewerLevels(scenes, flags.levels or scenes.factor_sizes).factor_sizes
    train.make_data(config).check_batch(1)
    train.make_model(config)
    limit = min(flags.limit, len(get_dataset(config.dataset, config.root, "validation")))
    experiment = Experiment(runs, config, train_flags, flags.metrics, list(levels), limit)
    for run in runs:
        check_settings(experiment, run)
    try:
        (Path(config.output_dir) / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {config.output_dir}: {error.strerror}") from None
    return experiment


def check_settings(experiment: Experiment, run: Run) -> None:
    """Raises ConfigError if the run was begun with other settings: their results must not be
    averaged."""
    path = experiment.weights(run)
    if not path.exists():
        return
    try:
        before = stored_config(read_checkpoint(path), path).to_dict()
    except CheckpointError:
        return  # the run itself will fail, and say so; others need not
    now, wrong = experiment.config.to_dict(), []
    for field_ in dataclasses.fields(TrainConfig):
        name, group = field_.name, field_.metadata["group"]
        free = name in FREE or group in ("Run", "Hardware", "Logging")
        if not free and now[name] != before[name]:
            wrong.append(f"--{name} {before[name]} (now {now[name]})")
    if wrong:
        raise ConfigError(
            f"{path} was trained with {', '.join(wrong)}: give these to go on, or another --name"
        )


def carry_out(experiment: Experiment, jobs: int) -> list[str]:
    """Does all runs, `jobs` at a time; the folders of those that failed."""
    total = len(experiment.runs)
    todo = [run for run in experiment.runs if not is_evaluated(experiment, run)]
    done = total - len(todo)
    if done:
        print(f"{done} of {total} runs are finished already", flush=True)
    gpus = 0 if experiment.config.gpus == 0 else torch.cuda.device_count()
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for slot in range(jobs):
        slots.put(environment(slot, jobs, gpus))
    failed = []

    def work(run: Run) -> None:
        nonlocal done
        if experiment.stopping.is_set():
            return
        surroundings = slots.get()
        try:
            outcome = one_run(experiment, run, surroundings)
            done += 1
        except LeftToOther:
            outcome = "left to another process, which is at it"
        except (RunError, CheckpointError, ConfigError, OSError) as error:
            if experiment.stopping.is_set():
                return
            failed.append(run.folder)
            outcome = f"failed: {error}"
        finally:
            slots.put(surroundings)
        print(f"[{done}/{total}] {run.folder}: {outcome}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in [pool.submit(work, run) for run in todo]:
                future.result()
        except BaseException:
            experiment.stopping.set()
            for child in list(experiment.children):
                child.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return failed


class RunError(Exception):
    """A run that failed; the message says why and where its log is."""


class LeftToOther(Exception):
    """A run that another process is at."""


def one_run(experiment: Experiment, run: Run, surroundings: dict[str, str]) -> str:
    """Trains, goes on with or only evaluates a run; what there is to say of it."""
    folder = experiment.weights(run).parent
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK, ""))
            with exclusive_folder(folder, ""):
                pass  # nor does a train.py hold it whose experiment was killed
        except BlockingIOError:
            raise LeftToOther from None
        if is_evaluated(experiment, run):
            return "finished by another process"
        story, weights = "", experiment.weights(run)
        step = read_checkpoint(weights)["global_step"] if weights.exists() else 0
        if step < experiment.config.iters:
            start = time.perf_counter()
            decoder = ["--sdn_max_scale", "0"] if run.decoder == "cnn" else []
            command = ["train.py", *experiment.train_flags, *decoder, "--exp_name", run.folder]
            command += ["--random_seed", str(run.seed), "--beta_final", f"{run.beta:g}"]
            command += ["--make_checkpoint", "--use_checkpoint"]
            execute(experiment, command, folder, surroundings)
            begun = f" from step {step}" if step else ""
            story = f"trained{begun} in {(time.perf_counter() - start) / 60:.1f} min, "
        output_dir = experiment.config.output_dir
        command = ["evaluate.py", "--model", run.folder, "--output_dir", output_dir]
        command += ["--elbo", "--limit", str(experiment.limit)]
        command += ["--traversal", "--reconstruction", "--count", "32"]
        command += ["--disentanglement", "--metrics", *experiment.metrics]
        command += ["--levels", *map(str, experiment.levels)]
        command += ["--device", "cpu"] if experiment.config.gpus == 0 else []
        execute(experiment, command, folder, surroundings)
    results = experiment.results(run)
    scores = results["disentanglement"]["scores"].items()
    shown = ", ".join(f"{name} {values['score']:.3f}" for name, values in scores)
    return f"{story}-ELBO {results['elbo']['nats']:.0f} nats, {shown}"


def execute(
    experiment: Experiment, command: list[str], folder: Path, surroundings: dict[str, str]
) -> None:
    """Runs one of the scripts, with its output in the run's log; raises RunError if it fails."""
    log = folder / "log.txt"
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | surroundings,
        )
    experiment.children.add(process)
    try:
        if experiment.stopping.is_set():
            process.terminate()
        status = process.wait()
    finally:
        experiment.children.discard(process)
    if status:
        text = log.read_bytes()[start:].decode(errors="replace").replace("\r", "\n")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "error:" in line or "Error" in line]
        reason = (errors or lines or [f"status {status}"])[-1]
        raise RunError(f"{reason} (log: {log})")


def is_evaluated(experiment: Experiment, run: Run) -> bool:
    """Whether the results are those of the whole training, and what this command would compute."""
    results = experiment.results(run)
    elbo, scores = results.get("elbo", {}), results.get("disentanglement", {})
    return (
        experiment.weights(run).exists()
        and min(elbo.get("step", -1), scores.get("step", -1)) >= experiment.config.iters
        and elbo["weights"] == scores["weights"]
        and elbo["images"] == experiment.limit
        and scores["levels"] == experiment.levels
        and set(experiment.metrics) <= set(scores["scores"])
    )


def environment(slot: int, jobs: int, gpus: int) -> dict[str, str]:
    """Of the runs in one of the slots: its GPU of several, or its share of the cores if there is
    none."""
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % gpus]}
    if jobs > 1 and not gpus and "OMP_NUM_THREADS" not in os.environ:
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    return {}


if __name__ == "__main__":
    main()
