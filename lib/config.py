"""The typed configuration of a training run. `train.py` makes one flag of each field."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_type_hints

from .DensityVAE.blocks import BLOCKS, HIGHWAY
from .nn import BACKENDS, BORDERS
from .probability import OBSERVATIONS, POSTERIORS, PRIORS

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
NOISES = ("batch", "image")
ARCHITECTURE = "Architecture"
SAFETY = "Safety"

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


class ConfigError(ValueError):
    """A flag that is unknown, out of range or contradicts another; the message is one line."""


def _flag(default: Any, group: str, meaning: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata = dict(group=group, meaning=meaning, choices=choices)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """All settings of `train.py`; names are the authors' release's, defaults the CIFAR10 recipe on
    one device.

    The defaults of the other task, disentanglement on 3D-Shapes, are what `for_task` gives.

    Raises:
        ConfigError: from `validate`, before anything is touched.
    """

    task: str = _flag("density_estimation", "Run", "what to train", tuple(TASK_DEFAULTS))
    exp_name: str = _flag(
        "sdn", "Run", "name of the experiment: its folder under checkpoints/ and figs/"
    )
    random_seed: int = _flag(1234, "Run", "seed of weights, data order, augmentation and noise")
    iters: int = _flag(1_000_000, "Run", "stop after this many optimizer steps")
    max_epochs: int = _flag(
        -1, "Run", "stop after this many epochs, if that comes first; -1: no limit"
    )
    output_dir: str = _flag(".", "Run", "where checkpoints/ and figs/ are")
    make_checkpoint: bool = _flag(
        False, "Run", "keep checkpoints: the best (density estimation only) and the last"
    )
    use_checkpoint: bool = _flag(
        False, "Run", "go on from the experiment's last checkpoint, if there is one"
    )

    checkpoint_every_n_steps: int = _flag(
        0, SAFETY, "optimizer steps between checkpoints inside an epoch; 0: none by steps"
    )
    checkpoint_every_minutes: float = _flag(
        10.0, SAFETY, "minutes between checkpoints inside an epoch; 0: none by time"
    )
    keep_last: int = _flag(2, SAFETY, "how many of the last checkpoints to keep, beside the best")
    grad_clip: float = _flag(0.0, SAFETY, "scale gradients down to this norm; 0: never")
    max_skipped: int = _flag(
        20, SAFETY, "go back after so many steps in a row with a loss or gradient not finite"
    )
    max_rollbacks: int = _flag(
        3, SAFETY, "stop instead of going back to an earlier checkpoint more often"
    )
    rollback_lrate: float = _flag(0.5, SAFETY, "multiplies the learning rate when a run goes back")

    dataset: str = _flag(
        "CIFAR10",
        "Data",
        "CIFAR10, ImageNet32, CelebAHQ256, Photos32, 3DShapes or Shapes3DRendered",
    )
    root: str = _flag("data", "Data", "folder that holds the data sets")
    num_workers: int = _flag(2, "Data", "loader processes of each training process")
    batch: int = _flag(32, "Data", "batch size of each device")
    batch_val: int = _flag(
        0, "Data", "batch size of validation on each device; 0 or less: the same as batch"
    )
    epoch_images: int = _flag(
        0, "Data", "images of an epoch, at whose end checkpoints are written; 0: all"
    )
    val_images: int = _flag(0, "Data", "validate on the first val_images images; 0: all")

    depth: int = _flag(15, ARCHITECTURE, "number of ladder layers; layer 0 is at the image's scale")
    ds_list: list[int] = _flag(
        [5, 10], ARCHITECTURE, "layers that halve the scale, each in 0 ... depth-1"
    )
    downsample_first: bool = _flag(
        False, ARCHITECTURE, "halve the scale in the first convolution already"
    )
    h_size: int = _flag(200, ARCHITECTURE, "deterministic channels")
    z_size: int = _flag(
        4, ARCHITECTURE, "latent channels of each layer; disentanglement: latent dimensions"
    )
    post_model: str = _flag("IAF", ARCHITECTURE, "posterior", tuple(POSTERIORS))
    prior_model: str = _flag("IsoGaussian", ARCHITECTURE, "prior", tuple(PRIORS))
    obs_model: str = _flag("DML", ARCHITECTURE, "observation model", OBSERVATIONS)
    mix_components: int = _flag(5, ARCHITECTURE, "mixture components of DML")
    nbits: int = _flag(8, ARCHITECTURE, "bits per colour, 1 to 8")
    sdn_max_scale: int = _flag(
        32, ARCHITECTURE, "largest scale with SDN layers; 0: none, the IAF-VAE+ baseline"
    )
    sdn_min_scale: int = _flag(0, ARCHITECTURE, "smallest scale with SDN layers")
    sdn_nfeat_0: int = _flag(360, ARCHITECTURE, "features of the first SDN layers")
    sdn_nfeat_diff: int = _flag(
        128, ARCHITECTURE, "fewer features after each downsampling SDN layer, not below 50"
    )
    sdn_num_dirs: int = _flag(2, ARCHITECTURE, "directions of each SDN layer, 1 to 4")
    block: str = _flag(
        "sdn",
        ARCHITECTURE,
        "what is at the scales with SDN layers; others are for ablations (Table 4)",
        BLOCKS,
    )
    highway: str = _flag(
        "auto", ARCHITECTURE, "whether blocks are gated with a convolution; auto: sdn is", HIGHWAY
    )
    border: str = _flag(
        "zeros", ARCHITECTURE, "first line of a sweep: corrected (paper) or kept (release)", BORDERS
    )

    lrate: float = _flag(0.002, "Optimization", "learning rate of Adamax")
    lrate_decay: float = _flag(
        0.999, "Optimization", "multiplies the learning rate after each epoch; 1: constant"
    )
    lrate_patience: int = _flag(
        0,
        "Optimization",
        "halve the learning rate after so many validations in a row without a better one; 0: never",
    )
    free_bits: float = _flag(
        0.01, "Optimization", "nats of KL that each layer (dimension) has for free"
    )
    beta_final: float = _flag(1.0, "Optimization", "weight of the KL, once annealed")
    beta_rate: float = _flag(
        1.0, "Optimization", "part of beta_final that is added each step, from 0; 1: no annealing"
    )
    ema_coef: float = _flag(
        0.999, "Optimization", "decay per step of the weight average used to evaluate and sample"
    )
    analytic_kl: bool = _flag(
        False, "Optimization", "closed-form KL, not one sample; for --post_model IsoGaussian"
    )
    accumulate_grad_batches: int = _flag(1, "Optimization", "batches per optimizer step")
    noise: str = _flag(
        "batch",
        "Optimization",
        "drawn by batch, or by image: then the number of processes has no influence",
        NOISES,
    )

    gpus: int | None = _flag(
        None, "Hardware", "GPUs of each node; default: 1 if there is one, else 0, the CPU"
    )
    num_processes: int = _flag(1, "Hardware", "processes of each node when --gpus is 0")
    num_nodes: int = _flag(1, "Hardware", "machines")
    distributed_backend: str = _flag(
        "ddp", "Hardware", "how several processes work together", ("ddp",)
    )
    amp: bool = _flag(
        False,
        "Hardware",
        "float16 with loss scaling, as the authors; on a CPU bfloat16; not with --precision",
    )
    precision: str | None = _flag(
        None, "Hardware", "numbers' precision; default 32-true", PRECISIONS
    )
    backend: str = _flag("auto", "Hardware", "implementation of the sweeps", BACKENDS)
    compile: bool = _flag(
        False, "Hardware", "torch.compile the model; the first steps take minutes"
    )
    checkpoint_activations: bool = _flag(
        False,
        "Hardware",
        "less memory: layers' activations are computed anew in the backward pass; density estimation",
    )
    profiler_mode: bool = _flag(
        False,
        "Hardware",
        "print where a run's time goes, and time and memory of a few steps, by operator",
    )

    logger: str = _flag(
        "auto",
        "Logging",
        "dashboard beside the CSV files; auto: wandb if installed",
        ("auto", "wandb", "none"),
    )
    check_val_every_n_epoch: int = _flag(1, "Logging", "epochs between validations")
    figsize: int = _flag(
        8, "Logging", "sample and reconstruction grids have figsize x figsize images"
    )
    sampling_temperature: float = _flag(0.85, "Logging", "temperature of the sample grids")

    def validate(self) -> None:
        """Checks every field and how they go together; raises ConfigError."""
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value is not None and value not in choices:
                raise ConfigError(
                    f"--{field.name} must be one of {', '.join(choices)}; got {value}"
                )
            self._require(
                field.name, not isinstance(value, float) or math.isfinite(value), "a finite number"
            )
        for name in (
            "iters",
            "batch",
            "depth",
            "h_size",
            "z_size",
            "mix_components",
            "accumulate_grad_batches",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "num_processes",
            "num_nodes",
            "check_val_every_n_epoch",
            "figsize",
            "keep_last",
            "max_skipped",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "num_workers",
            "free_bits",
            "sampling_temperature",
            "sdn_max_scale",
            "sdn_min_scale",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in (
            "sdn_nfeat_0",
            "sdn_nfeat_diff",
            "random_seed",
            "beta_final",
            "epoch_images",
            "val_images",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in (
            "checkpoint_every_n_steps",
            "checkpoint_every_minutes",
            "grad_clip",
            "max_rollbacks",
            "lrate_patience",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("random_seed", self.random_seed < 2**32, "below 2^32")
        self._require("max_skipped", self.max_skipped <= 100, "at most 100")
        self._require("num_workers", self.num_workers <= 1024, "at most 1024")
        self._require("epoch_images", self.epoch_images <= 10**9, "at most 10^9")
        self._require("gpus", self.gpus is None or self.gpus >= 0, "0 (the CPU) or more")
        self._require(
            "max_epochs",
            self.max_epochs == -1 or self.max_epochs >= 1,
            "-1 (no limit) or at least 1",
        )
        self._require("lrate", self.lrate > 0, "above 0")
        self._require("lrate_decay", 0 < self.lrate_decay <= 1, "above 0 and at most 1")
        self._require("beta_rate", 0 < self.beta_rate <= 1, "above 0 and at most 1")
        self._require("rollback_lrate", 0 < self.rollback_lrate <= 1, "above 0 and at most 1")
        self._require("ema_coef", 0 <= self.ema_coef < 1, "at least 0 and below 1")
        self._require("nbits", 1 <= self.nbits <= 8, "1 to 8")
        name_ok = self.exp_name not in ("", ".", "..") and not set(self.exp_name) & set("/\\\0")
        self._require("exp_name", name_ok, "a plain folder name")
        if self.lrate_patience and self.beta_rate < 1:
            raise ConfigError(
                "--lrate_patience needs --beta_rate 1: while β rises, -ELBO gets worse by itself"
            )
        wrong = [i for i in self.ds_list if i not in range(self.depth)]
        if wrong:
            raise ConfigError(
                f"--ds_list entries must lie in 0 ... {self.depth - 1} (--depth {self.depth}); got {wrong}"
            )
        if self.sdn_num_dirs > 4:
            raise ConfigError(f"--sdn_num_dirs must be at most 4; got {self.sdn_num_dirs}")
        with_sdn = self.sdn_max_scale > 0 and self.block == "sdn"
        if with_sdn and (self.sdn_num_dirs < 1 or self.sdn_nfeat_0 < 1):
            raise ConfigError(
                "--sdn_num_dirs and --sdn_nfeat_0 must be at least 1, or --sdn_max_scale 0 (no SDN)"
            )
        if self.sdn_max_scale > 0 and self.sdn_min_scale > self.sdn_max_scale:
            raise ConfigError(
                f"--sdn_min_scale {self.sdn_min_scale} is above --sdn_max_scale {self.sdn_max_scale}"
            )
        if self.sdn_max_scale == 0 and (self.block not in ("sdn", "conv3") or self.highway == "on"):
            raise ConfigError(
                f"--block {self.block} --highway {self.highway} is for scales up to --sdn_max_scale, which is 0"
            )
        if self.amp and self.precision is not None:
            raise ConfigError(
                "--amp and --precision exclude each other; --amp is --precision 16-mixed"
            )
        if self.task == "disentanglement" and self.post_model != "IsoGaussian":
            raise ConfigError(
                f"--task disentanglement needs --post_model IsoGaussian; got {self.post_model}"
            )
        if self.analytic_kl and self.post_model != "IsoGaussian":
            raise ConfigError(
                f"--analytic_kl needs --post_model IsoGaussian; got {self.post_model}"
            )
        if self.gpus and self.num_processes > 1:
            raise ConfigError("--num_processes is for the CPU; with --gpus N there are N processes")

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"--{name} must be {allowed}; got {getattr(self, name)}")

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
    hint = get_type_hints(TrainConfig)[name]
    if hint == list[int]:
        return int, True
    for plain in (bool, int, float, str):
        if hint in (plain, plain | None):
            return plain, False
    raise TypeError(f"{name}: {hint}")
