"""`RankAgreement`: all processes hold the same learned values, bit for bit, or the run ends."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from adaptive_merge.callbacks.safe.ranks import Ranks, RunStopped
from adaptive_merge.errors import InputError

__all__ = ["RankAgreement", "RanksDisagree", "checksum"]


class RanksDisagree(RunStopped):
    """The processes of a run have learned different values, or merge different experts."""


class RankAgreement(pl.Callback):
    """Compare checksums of everything that learns: at the start, every few steps, and at the end.

    DDP averages gradients but never looks at the parameters again, so a difference, once there, stays and grows
    without a sound. The comparison sends eight bytes per parameter tensor.

    Args:
        every: steps between comparisons.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise InputError(f"processes are compared every {every} steps; give at least 1")
        self.every = every
        self._ranks = Ranks()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same experts, tasks and start values everywhere."""
        self._ranks.connect(trainer)
        if trainer.world_size > 1:
            belongs_to: dict[str, Any] = {}
            pl_module.on_save_checkpoint(belongs_to)
            self._compare({"recipe, tasks and task vectors": _digest(belongs_to)}, trainer)
            self._compare(_checksums(pl_module), trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Compare at every `every`-th step."""
        if trainer.world_size > 1 and trainer.global_step % self.every == 0:
            self._compare(_checksums(pl_module), trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare what is kept."""
        if trainer.world_size > 1:
            self._compare(_checksums(pl_module), trainer)

    def _compare(self, sums: dict[str, Tensor], trainer: pl.Trainer) -> None:
        if not sums:
            return
        told = self._ranks.gather(torch.stack(list(sums.values())).cpu())
        apart = told != told[0]
        if apart.any():
            ranks = apart.any(1).nonzero().flatten().tolist()
            names = [name for name, differs in zip(sums, apart.any(0).tolist()) if differs]
            raise RanksDisagree(
                f"after step {trainer.global_step} process {', '.join(map(str, ranks))} differs from process 0 in "
                f"{', '.join(map(repr, names[:5]))}{' and more' if len(names) > 5 else ''}; the run is stopped. "
                "Go on from the last checkpoint; if it happens again, test the memory of that machine"
            )


def checksum(tensor: Tensor) -> Tensor:
    """An int64 that any changed bit changes: bytes weighted by odd numbers, summed modulo 2^64, on the device."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).long()
    weights = torch.arange(1, 2 * len(data), 2, device=data.device)
    # Squared, so that bytes that trade places in equal distances do not cancel.
    return ((data + 1) * weights * weights).sum()


def _checksums(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: checksum(value) for name, value in module.named_parameters()}


def _digest(content: dict[str, Any]) -> Tensor:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return torch.tensor(int.from_bytes(digest[:8], "little", signed=True))
