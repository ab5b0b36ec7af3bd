"""The dashboard beside the CSV files: wandb, where it is installed."""

from __future__ import annotations

import netrc
import os
import secrets
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytorch_lightning as pl

from ..config import ConfigError, TrainConfig
from .processes import log_rank_zero


def make_logger(config: TrainConfig, run_folder: Path) -> pl.loggers.Logger | bool:
    """wandb, never at a login prompt: without a key or a network it logs offline and says where; or
    no dashboard."""
    if config.logger == "none":
        return False
    try:
        import wandb
    except ImportError:
        if config.logger == "wandb":
            raise ConfigError(
                "--logger wandb: the package is missing; pip install wandb, or --logger none"
            ) from None
        log_rank_zero("wandb is not installed: metrics go to CSV files only")
        return False
    mode = os.environ.get("WANDB_MODE", "online")
    reason = (
        None
        if mode != "online"
        else why_offline(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url)
    )

    def logger(mode: str) -> pl.loggers.Logger:
        run_folder.mkdir(parents=True, exist_ok=True)
        path = run_folder / "wandb_id"  # a run that goes on is the same one there
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        return pl.loggers.WandbLogger(
            name=config.exp_name,
            id=path.read_text(),
            resume="allow",
            project="sdn",
            save_dir=str(run_folder),
            config=config.to_dict(),
            mode=mode,
        )

    if mode == "online" and not reason:
        online = logger(mode)
        try:
            _ = online.experiment  # logs in: what fails, fails here
            return online
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
    if reason or mode == "offline":
        because = f" ({reason})" if reason else ""
        log_rank_zero(
            f"wandb logs offline to {run_folder / 'wandb'}{because}; `wandb sync` uploads it"
        )
        mode = "offline"
    return logger(mode)


def why_offline(base_url: str) -> str | None:
    """Why wandb cannot log online at `base_url`, or None if it can."""
    address = urlsplit(base_url)
    if not os.environ.get("WANDB_API_KEY"):
        path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
        try:
            key = path.is_file() and netrc.netrc(str(path)).authenticators(address.hostname)
        except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
            key = None
        if not key:
            return "no API key"
    if urllib.request.getproxies():
        return None  # a direct connection would say nothing
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return f"{address.hostname} cannot be reached"
    return None
