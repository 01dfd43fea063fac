"""`FaultGuard`: a step with a loss or gradient that is not finite, on any process, is taken by none."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptive_merge.callbacks.safe.ranks import Ranks, RunStopped
from adaptive_merge.errors import InputError

__all__ = ["FaultGuard", "NotFinite"]

_log = logging.getLogger(__name__)


class NotFinite(RunStopped):
    """Losses or gradients were NaN or infinite in too many steps in a row."""


class FaultGuard(pl.Callback):
    """Look at loss and gradients before each optimiser step; where one is NaN or infinite, drop the gradients.

    An optimiser leaves a parameter without a gradient alone, its moments included, so the step counts and draws
    its images, but nothing changes. `train/skipped` is the number of such steps so far.

    Args:
        patience: steps in a row that may be dropped; one more ends the run.
    """

    def __init__(self, patience: int = 5) -> None:
        if patience < 0:
            raise InputError(f"the number of steps that may be dropped in a row cannot be {patience}")
        self.patience = patience
        self.skipped = self.in_a_row = 0
        self._ranks = Ranks()
        self._loss: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Form the group that agrees on each step."""
        self._ranks.connect(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        """No loss yet."""
        self._loss = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss; it is looked at once the device has done the whole step."""
        self._loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Agree over all processes whether the step is taken."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        looked_at = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._loss is not None:
            looked_at.append(self._loss)
        if not self._ranks.highest(int(not _all_finite(looked_at))):
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        for parameter in parameters:
            parameter.grad = None
        if trainer.is_global_zero:
            _log.warning("step %d: loss or gradient is not finite; nothing is changed", trainer.global_step)
        if self.in_a_row > self.patience:
            raise NotFinite(
                f"losses or gradients were NaN or infinite in {self.in_a_row} steps in a row, up to step "
                f"{trainer.global_step}; the run is stopped. Lower --model.lr, or go on from the last checkpoint"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log the count, on every step, so that all processes log the same keys."""
        self.log("train/skipped", float(self.skipped), batch_size=1)

    def state_dict(self) -> dict[str, int]:
        """The counts go on where they were."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Of a resumed run."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _all_finite(tensors: list[Tensor]) -> bool:
    """One look at the device for all of them; x − x is 0 where x is finite, and NaN elsewhere."""
    if not tensors:
        return True
    return bool(torch.stack([(tensor.float() - tensor.float()).sum() for tensor in tensors]).sum().isfinite())
