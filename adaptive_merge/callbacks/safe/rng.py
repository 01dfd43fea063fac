"""`RngState`: a resumed run draws the random numbers that the uninterrupted one would have drawn."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from adaptive_merge.callbacks.safe.ranks import Ranks

__all__ = ["RngState"]

_log = logging.getLogger(__name__)
_KEY = "rng"


class RngState(pl.Callback):
    """Keep the states of python's, numpy's, torch's and the device's generators of every process in checkpoints.

    They are plain tensors, so that `weights_only=True` reads them. A run that is resumed on another number of
    processes goes on with the states of its seed: the stream of images does not depend on them.
    Validation draws from the same generators and is kept apart, so that its schedule changes no training step.
    """

    def __init__(self) -> None:
        self._ranks = Ranks()
        self._waiting: Tensor | None = None
        self._after_step: _Generators | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Form the group that checkpoints gather over."""
        self._ranks.connect(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Restore as late as can be: setting up loaders draws random numbers, too."""
        if self._waiting is None:
            return
        saved, self._waiting = self._waiting, None
        if len(saved) != trainer.world_size:
            _log.info(
                "random numbers start from the seed: saved by %d processes, resumed by %d",
                len(saved),
                trainer.world_size,
            )
            return
        _Generators.of(_unpack(saved[trainer.global_rank], _Generators.now().tensors())).restore()

    def on_train_batch_end(self, *_: Any) -> None:
        """Remember where training is: what comes before validation's own hooks draws random numbers already."""
        self._after_step = _Generators.now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on where training was."""
        if self._after_step is not None:
            self._after_step.restore()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation that is no part of the training is not kept apart."""
        self._after_step = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the states [W, bytes] of all processes; every process saves, the first one writes."""
        checkpoint[_KEY] = self._ranks.gather(_pack(_Generators.now().tensors()))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the states until the first step."""
        self._waiting = checkpoint.get(_KEY)


@dataclass(frozen=True)
class _Generators:
    """The generators' states as their owners give them: cheap to take after every step."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> _Generators:
        on_device = torch.cuda.is_available() and torch.cuda.is_initialized()
        cuda = torch.cuda.get_rng_state() if on_device else None
        return cls(random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    def tensors(self) -> dict[str, Tensor]:
        """Generator → its state, in a fixed order; the dtypes keep a checkpoint small."""
        _, words, gauss = self.python
        _, keys, position, has_gauss, cached = self.numpy
        states = {
            "python": _words(words),
            "python gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
            "numpy": _words((*keys, position, has_gauss)),
            "numpy gauss": torch.tensor([cached], dtype=torch.float64),
            "torch": self.torch,
        }
        return states if self.cuda is None else states | {"cuda": self.cuda}

    @classmethod
    def of(cls, states: dict[str, Tensor]) -> _Generators:
        gauss = states["python gauss"].item()
        python = (3, tuple(_numbers(states["python"])), None if gauss != gauss else gauss)
        *keys, position, has_gauss = _numbers(states["numpy"])
        numpy = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy gauss"].item())
        return cls(python, numpy, states["torch"], states.get("cuda"))


def _words(numbers: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int32))


def _numbers(words: Tensor) -> list[int]:
    return words.numpy().view(np.uint32).tolist()


def _pack(states: dict[str, Tensor]) -> Tensor:
    return torch.cat([state.contiguous().view(torch.uint8) for state in states.values()])


def _unpack(packed: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """States shaped as those of now; a checkpoint of another kind of device gives those that both have."""
    states, start = {}, 0
    for name, state in like.items():
        stop = start + state.numel() * state.element_size()
        if stop <= len(packed):
            states[name] = packed[start:stop].clone().view(state.dtype)
        start = stop
    return states
