"""`Diagnostics`: what the scoring passes saw anyway, kept for the report's figures of features and calibration."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.files import sparing
from adaptive_merge.sealed import save_sealed

__all__ = ["FILE", "Diagnostics"]

FILE = "diagnostics.safetensors"
_LAST = "adapted"
_CROSS_PARAMETERS = 20_000_000  # without a GPU, T² scorings of larger backbones take minutes
_PIECE = 1 << 22


class Diagnostics(pl.Callback):
    """Keep confidence, correctness and some features of each view while `trainer.validate` scores it.

    No image is run twice: `validation_step` has to return `{"features", "logits"}`. After the view "adapted" of a
    scoring, `diagnostics.safetensors` holds, i being the place of a task in the metadata's `tasks`:

    - `confidence.<view>.<i>`, `correct.<view>.<i>`, `label.<view>.<i>` [n];
    - `features.<view>.<i>` [m, d] of the first m images;
    - `distance.<view>` [T]: mean |feature − expert's feature| on those m images;
    - `cosine` [T, T] between task vectors, and `cross` [T, T]: accuracy of expert i (row) on task j (column).

    With several processes the file holds the share of the first.

    Args:
        folder: where to write; default: the trainer's log folder.
        images: images of a task whose features are kept; the experts of other tasks see the first quarter.
        cross: whether to run every expert on every task. `"auto"`: on a GPU, or for backbones below 20 M parameters.
    """

    def __init__(self, folder: str | None = None, images: int = 200, cross: bool | Literal["auto"] = "auto") -> None:
        if images < 1:
            raise InputError(f"`images` must be at least 1, got {images}")
        self.folder, self.images, self.cross = folder, images, cross
        self._kept: dict[str, list[Tensor]] = defaultdict(list)
        self._sample: dict[str, list[Tensor]] = defaultdict(list)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the folder; on all ranks, because Lightning broadcasts it."""
        if stage == "fit" or not hasattr(self, "_path"):
            self._path = Path(self.folder or trainer.log_dir or trainer.default_root_dir) / FILE

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the report draws of this batch."""
        if not self._watching(trainer) or not isinstance(outputs, dict) or "logits" not in outputs:
            return
        place, view = pl_module.scored_tasks.index(batch["task"]), pl_module.view
        confidence, predicted = outputs["logits"].detach().float().softmax(-1).max(-1)
        self._kept[f"confidence.{view}.{place}"].append(confidence)
        self._kept[f"correct.{view}.{place}"].append((predicted == batch["label"]).to(torch.uint8))
        self._kept[f"label.{view}.{place}"].append(batch["label"])
        room = self.images - sum(map(len, self._kept[f"features.{view}.{place}"]))
        if room > 0:
            self._kept[f"features.{view}.{place}"].append(outputs["features"].detach()[:room].half())
            if view == _LAST:
                self._sample[batch["task"]].append(batch["image"][:room])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write after the last view."""
        if not self._watching(trainer) or pl_module.view != _LAST or not self._kept:
            return
        self._write(pl_module)
        self._kept.clear()
        self._sample.clear()

    def _watching(self, trainer: pl.Trainer) -> bool:
        """Only the scoring after the adaptation, by `trainer.validate`; not validation within `fit`."""
        return trainer.state.fn == "validate"

    @rank_zero_only
    @torch.no_grad()
    def _write(self, module: pl.LightningModule) -> None:
        arrays = {name: torch.cat(parts).cpu() for name, parts in self._kept.items()}
        arrays |= self._distances(arrays, len(module.scored_tasks))
        arrays["cosine"] = _cosines(module.experts.vectors).cpu()
        if self._crosses(module):
            arrays["cross"] = self._cross(module)
        with sparing(self._path):
            save_sealed(self._path, arrays, {"tasks": json.dumps(list(module.scored_tasks))})

    def _distances(self, arrays: dict[str, Tensor], tasks: int) -> dict[str, Tensor]:
        found = {}
        for view in ("pretrained", "initial", "adapted"):
            pairs = [(arrays.get(f"features.{view}.{i}"), arrays.get(f"features.individual.{i}")) for i in range(tasks)]
            if all(a is not None and b is not None and a.shape == b.shape for a, b in pairs):
                found[f"distance.{view}"] = torch.stack([(a.float() - b.float()).abs().mean() for a, b in pairs])
        return found

    def _crosses(self, module: pl.LightningModule) -> bool:
        if self.cross == "auto":
            return module.device.type == "cuda" or module.experts.pretrained.numel() < _CROSS_PARAMETERS
        return self.cross

    def _cross(self, module: pl.LightningModule) -> Tensor:
        """[T, T] accuracy of each expert with the head of each task, on the kept images."""
        tasks = module.scored_tasks
        result = torch.full((len(tasks), len(tasks)), float("nan"))
        for row, expert in enumerate(tasks):
            known = module.experts.expert(expert)
            weights = {name: known[name].to(module.device) for name in module.experts.names}
            for column, task in enumerate(tasks):
                labels = self._kept[f"label.{_LAST}.{column}"]
                if task in self._sample:
                    images = torch.cat(self._sample[task])[: max(1, self.images // 4)]
                    predicted = module.model(task, images, weights, adapted=False).logits.argmax(-1)
                    result[row, column] = (predicted == torch.cat(labels)[: len(images)]).float().mean()
        return result


def _cosines(vectors: Tensor) -> Tensor:
    """[T, T] cosines of the rows of a bank [T, P], read in pieces."""
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for piece in vectors.split(_PIECE, dim=1):
        gram += (piece.float() @ piece.float().T).double()
    norms = gram.diagonal().sqrt().clamp_min(1e-30)
    return (gram / norms[:, None] / norms).float()
