"""`Diagnostics`: what the scoring passes saw anyway, kept for the report's figures of features and calibration."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.errors import InputError
from adaptive_merge.files import save_tensors

__all__ = ["FILE", "Diagnostics"]

FILE = "diagnostics.safetensors"
_LAST = "adapted"
_CROSS_PARAMETERS = 20_000_000  # without a GPU, T² scorings of larger backbones take minutes
_PIECE = 1 << 22


class Diagnostics(pl.Callback):
    """Keep confidence, correctness and some features of each view while `trainer.validate` scores it.

    No image is run twice: `validation_step` has to return `{"features", "logits"}`. After the view "adapted" of a
    scoring, `diagnostics.safetensors` holds, i being the place of a task in the metadata's `tasks`:

    - `confidence.<view>.<i>`, `correct.<view>.<i>`, `label.<view>.<i>` [n], the last two where there are labels;
    - `features.<view>.<i>` [m, d] of m images drawn from all by the stream's seed, at the places `sample.<i>` [m] of
      `label.adapted.<i>`; without a `TaskStream` of the first m;
    - `distance.<view>` [T]: mean |feature − expert's feature| on those m images;
    - `cosine` [T, T] between task vectors, and `cross` [T, T]: accuracy of expert i (row) on task j (column), of
      `crossed` [T] images of each.

    With several processes the file holds the share of the first.

    Args:
        folder: where to write; default: the trainer's log folder.
        images: images of a task whose features are kept; the experts of other tasks see a quarter of them.
        cross: whether to run every expert on every task. `"auto"`: on a GPU, or for backbones below 20 M parameters.
    """

    def __init__(self, folder: str | None = None, images: int = 200, cross: bool | Literal["auto"] = "auto") -> None:
        if images < 1:
            raise InputError(f"`images` must be at least 1, got {images}")
        self.folder, self.images, self.cross = folder, images, cross
        self._kept: dict[str, list[Tensor]] = defaultdict(list)
        self._sample: dict[str, list[Tensor]] = defaultdict(list)
        self._chosen: dict[str, Tensor] = {}
        self._seen: dict[int, int] = defaultdict(int)  # images of a task so far

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
        if "label" in batch:
            self._kept[f"correct.{view}.{place}"].append((predicted == batch["label"]).to(torch.uint8))
            self._kept[f"label.{view}.{place}"].append(batch["label"])
        kept = self._places(trainer, pl_module, batch, f"features.{view}.{place}")
        if len(kept):
            self._kept[f"features.{view}.{place}"].append(outputs["features"].detach()[kept].half())
            if view == _LAST:
                self._kept[f"sample.{place}"].append(self._seen[place] + kept)
                self._sample[batch["task"]].append(batch["image"][kept])
        self._seen[place] += len(batch["image"]) if view == _LAST else 0

    def _places(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, name: str) -> Tensor:
        """Which images of a batch are among those whose features are kept, int64."""
        task, stream = batch["task"], trainer.datamodule
        if not isinstance(stream, TaskStream):
            room = self.images - sum(map(len, self._kept[name]))
            return torch.arange(max(0, min(room, len(batch["image"]))))
        if task not in self._chosen:
            scored = stream.scored[task][trainer.global_rank :: trainer.world_size]
            seed = int.from_bytes(hashlib.sha256(f"{stream.seed} {task}".encode()).digest()[:7], "little")
            order = torch.randperm(len(scored), generator=torch.Generator().manual_seed(seed))
            self._chosen[task] = torch.zeros(len(stream.images[task]), dtype=torch.bool)
            self._chosen[task][scored[order[: self.images]]] = True
        return self._chosen[task][batch["index"].cpu()].nonzero().flatten()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write after the last view."""
        if not self._watching(trainer) or pl_module.view != _LAST or not self._kept:
            return
        self._write(pl_module)
        self._kept.clear()
        self._sample.clear()
        self._chosen.clear()
        self._seen.clear()

    def _watching(self, trainer: pl.Trainer) -> bool:
        """Only the scoring after the adaptation, by `trainer.validate`; not validation within `fit`."""
        return trainer.state.fn == "validate"

    @rank_zero_only
    @torch.no_grad()
    def _write(self, module: pl.LightningModule) -> None:
        arrays = {name: torch.cat(parts).cpu() for name, parts in self._kept.items()}
        arrays |= self._distances(arrays, len(module.scored_tasks))
        arrays["cosine"] = _cosines(module.experts.vectors).cpu()
        if self._crosses(module) and any(name.startswith("label.") for name in arrays):
            arrays["cross"], arrays["crossed"] = self._cross(module, arrays)
        save_tensors(self._path, arrays, {"tasks": json.dumps(list(module.scored_tasks))})

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

    def _cross(self, module: pl.LightningModule, arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[T, T] accuracy of each expert with the head of each task, on a quarter of the kept images; and how many."""
        tasks = module.scored_tasks
        result = torch.full((len(tasks), len(tasks)), float("nan"))
        most, seen = max(1, self.images // 4), {}
        for column, task in enumerate(tasks):
            if task in self._sample and f"label.{_LAST}.{column}" in arrays:
                images = torch.cat(self._sample[task])
                # Spread over all that are kept: their order is the data set's, which may be that of the classes.
                spread = torch.linspace(0, len(images) - 1, min(most, len(images))).round().long()
                seen[column] = images[spread], self._labels(arrays, column)[spread]
        for row, expert in enumerate(tasks):
            weights = module.views.weights("individual", expert)
            for column, (images, labels) in seen.items():
                predicted = module.model(tasks[column], images, weights, adapted=False).logits.argmax(-1).cpu()
                result[row, column] = (predicted == labels).float().mean()
        return result, torch.tensor([len(seen[column][1]) if column in seen else 0 for column in range(len(tasks))])

    def _labels(self, arrays: dict[str, Tensor], column: int) -> Tensor:
        return arrays[f"label.{_LAST}.{column}"][arrays[f"sample.{column}"]]


def _cosines(vectors: Tensor) -> Tensor:
    """[T, T] cosines of the rows of a bank [T, P], read in pieces."""
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for piece in vectors.split(_PIECE, dim=1):
        gram += (piece.float() @ piece.float().T).double()
    norms = gram.diagonal().sqrt().clamp_min(1e-30)
    return (gram / norms[:, None] / norms).float()
