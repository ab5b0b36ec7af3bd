"""One run: the Trainer with its callbacks and its dashboard, from a checkpoint or from the
beginning."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.profilers import SimpleProfiler

from ..config import ConfigError, TrainConfig
from ..sweeps.preflight import why_no_triton
from .base import VAETraining
from .checkpoints import Checkpoints
from .faults import faults_in_one_line
from .image_grids import ImageGrids
from .lightning_internals import keep_own_signal_handlers
from .loggers import Dashboard
from .metrics_log import MetricsLog
from .non_finite import SkipNonFinite
from .processes import LoaderWatch, log_rank_zero, watch_ranks
from .profiling import StepProfile
from .progress import progress_callback
from .resume import RunProgress
from .signals import StopSignals
from .sweep_choices import SweepChoices

# Advertisements of Lightning, and its remarks on choices that are made on purpose here.
SILENCED_WARNINGS = (
    "does not have many workers",
    "Checkpoint directory .* exists and is not empty",
    "smaller than the logging interval",
    r"Found \d+ module\(s\) in eval mode",
    "It is recommended to use .*sync_dist=True",
    "You.re resuming from a checkpoint that ended before the epoch ended",
    r"isinstance\(treespec, LeafSpec\)",
)


def run(
    training: VAETraining,
    data: pl.LightningDataModule,
    *,
    devices: dict[str, Any],
    run_folder: Path,
    figures: Path,
    resume_from: Path | None = None,
    signals: StopSignals,
) -> None:
    """Trains until the configuration's last step or epoch.

    Arguments:
        training: What is trained, with its configuration.
        data: Batches (uint8 images [B, 3, H, W], keys [B]); has `batch_val` and
            `batches_per_epoch`.
        devices: What `choose_devices` gives.
        run_folder: Folder of checkpoints and logs.
        figures: Folder of the pictures that are drawn at each validation.
        resume_from: Checkpoint to go on from.
        signals: Where signals that ask the run to stop are noted.

    Raises:
        OSError: if the last checkpoint or some rows of the logs could not be written.
        SystemExit: if the run is stopped by a signal or a fault.
    """
    config = training.config
    silence_lightning()
    checkpoints = Checkpoints(
        run_folder if config.make_checkpoint else None,
        signals,
        every_n_steps=config.checkpoint_every_n_steps,
        every_minutes=config.checkpoint_every_minutes,
        keep=config.keep_last,
        # The best ELBO of an annealed β is that of a small β (DEVIATIONS.md).
        best=config.task == "density_estimation",
        resumed_from=resume_from,
    )
    skip = SkipNonFinite(
        checkpoints,
        max_skipped=config.max_skipped,
        max_rollbacks=config.max_rollbacks,
        rollback_lrate=config.rollback_lrate,
    )
    dashboard = Dashboard(config, run_folder)
    grids = ImageGrids(
        figures,
        columns=config.figsize,
        temperature=config.sampling_temperature,
        batch=data.batch_val,
        seed=config.random_seed,
        dashboard=dashboard,
    )
    metrics, loader_watch = MetricsLog(run_folder, dashboard), LoaderWatch()
    callbacks: list[pl.Callback] = [
        RunProgress(config.iters),
        SweepChoices(),  # before the metrics, which write them down
        loader_watch,
        metrics,
        skip,
        grids,
        progress_callback(),
        dashboard,  # after those that show something there
        checkpoints,
    ]
    profiler = None
    if config.profiler_mode:
        profiler = SimpleProfiler()
        callbacks.append(StepProfile())
    precision = training_precision(config, devices)
    say_what_may_surprise(config)
    trainer = make_trainer(
        config,
        devices,
        precision=precision,
        callbacks=callbacks,
        checkpoint_io=checkpoints.io,
        profiler=profiler,
    )
    parameters = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    log_rank_zero(f"{config.exp_name}: {parameters:,} parameters, {config.dataset}, {precision}")
    if config.compile:  # in place, so that names in checkpoints stay
        training.model.compile(fullgraph=True, **compile_options(config, devices))
    if precision == "64-true":
        training.double()  # Lightning does it after it has loaded a checkpoint, into float32
    with faults_in_one_line(), loader_watch, watch_ranks(trainer):
        trainer.fit(
            training,
            datamodule=data,
            ckpt_path=str(resume_from) if resume_from else None,
            weights_only=True,
        )
    if profiler:
        log_rank_zero(profiler.summary())
    if checkpoints.io.failure:
        raise checkpoints.io.failure
    if metrics.unwritten:
        raise OSError(
            f"{metrics.unwritten} rows of the logs in {run_folder} could not be written: is the "
            "disk full?"
        )
    if trainer.is_global_zero:
        kept = "weights and metrics" if config.make_checkpoint else "metrics"
        print(f"{kept} in {run_folder}, pictures in {figures}")


def make_trainer(
    config: TrainConfig,
    devices: dict[str, Any],
    *,
    precision: str,
    callbacks: list[pl.Callback],
    checkpoint_io: Any,
    profiler: SimpleProfiler | None,
) -> pl.Trainer:
    """The Trainer of a run; raises ConfigError if the job has another number of processes."""
    several = devices["devices"] * config.num_nodes > 1
    plugins = [checkpoint_io]
    if SLURMEnvironment.detect():
        # `Checkpoints` does what is to be done on a signal.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = pl.Trainer(
        **devices,
        num_nodes=config.num_nodes,
        strategy=config.distributed_backend if several else "auto",
        precision=precision,
        max_epochs=config.max_epochs,
        accumulate_grad_batches=config.accumulate_grad_batches,
        gradient_clip_val=config.grad_clip or None,
        check_val_every_n_epoch=config.check_val_every_n_epoch,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        plugins=plugins,
        callbacks=callbacks,
        logger=False,
        profiler=profiler,
        enable_model_summary=False,
    )
    keep_own_signal_handlers(trainer)
    if several:
        try:
            trainer.strategy.cluster_environment.validate_settings(
                num_devices=devices["devices"], num_nodes=config.num_nodes
            )
        except ValueError as error:
            raise ConfigError(" ".join(str(error).split())) from None
    return trainer


def choose_devices(config: TrainConfig) -> dict[str, Any]:
    """The Trainer's accelerator and number of devices; raises ConfigError if there are fewer.

    Apple's GPU is taken only where `--gpus 1` asks for it: nobody has trained on one yet.
    """
    available = torch.cuda.device_count()
    gpus = min(1, available) if config.gpus is None else config.gpus
    if gpus == 1 and not available and torch.backends.mps.is_available():
        return {"accelerator": "mps", "devices": 1}
    if gpus > available:
        hint = ""
        if available:
            hint = " (a smaller --gpus with --accumulate_grad_batches keeps the global batch)"
        raise ConfigError(
            f"--gpus {gpus}: this machine has {available or 'none; --gpus 0 runs on the CPU'}{hint}"
        )
    if gpus:
        return {"accelerator": "gpu", "devices": gpus}
    return {"accelerator": "cpu", "devices": config.num_processes}


def training_precision(config: TrainConfig, devices: dict[str, Any]) -> str:
    """The Trainer's precision."""
    precision = config.precision or ("16-mixed" if config.amp else "32-true")
    if precision == "16-mixed" and devices["accelerator"] == "cpu":
        log_rank_zero("note: float16 is for GPUs; on this CPU training runs in bf16-mixed")
        return "bf16-mixed"
    return precision


def compile_options(config: TrainConfig, devices: dict[str, Any]) -> dict[str, Any]:
    """Options of torch.compile.

    Where Triton cannot run, as on a V100, a GPU mostly waits for the launches of the
    sweeps' loops: the model's passes are replayed as CUDA graphs. Gradients that live in a graph's
    memory cannot be added up over batches, so that with accumulated batches they are not.
    """
    on_gpu = devices["accelerator"] == "gpu"
    loops = on_gpu and (config.backend == "torch" or why_no_triton(torch.device("cuda")))
    replayed = loops and config.accumulate_grad_batches == 1
    return {"backend": "cudagraphs", "dynamic": False} if replayed else {}


def say_what_may_surprise(config: TrainConfig) -> None:
    """Notes on flags that are legal and seldom meant."""
    if not config.make_checkpoint:
        log_rank_zero("note: without --make_checkpoint no weights of this run are kept")
    reached = config.beta_rate * config.iters
    if reached < 1:
        log_rank_zero(
            f"note: with --beta_rate {config.beta_rate:g} beta is at {reached:.3g} of "
            "--beta_final after all --iters"
        )


def silence_lightning() -> None:
    """Leaves out what Lightning prints about itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for remark in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{remark}.*")
