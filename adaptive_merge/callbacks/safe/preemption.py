"""`Preemption`: told to stop, a run finishes its step, saves, and says how it ended."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from adaptive_merge.callbacks.safe.ranks import Ranks
from adaptive_merge.process import signals
from adaptive_merge.process.signals import EXIT_REQUEUE, EXIT_TERMINATED, GO_ON, Preempted, Signals, slurm_job

__all__ = ["EXIT_REQUEUE", "EXIT_TERMINATED", "Preempted", "Preemption", "slurm_job"]

_log = logging.getLogger(__name__)


class Preemption(pl.Callback):
    """Signals set a flag; all processes agree on it after each step, save, and leave.

    Lightning's own handlers save and communicate inside the handler, in the middle of a backward pass, and a
    SIGTERM ends with exit code 0. `Signals` takes their place: the command line's, from start to exit, or one of our
    own for the time of `fit`.

    Ctrl-C ends with 130, SIGTERM with 143. SIGUSR1 and SIGUSR2 are the scheduler's warning that time runs out: under
    SLURM the job is handed back to the queue and ends with 75, elsewhere it ends with 143 as well. `scancel` sends
    SIGTERM, so what somebody has cancelled does not come back.

    Args:
        checkpoint: file to save to.
        grace: seconds from a SIGTERM after which a process that has not come to the end of its step, because
            another one hangs, writes its traceback and ends.
    """

    def __init__(self, checkpoint: str | Path, grace: float = 15.0) -> None:
        self.checkpoint, self.grace = Path(checkpoint), grace
        self._agreed = GO_ON
        self._ranks = Ranks()
        self._signals = Signals(grace, deferred=True)
        self._own = contextlib.ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen from here on, where nobody does yet: a signal during the set-up is answered after the first step."""
        if stage == "fit":
            self._agreed = GO_ON
            listening = signals.current()
            self._signals = listening or self._own.enter_context(Signals(self.grace, deferred=True))
            self._signals.grace = self.grace

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on it is the end of a step that is worth keeping."""
        self._ranks.connect(trainer)
        self._signals.deferred = True
        self._signals.listen()  # Lightning may have put its handlers over ours

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where any process was told to stop, all of them save."""
        if self._agreed or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._agree(trainer)

    # The step's numbers are logged between its end and the next hook, so a run leaves from there.

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Leave, if that was agreed."""
        self._leave(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave, if that was agreed: validation may take longer than there is time, or than a step has."""
        self._leave(trainer)
        self._signals.limited = False

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Alone, leave from here; several processes have other numbers of batches, and agree at the end of them."""
        if trainer.state.fn == "fit" and trainer.world_size == 1 and self._signals.asked:
            self._agree(trainer)
            self._leave(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Back to steps, or leave from here."""
        self._signals.limited = True
        if trainer.state.fn == "fit" and not self._agreed and not trainer.sanity_checking:
            self._agree(trainer)
            self._leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave, if that was agreed at the last step."""
        self._leave(trainer)

    def settle(self, trainer: pl.Trainer) -> None:
        """After `fit`, with the end of it saved: leave, all processes, where one was told to; else answer at once.

        Only for a run of the command line, whose `Signals` are still there.
        """
        self._agreed = self._ranks.highest(self._signals.asked)
        self._leave(trainer)
        self._signals.answer_now()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back to whom they belonged."""
        if stage == "fit":
            self._own.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back; one that comes while the process winds up changes nothing any more."""
        self._own.__exit__(type(exception), exception, exception.__traceback__)
        self._own = contextlib.ExitStack()

    def _agree(self, trainer: pl.Trainer) -> None:
        self._agreed = self._ranks.highest(self._signals.asked)
        if self._agreed:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)

    def _leave(self, trainer: pl.Trainer) -> None:
        if not self._agreed:
            return
        code = signals.exit_code(self._agreed, trainer.is_global_zero)
        if self._agreed == signals.REQUEUE and slurm_job():
            code = EXIT_REQUEUE if not self._ranks.highest(int(code != EXIT_REQUEUE)) else EXIT_TERMINATED
        if trainer.is_global_zero:
            _log.warning("told to stop: saved step %d in %s", trainer.global_step, self.checkpoint)
        self._signals.leave(code, saved=True)
