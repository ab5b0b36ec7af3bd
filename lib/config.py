"""The typed configuration of a training run; `lib.flags` makes one flag of each field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args, get_origin, get_type_hints

from .DensityVAE.blocks import BLOCKS, HIGHWAY
from .nn import BACKENDS, BORDERS
from .probability import OBSERVATIONS, POSTERIORS, PRIORS, TAILS
from .ranges import (
    ABOVE_ZERO,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    ConfigError,
    Range,
    at_most,
    check_number,
)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
NOISES = ("batch", "image")
LOGGERS = ("auto", "wandb", "tensorboard", "none")
ARCHITECTURE = "Architecture"

# What differs from the fields' defaults for a task, and the fields that say nothing to it.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "density_estimation": {},
    "disentanglement": dict(
        dataset="3DShapes",
        iters=300_000,
        batch=128,
        z_size=10,
        post_model="IsoGaussian",
        obs_model="DL",
        sdn_nfeat_0=200,
        sdn_num_dirs=1,
        lrate=0.001,
        lrate_decay=1.0,
        free_bits=0.0,
        beta_rate=1e-5,
        analytic_kl=True,
        sampling_temperature=1.0,
    ),
}
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "density_estimation": (),
    "disentanglement": (
        "depth",
        "ds_list",
        "downsample_first",
        "h_size",
        "sdn_nfeat_diff",
        "block",
        "highway",
        "ema_coef",
        "checkpoint_activations",
    ),
}


def _flag(group: str, default: Any, meaning: str, *allowed: str | Range) -> Any:
    """A field with what it may be: some words, or a number in all of some ranges."""
    choices = tuple(each for each in allowed if isinstance(each, str)) or None
    ranges = tuple(each for each in allowed if isinstance(each, Range))
    metadata = dict(group=group, meaning=meaning, choices=choices, ranges=ranges)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_run = partial(_flag, "Run")
_safety = partial(_flag, "Safety")
_data = partial(_flag, "Data")
_model = partial(_flag, ARCHITECTURE)
_optimize = partial(_flag, "Optimization")
_hardware = partial(_flag, "Hardware")
_log = partial(_flag, "Logging")


@dataclass
class TrainConfig:
    """All settings of `train.py`; names are the authors' release's, defaults the CIFAR10 recipe on
    one device.

    The defaults of the other task, disentanglement on 3D-Shapes, are what `for_task` gives.

    Raises:
        ConfigError: from `validate`, before anything is touched.
    """

    task: str = _run("density_estimation", "what to train", *TASK_DEFAULTS)
    exp_name: str = _run("sdn", "name of the experiment: its folder under checkpoints/ and figs/")
    random_seed: int = _run(
        1234,
        "seed of weights, data order, augmentation and noise",
        NOT_NEGATIVE,
        Range("below 2^32", most=2**32 - 1),
    )
    iters: int = _run(1_000_000, "stop after this many optimizer steps", POSITIVE)
    max_epochs: int = _run(-1, "stop after this many epochs, if that comes first; -1: no limit")
    output_dir: str = _run(".", "where checkpoints/ and figs/ are")
    make_checkpoint: bool = _run(
        False, "keep checkpoints: the best (density estimation only) and the last"
    )
    use_checkpoint: bool = _run(
        False, "go on from the experiment's last checkpoint, if there is one"
    )
    init_from: str = _run(
        "",
        "checkpoint, ours or the authors', or folder of publish.py, from whose weights a new run "
        "starts, as far as they fit; a run that goes on from its own checkpoint has them already",
    )

    checkpoint_every_n_steps: int = _safety(
        0, "optimizer steps between checkpoints inside an epoch; 0: none by steps", NOT_NEGATIVE
    )
    checkpoint_every_minutes: float = _safety(
        10.0, "minutes between checkpoints inside an epoch; 0: none by time", NOT_NEGATIVE
    )
    keep_last: int = _safety(
        2, "how many of the last checkpoints to keep, beside the best", POSITIVE
    )
    grad_clip: float = _safety(0.0, "scale gradients down to this norm; 0: never", NOT_NEGATIVE)
    max_skipped: int = _safety(
        20,
        "go back after so many steps in a row with a loss or gradient not finite",
        POSITIVE,
        at_most(100),
    )
    max_rollbacks: int = _safety(
        3, "stop instead of going back to an earlier checkpoint more often", NOT_NEGATIVE
    )
    rollback_lrate: float = _safety(
        0.5, "multiplies the learning rate when a run goes back", FRACTION
    )

    dataset: str = _data(
        "CIFAR10",
        "CIFAR10, ImageNet32, CelebAHQ256, Digits8, Photos32, 3DShapes, Shapes3DRendered, one that "
        "was converted, or the path of pictures to convert now (with --image_size)",
    )
    root: str = _data("data", "folder that holds the data sets")
    image_size: list[int] = _data(
        [],
        "height and width, or one number for both, of the images that pictures are made to; "
        "other data sets have their own",
    )
    channels: int = _data(
        0,
        "3, or 1 for grey images, that pictures are made to; 0: 3, or the data set's",
        Range("0, 1 or 3", 0, 3),
    )
    num_workers: int = _data(
        2, "loader processes of each training process", NOT_NEGATIVE, at_most(1024)
    )
    batch: int = _data(32, "batch size of each device", POSITIVE)
    batch_val: int = _data(
        0, "batch size of validation on each device; 0 or less: the same as batch"
    )
    epoch_images: int = _data(
        0,
        "images of an epoch, at whose end checkpoints are written; 0: all",
        NOT_NEGATIVE,
        Range("at most 10^9", most=10**9),
    )
    val_images: int = _data(0, "validate on the first val_images images; 0: all", NOT_NEGATIVE)

    depth: int = _model(
        15, "number of ladder layers; layer 0 is at the image's scale", POSITIVE, at_most(1000)
    )
    ds_list: list[int] = _model([5, 10], "layers that halve the scale, each in 0 ... depth-1")
    downsample_first: bool = _model(False, "halve the scale in the first convolution already")
    h_size: int = _model(200, "deterministic channels", POSITIVE, at_most(2**20))
    z_size: int = _model(
        4,
        "latent channels of each layer; disentanglement: latent dimensions",
        POSITIVE,
        at_most(2**20),
    )
    post_model: str = _model("IAF", "posterior", *POSTERIORS)
    prior_model: str = _model("IsoGaussian", "prior", *PRIORS)
    obs_model: str = _model("DML", "observation model", *OBSERVATIONS)
    mix_components: int = _model(5, "mixture components of DML", POSITIVE, at_most(2**20))
    dml_tails: str = _model(
        "approximate", "DML's bins below 1e-5: as in the literature, or exact", *TAILS
    )
    nbits: int = _model(8, "bits per colour, 1 to 8", Range("1 to 8", 1, 8))
    sdn_max_scale: int = _model(
        32, "largest scale with SDN layers; 0: none, the IAF-VAE+ baseline", NOT_NEGATIVE
    )
    sdn_min_scale: int = _model(0, "smallest scale with SDN layers", NOT_NEGATIVE)
    sdn_nfeat_0: int = _model(360, "features of the first SDN layers", NOT_NEGATIVE, at_most(2**20))
    sdn_nfeat_diff: int = _model(
        128, "fewer features after each downsampling SDN layer, not below 50", NOT_NEGATIVE
    )
    sdn_num_dirs: int = _model(
        2, "directions of each SDN layer, 1 to 4", Range("at most 4", most=4)
    )
    block: str = _model(
        "sdn", "what is at the scales with SDN layers; others are for ablations (Table 4)", *BLOCKS
    )
    highway: str = _model(
        "auto", "whether blocks are gated with a convolution; auto: sdn is", *HIGHWAY
    )
    border: str = _model(
        "zeros", "first line of a sweep: corrected (paper) or kept (release)", *BORDERS
    )

    lrate: float = _optimize(0.002, "learning rate of Adamax", ABOVE_ZERO)
    lrate_decay: float = _optimize(
        0.999, "multiplies the learning rate after each epoch; 1: constant", FRACTION
    )
    lrate_patience: int = _optimize(
        0,
        "halve the learning rate after so many validations in a row without a better one; 0: never",
        NOT_NEGATIVE,
    )
    free_bits: float = _optimize(
        0.01, "nats of KL that each layer (dimension) has for free", NOT_NEGATIVE
    )
    beta_final: float = _optimize(1.0, "weight of the KL, once annealed", NOT_NEGATIVE)
    beta_rate: float = _optimize(
        1.0, "part of beta_final that is added each step, from 0; 1: no annealing", FRACTION
    )
    ema_coef: float = _optimize(
        0.999,
        "decay per step of the weight average used to evaluate and sample",
        Range("at least 0 and below 1", 0, 1, open_above=True),
    )
    analytic_kl: bool = _optimize(
        False, "closed-form KL, not one sample; for --post_model IsoGaussian"
    )
    accumulate_grad_batches: int = _optimize(1, "batches per optimizer step", POSITIVE)
    noise: str = _optimize(
        "batch",
        "drawn by batch, or by image: then the number of processes has no influence",
        *NOISES,
    )

    gpus: int | None = _hardware(
        None,
        "GPUs of each node; default: 1 if there is one, else 0, the CPU",
        Range("0 (the CPU) or more", 0),
    )
    num_processes: int = _hardware(
        1, "processes of each node when --gpus is 0", POSITIVE, at_most(256)
    )
    num_nodes: int = _hardware(1, "machines", POSITIVE, at_most(100_000))
    distributed_backend: str = _hardware("ddp", "how several processes work together", "ddp")
    amp: bool = _hardware(
        False, "float16 with loss scaling, as the authors; on a CPU bfloat16; not with --precision"
    )
    precision: str | None = _hardware(None, "numbers' precision; default 32-true", *PRECISIONS)
    backend: str = _hardware("auto", "implementation of the sweeps", *BACKENDS)
    compile: bool = _hardware(False, "torch.compile the model; the first steps take minutes")
    checkpoint_activations: bool = _hardware(
        False,
        "less memory: layers' activations are computed anew in the backward pass; density "
        "estimation",
    )
    profiler_mode: bool = _hardware(
        False, "print where a run's time goes, and time and memory of a few steps, by operator"
    )

    logger: str = _log("auto", "dashboard beside the CSV files; auto: wandb if installed", *LOGGERS)
    check_val_every_n_epoch: int = _log(1, "epochs between validations", POSITIVE)
    figsize: int = _log(
        8,
        "sample and reconstruction grids have figsize x figsize images",
        POSITIVE,
        at_most(100),
    )
    sampling_temperature: float = _log(0.85, "temperature of the sample grids", NOT_NEGATIVE)

    def validate(self) -> None:
        """Checks every field and how they go together; raises ConfigError."""
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value is not None and value not in choices:
                raise ConfigError(
                    f"--{field.name} must be one of {', '.join(choices)}; got {value}"
                )
            if isinstance(value, int | float):
                check_number(field.name, value, field.metadata["ranges"])
        epochs_ok = self.max_epochs == -1 or self.max_epochs >= 1
        name_ok = self.exp_name not in ("", ".", "..") and not set(self.exp_name) & set("/\\\0")
        sizes_ok = len(self.image_size) <= 2 and all(n in range(1, 4097) for n in self.image_size)
        for name, correct, allowed in (
            ("max_epochs", epochs_ok, "-1 (no limit) or at least 1"),
            ("exp_name", name_ok, "a plain folder name"),
            ("channels", self.channels != 2, "0, 1 or 3"),
            ("image_size", sizes_ok, "one or two numbers from 1 to 4096"),
        ):
            if not correct:
                raise ConfigError(f"--{name} must be {allowed}; got {getattr(self, name)}")
        for contradiction in self._contradictions():
            raise ConfigError(contradiction)

    def _contradictions(self) -> Iterator[str]:
        """What is wrong with fields that are each allowed."""
        if self.lrate_patience and self.beta_rate < 1:
            yield "--lrate_patience needs --beta_rate 1: while β rises, -ELBO gets worse by itself"
        if wrong := [layer for layer in self.ds_list if layer not in range(self.depth)]:
            allowed = f"must lie in 0 ... {self.depth - 1} (--depth {self.depth})"
            yield f"--ds_list entries {allowed}; got {wrong}"
        with_sdn = self.sdn_max_scale > 0 and self.block == "sdn"
        if with_sdn and (self.sdn_num_dirs < 1 or self.sdn_nfeat_0 < 1):
            least = "--sdn_num_dirs and --sdn_nfeat_0 must be at least 1"
            yield f"{least}, or --sdn_max_scale 0 (no SDN)"
        if 0 < self.sdn_max_scale < self.sdn_min_scale:
            largest = f"--sdn_max_scale {self.sdn_max_scale}"
            yield f"--sdn_min_scale {self.sdn_min_scale} is above {largest}"
        if self.sdn_max_scale == 0 and (self.block not in ("sdn", "conv3") or self.highway == "on"):
            what = f"--block {self.block} --highway {self.highway}"
            yield f"{what} is for scales up to --sdn_max_scale, which is 0"
        if self.amp and self.precision is not None:
            yield "--amp and --precision exclude each other; --amp is --precision 16-mixed"
        gaussian = f"needs --post_model IsoGaussian; got {self.post_model}"
        if self.task == "disentanglement" and self.post_model != "IsoGaussian":
            yield f"--task disentanglement {gaussian}"
        if self.analytic_kl and self.post_model != "IsoGaussian":
            yield f"--analytic_kl {gaussian}"
        if self.gpus and self.num_processes > 1:
            yield "--num_processes is for the CPU; with --gpus N there are N processes"

    def architecture(self) -> dict[str, Any]:
        """The arguments of `DensityVAE` that define the model."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata["group"] == ARCHITECTURE
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, as a checkpoint stores them."""
        return dataclasses.asdict(self)

    @classmethod
    def for_task(cls, **given: Any) -> TrainConfig:
        """The fields that are given, the others with the defaults of the task.

        Raises:
            ConfigError: if the task is unknown, or one of the fields has no effect on it.
        """
        task = given.get("task", cls.task)
        if task not in TASK_DEFAULTS:
            raise ConfigError(f"--task must be one of {', '.join(TASK_DEFAULTS)}; got {task}")
        if wrong := [f"--{name}" for name in WITHOUT_EFFECT[task] if name in given]:
            raise ConfigError(f"{', '.join(wrong)}: without effect on --task {task}, leave it out")
        return cls(**TASK_DEFAULTS[task] | given)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; fields that a later version added get their default."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(stored) - known, key=str)
        if unknown:
            raise ConfigError(
                f"the stored configuration has unknown fields: {', '.join(map(str, unknown))}"
            )
        for field in dataclasses.fields(cls):
            if field.name in stored and not _fits(field, stored[field.name]):
                raise ConfigError(
                    f"the stored {field.name} cannot be {ascii(stored[field.name])[:60]}"
                )
        return cls(**stored)


def flag_default(field: dataclasses.Field) -> Any:
    """The default of a field of `TrainConfig`."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _fits(field: dataclasses.Field, value: Any) -> bool:
    """Whether a stored value is of the field's type."""
    kind, is_list = flag_type(field.name)
    if value is None or is_list is not isinstance(value, list):
        return value is None and flag_default(field) is None
    kinds = (int, float) if kind is float else (kind,)
    return all(type(item) in kinds for item in (value if is_list else [value]))


def flag_type(name: str) -> tuple[type, bool]:
    """The element type of a flag and whether it takes a list."""
    hint = get_type_hints(TrainConfig)[name]  # such as str, list[int] or int | None
    return (get_args(hint) or (hint,))[0], get_origin(hint) is list
