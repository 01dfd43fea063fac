"""What Lightning's strategies have to know of a run: how long processes wait, and what DDP may expect of a step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, Strategy

from adaptive_merge import upstream

__all__ = ["PATIENCE", "bound_waiting", "closing", "one_epoch", "suit_ddp"]

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


def one_epoch(trainer: pl.Trainer, stream: object) -> None:
    """A stream of ours is one epoch; call when training starts. Without a limit bars count to epoch -2."""
    if stream is not None and trainer.fit_loop.max_epochs == -1:
        trainer.fit_loop.max_epochs = trainer.current_epoch + 1


class _CloseBank(pl.Callback):
    """After an error a process merges alone again: it may have something to save."""

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.model.backbone.placement.close()


def closing(trainer: pl.Trainer) -> list[pl.Callback]:
    """A callback that closes the bank after an error; none where there is one, for Lightning tells what it replaces."""
    known: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [] if any(isinstance(one, _CloseBank) for one in known) else [_CloseBank()]
