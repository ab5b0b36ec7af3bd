"""Ends a run with one line for what is neither bad input nor an error in the program."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import SLURMEnvironment

from ..cli import MORE_FILES
from .non_finite import Diverged
from .processes import RESUME_HINT, log_rank_zero, worker_death
from .signals import FAILED, Stopped, exit_at_once


@contextmanager
def faults_in_one_line() -> Iterator[None]:
    """Turns a stop by a signal, a divergence, a lack of memory, and the loss of a loader worker or
    of another process into one line and the exit status that belongs to it."""
    try:
        yield
        return
    except Stopped as stopped:
        log_rank_zero(f"train.py: {stopped}")
        # The main process takes one that Lightning started for dead if it ends with a status.
        launched = "LOCAL_RANK" in os.environ and not (
            dist.is_torchelastic_launched() or SLURMEnvironment.detect()
        )
        sys.exit(0 if launched and os.environ["LOCAL_RANK"] != "0" else stopped.status)
    except Diverged as error:
        log_rank_zero(f"train.py: error: {error}")
    except torch.OutOfMemoryError as error:
        print_fault(f"{str(error).splitlines()[0]} A smaller --batch needs less")
    except RuntimeError as error:
        fault = known_fault(error)
        if fault is None:
            raise
        print_fault(fault)
        if dist.is_initialized():  # whose end would wait for the processes that are lost
            exit_at_once(FAILED)
    sys.exit(FAILED)


def print_fault(fault: str) -> None:
    """Prints the line with which a run ends, in whichever process finds the fault."""
    print(f"train.py: error: {fault}; {RESUME_HINT}", file=sys.stderr, flush=True)


def known_fault(error: RuntimeError) -> str | None:
    """What to tell of an error of torch; None if it is an error in the program."""
    text = str(error).strip()
    last = text.splitlines()[-1] if text else ""
    if timeout := re.search(r"DataLoader timed out after ([\d.]+) seconds", text):
        return f"the loader gave no batch for {float(timeout[1]):g} s"
    if re.search(r"DataLoader worker .* (exited unexpectedly|is killed by signal)", text):
        return worker_death(last)
    if os.strerror(errno.EMFILE) in text:
        return f"{os.strerror(errno.EMFILE)}; {MORE_FILES}"
    if "EADDRINUSE" in text:
        port = os.environ.get("MASTER_PORT", "of MASTER_PORT")
        return f"port {port}, at which the processes of this run were to meet, is in use"
    if isinstance(error, dist.DistError) or re.search(r"gloo|nccl|by peer", last, re.IGNORECASE):
        return "lost contact with another process of this run"
    return None
