"""The dashboard beside the CSV files: wandb or TensorBoard. Whatever becomes of it, the run goes
on."""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import secrets
import ssl
import threading
import urllib.request
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import pytorch_lightning as pl

from ..config import ConfigError, TrainConfig
from ..optional import optional
from .processes import log_rank_zero

PATIENCE = 5  # seconds that a run waits for a server: when it begins, and when it ends


class Backend(Protocol):
    """One kind of dashboard; all its methods may raise whatever they like."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def picture(self, name: str, path: Path, step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class Dashboard(pl.Callback):
    """Shows metrics and pictures in the first process of a run.

    What goes wrong with it is told in one line, and from then on it shows nothing.

    Arguments:
        config: Of the run; `logger` says which kind.
        run_folder: Where what it keeps goes.

    Raises:
        ConfigError: if the package is missing that `--logger` asks for.
    """

    def __init__(self, config: TrainConfig, run_folder: Path):
        self._config, self._run_folder = config, run_folder
        self._kind: type[Backend] | None = None
        self._backend: Backend | None = None
        if config.logger == "tensorboard":
            optional("tensorboard", "--logger tensorboard", "tensorboard", ConfigError)
            self._kind = TensorBoard
        elif config.logger == "wandb":
            optional("wandb", "--logger wandb", "wandb", ConfigError)
            self._kind = Wandb
        elif config.logger == "auto":
            if _is_installed("wandb"):
                self._kind = Wandb
            else:
                log_rank_zero("wandb is not installed: metrics go to CSV files only")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._kind and trainer.is_global_zero:
            try:
                self._run_folder.mkdir(parents=True, exist_ok=True)
                self._backend = self._kind(self._config, self._run_folder, trainer.global_step)
            except Exception as error:
                self._give_up(error)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Shows numbers, by name, of an optimizer step."""
        self._call("scalars", values, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Shows a PNG file."""
        self._call("picture", name, path, step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close(failed=False)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close(failed=True)

    def _close(self, *, failed: bool) -> None:
        self._call("close", failed)
        self._backend = None

    def _call(self, method: str, *arguments: Any) -> None:
        if self._backend:
            try:
                getattr(self._backend, method)(*arguments)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        backend, self._backend = self._backend, None
        if backend:
            with suppress(Exception):
                backend.close(failed=True)
        log_rank_zero(
            f"note: {self._config.logger} cannot go on ({_in_one_line(error)}): metrics go to CSV "
            "files only"
        )


class Wandb:
    """A run on wandb: online with a key and a server that knows it, otherwise offline; never at a
    login prompt.

    A run that goes on is the same one there. wandb's own settings of time-outs and folders, in
    environment variables, count before those of a run.
    """

    def __init__(self, config: TrainConfig, run_folder: Path, step: int):
        self._folder = run_folder / "wandb"
        os.environ.setdefault("WANDB_INIT_TIMEOUT", str(PATIENCE))
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(PATIENCE))
        if _home() is None:
            for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
                os.environ.setdefault(name, str(self._folder))
        import wandb

        self._wandb = wandb
        identity = run_folder / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        options = dict(
            name=config.exp_name,
            id=identity.read_text(),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", "sdn"),
            dir=str(run_folder),
            config=config.to_dict(),
        )
        settings = wandb.setup().settings
        reason = None
        if settings.mode in ("online", "run", "shared"):
            reason = why_offline(settings.base_url)
            if not reason:
                try:
                    self._run = wandb.init(**options)
                except wandb.errors.Error as error:
                    reason = _in_one_line(error)
                    wandb.teardown()  # or the name of the run would still be in use
        if reason or settings.mode in ("offline", "dryrun"):
            because = f" ({reason})" if reason else ""
            log_rank_zero(f"wandb logs offline to {self._folder}{because}; `wandb sync` uploads it")
            self._run = wandb.init(**options, mode="offline")
        elif settings.mode == "disabled":
            self._run = wandb.init(mode="disabled")
        self._run.define_metric("trainer/global_step")
        self._run.define_metric("*", step_metric="trainer/global_step", step_sync=True)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values | {"trainer/global_step": step})

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: [self._wandb.Image(str(path))], "trainer/global_step": step})

    def close(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=int(failed))
        finally:
            self._wandb.teardown()  # or it would say at the interpreter's end what went wrong


class TensorBoard:
    """An event file of TensorBoard; of a run that goes on, what came after its checkpoint is left
    out when it is shown."""

    def __init__(self, config: TrainConfig, run_folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = run_folder / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        log_rank_zero(f"TensorBoard: tensorboard --logdir {folder}")

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        import numpy
        from PIL import Image

        with Image.open(path) as image:
            levels = numpy.array(image.convert("RGB"))
        self._writer.add_image(name, levels, step, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


def why_offline(base_url: str) -> str | None:
    """Why wandb cannot log online at `base_url`, or None if it may; asks the server itself, for at
    most `PATIENCE` seconds."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None  # another kind of login
    try:
        host = urlsplit(base_url).hostname or base_url
    except ValueError:
        return f"{base_url} is no URL"
    key = os.environ.get("WANDB_API_KEY") or _netrc_key(host)
    if not key:
        return "no API key"
    reasons: list[str | None] = []
    # A thread, because no time limit of the standard library is one for a whole request.
    thread = threading.Thread(
        target=lambda: reasons.append(_why_refused(base_url, key)), daemon=True, name="wandb"
    )
    thread.start()
    thread.join(PATIENCE)
    reason = reasons[0] if reasons else f"no answer in {PATIENCE} s"
    return f"{host}: {reason}" if reason else None


def _why_refused(base_url: str, key: str) -> str | None:
    try:
        request = urllib.request.Request(
            f"{base_url.rstrip('/')}/graphql",
            json.dumps({"query": "query Viewer { viewer { id } }"}).encode(),
            {
                "Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            known = json.load(answer)["data"]["viewer"]
        return None if known else "the API key is not known there"
    except HTTPError as error:
        return f"{error.code} {error.reason}"
    except (OSError, ValueError, TypeError, LookupError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return None  # wandb may know the server's certificate
        return f"cannot be reached ({_in_one_line(cause)})"


def _netrc_key(host: str) -> str | None:
    """The API key for a host in the file that `wandb login` writes."""
    home = _home()
    path = os.environ.get("NETRC") or (home and home / ".netrc")
    with suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError, TypeError):
        return netrc.netrc(str(path)).authenticators(host)[2] if path else None
    return None


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # hidden
        return False


def _in_one_line(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
