"""`Ledger`: which images a run has really adapted on and been scored on, and what was said before adapting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from adaptive_merge.callbacks.safe.ranks import Ranks
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.files import sparing
from adaptive_merge.sealed import save_sealed

__all__ = ["FILE", "Ledger"]

FILE = "images.safetensors"
_KEY = "ledger"
_UNKNOWN = -1


class Ledger(pl.Callback):
    """Keep a row per image for each task; write `images.safetensors` when the adapted model has been scored.

    For the task at place i of the metadata's `tasks` the file holds, over all N images of the task:

    - `adapted.<i>`, `scored.<i>` uint8 [N]: 1 where the image was in a training step, or was scored;
    - `first.<i>` int32 [N]: the class that the training step predicted before it learned from the image, −1 where
      there was none; kept where the protocol is a single pass;
    - `final.<i>` int32 [N]: the class that the adapted model predicts, −1 where it was not scored.

    It needs a `TaskStream`, and keeps nothing without. The rows stay on the device until they are asked
    for, so no step waits for it, and they travel with checkpoints.

    Args:
        folder: where to write; default: the trainer's log folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._ranks = Ranks()
        self._rows: dict[str, Tensor] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Size the rows, and form the group that processes' parts are gathered over; find the folder on all ranks,
        because Lightning broadcasts it.
        """
        if stage == "fit":
            self._ranks.connect(trainer)  # here, for a run that takes no step is scored as well
            self._path = Path(self.folder or trainer.log_dir or trainer.default_root_dir) / FILE
            images = trainer.datamodule.images if isinstance(trainer.datamodule, TaskStream) else {}
            # [4, N]: adapted, scored, first, final; a larger value is always the newer knowledge of several processes.
            self._rows = {task: _empty(len(source)) for task, source in images.items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the images of a start, and what the merge before it predicted."""
        if pl_module.begun is None:
            return
        for task in pl_module.tasks:
            self._rows[task][0, trainer.datamodule.opening(task)] = 1
        for task, (index, classes) in pl_module.begun.first.items():
            _note(self._rows[task][2], index, classes)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """To the device."""
        self._rows = {task: rows.to(pl_module.device) for task, rows in self._rows.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the images of this step, and what was said about them before it."""
        for task, rows in self._rows.items():
            if task in batch:
                index = batch[task]["index"]
                rows[0, index] = 1
                if _single_pass(trainer):
                    unknown = rows[2, index] == _UNKNOWN  # a start's images have been predicted before
                    predicted = pl_module.model.heads[task].predict(pl_module.step_logits[task])
                    _note(rows[2], index[unknown], predicted[unknown] if len(predicted) == len(index) else predicted)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the images that the adapted model is scored on after the run."""
        if self._scoring(trainer, pl_module) and batch["task"] in self._rows:
            rows, index = self._rows[batch["task"]].to(pl_module.device), batch["index"]
            rows[1, index] = 1
            _note(rows[3], index, pl_module.model.heads[batch["task"]].predict(outputs["logits"]))
            self._rows[batch["task"]] = rows

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what all processes know."""
        if self._scoring(trainer, pl_module) and self._rows:
            self._rows = self._gathered()
            self._write()

    def read(self) -> dict[str, dict[str, Tensor]]:
        """Task → the rows of the file, as of the last scoring."""
        names = ("adapted", "scored", "first", "final")
        return {task: dict(zip(names, rows.cpu())) for task, rows in self._rows.items()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A resumed run knows what the first part of it has adapted on; every process saves, the first one writes."""
        checkpoint[_KEY] = {
            task: {"adapted": _packed(rows[0])} | ({"first": rows[2]} if _single_pass(trainer) else {})
            for task, rows in self._gathered().items()
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the rows of the first part."""
        for task, kept in checkpoint.get(_KEY, {}).items():
            if task in self._rows:
                rows = self._rows[task]
                rows[0] = _unpacked(kept["adapted"], rows.shape[1])
                rows[2] = kept.get("first", rows[2])

    def _scoring(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        return trainer.state.fn == "validate" and module.view == "adapted"

    def _gathered(self) -> dict[str, Tensor]:
        return {task: self._ranks.gather(rows.cpu()).amax(0) for task, rows in self._rows.items()}

    @rank_zero_only
    def _write(self) -> None:
        found = self.read()
        tensors = {}
        for place, rows in enumerate(found.values()):
            tensors |= {f"{name}.{place}": row.to(_DTYPES[name]) for name, row in rows.items()}
        with sparing(self._path):
            save_sealed(self._path, tensors, {"tasks": json.dumps(list(found))})


_DTYPES = {"adapted": torch.uint8, "scored": torch.uint8, "first": torch.int32, "final": torch.int32}


def _note(row: Tensor, index: Tensor, predicted: Tensor) -> None:
    if len(predicted) == len(index):  # a head of tokens or pixels gives an image more than one class
        row[index] = predicted.int()


def _empty(images: int) -> Tensor:
    rows = torch.full((4, images), _UNKNOWN, dtype=torch.int32)
    rows[:2] = 0
    return rows


def _single_pass(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.datamodule, TaskStream) and trainer.datamodule.protocol.one_pass


def _packed(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy() > 0))


def _unpacked(packed: Tensor, count: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count)).int()
