"""What the processes of a run tell one another beside the gradients: a few numbers, on the CPU."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from adaptive_merge.engine.strategy import PATIENCE
from adaptive_merge.errors import AdaptiveMergeError
from adaptive_merge.upstream import timeout_of

__all__ = ["Ranks", "RunStopped"]


class RunStopped(AdaptiveMergeError, RuntimeError):
    """A guard ended the run: what it learned from here on would be wrong."""

    exit_code = 4


class Ranks:
    """A gloo group beside the strategy's own, so that flags on the CPU cost a GPU no synchronisation.

    Alone, or before `connect`, every answer is this process's own.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def connect(self, trainer: pl.Trainer) -> None:
        """Form the group; every process has to call it at the same place."""
        self._group = None
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            patience = timeout_of(trainer.strategy) or PATIENCE
            self._group = dist.new_group(backend="gloo", timeout=patience)

    def release(self) -> None:
        """Forget the group; it ends with the processes."""
        self._group = None

    def highest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self._group is None:
            return value
        shared = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return int(shared)

    def gather(self, values: Tensor) -> Tensor:
        """[W, …] from each process's CPU tensor of one common shape."""
        if self._group is None:
            return values[None].clone()
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, values.contiguous(), group=self._group)
        return torch.stack(parts)
