"""`History`: the coefficients, throughput and memory of a run over its steps, in one small file."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from adaptive_merge.callbacks.record.rate import Rate, count_images
from adaptive_merge.errors import InputError
from adaptive_merge.files import sparing
from adaptive_merge.runs.results import peak_memory
from adaptive_merge.sealed import load_sealed, save_sealed

__all__ = ["FILE", "History"]

FILE = "history.safetensors"
_log = logging.getLogger(__name__)


class History(pl.Callback):
    """Record Λ [T, G], images a second and peak memory every few steps; write `history.safetensors`.

    Samples stay on the device and come to the host when the file is written, with a checkpoint and at the end, so
    no step waits for the device. A resumed run goes on with the samples before the step that it resumes from.

    Args:
        folder: where to write; default: the trainer's log folder.
        every: steps between samples; default: so many that `limit` samples span the run.
        limit: most samples that are kept; beyond it, every second one goes and `every` doubles.
    """

    def __init__(self, folder: str | None = None, every: int | None = None, limit: int = 200) -> None:
        if (every is not None and every < 1) or limit < 2:
            raise InputError(f"`every` must be at least 1 and `limit` at least 2, got {every} and {limit}")
        self.folder, self.every, self.limit = folder, every, limit
        self.steps: list[int] = []
        self.coefficients: list[Tensor] = []
        self.throughput: list[float] = []
        self.memory: list[int] = []
        self._interval, self._rate = 1, Rate()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder; on all ranks, because Lightning broadcasts it."""
        if stage == "fit":
            self._path = Path(self.folder or trainer.log_dir or trainer.default_root_dir) / FILE

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the samples of the run that is resumed, or the values that all starts from."""
        self.steps, self.coefficients, self.throughput, self.memory = [], [], [], []
        self._interval = self.every or max(1, math.ceil(trainer.max_steps / (self.limit - 1)))
        if trainer.global_step:
            self._take_up(trainer.global_step, pl_module)
        self._rate = Rate()
        if not self.steps:
            self._sample(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample where a step is due."""
        self._rate.add(count_images(batch) * trainer.world_size)
        if trainer.global_step % self._interval == 0 and self.steps[-1:] != [trainer.global_step]:
            self._sample(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scoring is not adapting."""
        self._rate.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Back to adapting."""
        self._rate.resume()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """The file never lags behind the checkpoint that a run may resume from."""
        self._write(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record where the run ended."""
        if self.steps[-1:] != [trainer.global_step]:
            self._sample(trainer, pl_module)
        self._write(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run of no steps has a merge as well."""
        if not self.steps:
            self._sample(trainer, pl_module)
            self._write(pl_module)

    @torch.no_grad()
    def _sample(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.steps.append(trainer.global_step)
        shown = module.coefficients.display()
        # A rule with nothing to draw leaves [T, 0].
        self.coefficients.append(torch.empty(len(module.tasks), 0) if shown is None else shown.detach().clone())
        self.throughput.append(self._rate.read())
        self.memory.append(peak_memory())
        if len(self.steps) > self.limit:
            self._keep(range(0, len(self.steps), 2))
            self._interval *= 2

    def _keep(self, places: Any) -> None:
        for name in ("steps", "coefficients", "throughput", "memory"):
            values = getattr(self, name)
            setattr(self, name, [values[place] for place in places])

    @rank_zero_only
    def _write(self, module: pl.LightningModule) -> None:
        if not self.steps:
            return
        # One transfer for all samples since the last one.
        fresh = [place for place, value in enumerate(self.coefficients) if value.device.type != "cpu"]
        if fresh:
            moved = torch.stack([self.coefficients[place] for place in fresh]).cpu()
            for place, value in zip(fresh, moved):
                self.coefficients[place] = value
        tensors = {
            "steps": torch.tensor(self.steps),
            "coefficients": torch.stack(self.coefficients),
            "throughput": torch.tensor(self.throughput, dtype=torch.float32),
            "memory": torch.tensor(self.memory),
        }
        metadata = self._names(module) | {"every": self._interval}
        with sparing(self._path):
            save_sealed(self._path, tensors, {key: json.dumps(value) for key, value in metadata.items()})

    def _take_up(self, step: int, module: pl.LightningModule) -> None:
        """The samples up to `step` of a file for the same tasks and groups."""
        try:
            found, texts = load_sealed(self._path, old=True)
            metadata = {key: json.loads(value) for key, value in texts.items()}
            if any(metadata[key] != value for key, value in self._names(module).items()):
                raise ValueError("it belongs to other tasks or groups")
            self.steps, self.throughput = found["steps"].tolist(), found["throughput"].tolist()
            self.coefficients, self.memory = list(found["coefficients"]), found["memory"].tolist()
            self._interval = max(self._interval, int(metadata["every"])) if self.every is None else self.every
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError) as error:
            _log.warning("%s is not taken up: %s; the history starts at step %d", self._path, error, step)
            return
        self._keep([place for place, sampled in enumerate(self.steps) if sampled <= step])

    def _names(self, module: pl.LightningModule) -> dict[str, Any]:
        return {"tasks": list(module.tasks), "groups": list(module.coefficients.groups)}
