"""What Lightning's strategies have to know of a run: how long processes wait, and what DDP may expect of a step."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from adaptive_merge import upstream
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["PATIENCE", "announce", "bound_waiting", "closing", "suit_ddp"]

PATIENCE: Final = timedelta(minutes=5)


def bound_waiting(strategy: Strategy) -> None:
    """Wait 5 minutes for a process that hangs or is slow to start, not Lightning's 30, unless a timeout was given.

    Call before the strategy forms the processes' group. A timeout that the user gave is kept, 30 minutes too.
    """
    upstream.bound_timeout(strategy, PATIENCE)


def suit_ddp(trainer: pl.Trainer, partly_used: bool) -> None:
    """Make plain DDP fit; call in `setup`, before the strategy builds torch's DDP from its options.

    Args:
        trainer: about to fit.
        partly_used: whether a step may use some of the parameters only.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        options = {"find_unused_parameters": partly_used, "gradient_as_bucket_view": True}
        upstream.add_ddp_options(trainer.strategy, options)
        if trainer.max_steps == 0:  # only scored; DDP refuses a module of which nothing learns
            trainer.strategy.configure_ddp = lambda: None  # type: ignore[method-assign]


def announce(trainer: pl.Trainer, experts: TaskVectors, learned: Sequence[nn.Parameter], stream: object) -> None:
    """Say what is merged and what learns, and make a stream of ours one epoch; call when training starts."""
    frozen = f"{len(experts.tasks)} experts of {experts.layout.numel:,} parameters, all frozen"
    rank_zero_info(f"{frozen}; {sum(parameter.numel() for parameter in learned):,} parameters learn")
    if stream is not None and trainer.fit_loop.max_epochs == -1:
        trainer.fit_loop.max_epochs = trainer.current_epoch + 1  # without a limit its bars count to epoch -2


class _CloseBank(pl.Callback):
    """After an error a process merges alone again: it may have something to save."""

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.model.backbone.placement.close()


def closing(trainer: pl.Trainer) -> list[pl.Callback]:
    """A callback that closes the bank after an error; none where there is one, for Lightning tells what it replaces."""
    known: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [] if any(isinstance(one, _CloseBank) for one in known) else [_CloseBank()]
