"""What a run needs and a model does not; `run` trains.

    run.py                  the Trainer with its callbacks; which devices, which precision
    base.py                 the LightningModule: objective, optimizer, noise, validation
    metrics_log.py          steps.csv, epochs.csv, run.json
    image_grids.py          pictures at each validation
    loggers.py              wandb or TensorBoard, which can end no run
    progress.py             a bar, or lines for a log file
    checkpoints.py          when checkpoints are written, and which are kept
    resume.py               where a run is, and which checkpoint it goes on from
    non_finite.py           steps whose numbers go wrong
    processes.py            ranks and loader workers: agreeing, dying, hanging
    signals.py, faults.py   how a run is asked to stop; how it ends, and with which exit status
    profiling.py            `--profiler_mode`
    released.py             checkpoints of the authors' release, to go on from
    lightning_internals.py  every use of what Lightning keeps to itself

How a run resumes: `resume.find_checkpoint` takes the newest checkpoint in the run's folder that is
not damaged, and refuses one of another model. Lightning loads weights, average, optimizer, schedule
and the states of the callbacks from it. `base.VAETraining.on_load_checkpoint` sets the `Position`:
so many epochs and so many images of the next one are done, and whether a validation is still to
come; it writes the same into the counters of Lightning's loops. The data module starts its sampler
at that image, whose order depends on the seed alone. Noise needs no state: `seed_step` seeds each
batch by (seed, epoch, batch, rank). `MetricsLog` drops the rows of the logs that come after the
checkpoint's step, and goes on with the sums since the last validation. `Checkpoints` gives the file
its other names, last.ckpt and best.ckpt, in case the run was killed in between. So a run that is
killed at any moment and started again ends bit for bit as one that never was
(tests/training/test_resume.py).
"""

from .run import run

__all__ = ["run"]
