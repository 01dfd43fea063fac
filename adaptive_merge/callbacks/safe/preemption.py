"""`Preemption`: told to stop, a run finishes its step, saves, and says how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from adaptive_merge.callbacks.safe.ranks import Ranks

__all__ = ["EXIT_REQUEUE", "EXIT_TERMINATED", "Preempted", "Preemption", "slurm_job"]

_log = logging.getLogger(__name__)
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: start me again
EXIT_TERMINATED = 128 + signal.SIGTERM
_INTERACTIVE = ("bash", "interactive")  # names that turn off SLURM mode in Lightning
# What was asked, in order of rank: processes agree on the highest.
_GO_ON, _STOP, _REQUEUE = 0, 1, 2


class Preempted(SystemExit):
    """The run was told to stop and has saved `last.ckpt`; its code is the exit code of the process."""


class Preemption(pl.Callback):
    """SIGTERM and SIGUSR1 set a flag; all processes agree on it after each step, save, and leave.

    Lightning's own handlers save and communicate inside the handler, in the middle of a backward pass, and a
    SIGTERM ends with exit code 0. These take their place for the time of `fit`.

    SIGTERM ends with 143. SIGUSR1 is the scheduler's warning that time runs out: under SLURM the job is handed
    back to the queue and ends with 75, elsewhere it ends with 143 as well. `scancel` sends SIGTERM, so what
    somebody has cancelled does not come back.

    Args:
        checkpoint: file to save to.
        grace: seconds from a SIGTERM after which a process that has not come to the end of its step, because
            another one hangs, writes its traceback and ends.
    """

    def __init__(self, checkpoint: str | Path, grace: float = 15.0) -> None:
        self.checkpoint, self.grace = Path(checkpoint), grace
        self._asked = self._agreed = _GO_ON
        self._ranks = Ranks()
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen from here on: a signal during the set-up is answered after the first step."""
        if stage == "fit":
            self._asked = self._agreed = _GO_ON
            self._before = {number: signal.getsignal(number) for number in _answers()}
            self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has put its handlers over ours; take them off again."""
        self._ranks.connect(trainer)
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where any process was told to stop, all of them save."""
        if self._agreed or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._agreed = self._ranks.highest(self._asked)
        if self._agreed:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)

    # The step's numbers are logged between its end and the next hook, so a run leaves from there.

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Leave, if that was agreed."""
        self._leave(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave, if that was agreed: validation may take longer than there is time."""
        self._leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave, if that was agreed at the last step."""
        self._leave(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back to whom they belonged."""
        if stage == "fit":
            self._stop_listening()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back; one that comes while the process winds up changes nothing any more."""
        self._stop_listening(signal.SIG_IGN if isinstance(exception, Preempted) else None)

    def _listen(self) -> None:
        for number in _answers():
            with contextlib.suppress(ValueError):  # not the main thread: somebody else answers signals here
                signal.signal(number, self._note)

    def _stop_listening(self, handler: Any = None) -> None:
        faulthandler.cancel_dump_traceback_later()
        for number, before in self._before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler or before or signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, _: Any) -> None:
        """All that a handler does: nothing here waits for a lock or another process."""
        self._asked = max(self._asked, _answers()[signal.Signals(number)])
        if number == signal.SIGTERM:
            with contextlib.suppress(ValueError, OSError, AttributeError):
                faulthandler.dump_traceback_later(self.grace, exit=True, file=sys.__stderr__)

    def _leave(self, trainer: pl.Trainer) -> None:
        if not self._agreed:
            return
        code = EXIT_TERMINATED
        if self._agreed == _REQUEUE and slurm_job():
            handed_back = not trainer.is_global_zero or _requeue(slurm_job())
            code = EXIT_REQUEUE if not self._ranks.highest(int(not handed_back)) else EXIT_TERMINATED
        if trainer.is_global_zero:
            _log.warning("told to stop: saved step %d in %s", trainer.global_step, self.checkpoint)
        raise Preempted(code)


def slurm_job() -> str | None:
    """The id of the SLURM job that this process is part of, as `scontrol requeue` wants it; None outside one."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if os.environ.get("SLURM_ARRAY_JOB_ID") and os.environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    usable = re.fullmatch(r"\d+(_\d+)?", job) and os.environ.get("SLURM_JOB_NAME") not in _INTERACTIVE
    return job if usable else None


def _requeue(job: str) -> bool:
    command = shutil.which("scontrol")
    if command is None:
        _log.warning("SLURM job %s is not requeued: there is no scontrol here", job)
        return False
    ended = subprocess.run([command, "requeue", job], check=False, timeout=60, capture_output=True, text=True)
    if ended.returncode:
        _log.warning("scontrol requeue %s ended with %d: %s", job, ended.returncode, ended.stderr.strip())
    return ended.returncode == 0


def _answers() -> dict[signal.Signals, int]:
    known: dict[str, int] = {"SIGTERM": _STOP, "SIGUSR1": _REQUEUE}
    return {getattr(signal, name): asked for name, asked in known.items() if hasattr(signal, name)}
