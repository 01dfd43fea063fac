"""`Diagnostics`: what the scoring passes saw anyway, kept for the report's figures of features and calibration."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from adaptive_merge.callbacks.record.contributions import contributions, layers_of
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.errors import InputError
from adaptive_merge.files import sparing
from adaptive_merge.runs.interference import alignment, cosines, mask_statistics, sign_conflicts
from adaptive_merge.sealed import save_sealed

__all__ = ["FILE", "Diagnostics"]

FILE = "diagnostics.safetensors"
_log = logging.getLogger(__name__)
_LAST = "adapted"
_SMALL = 20_000_000  # parameters; without a GPU, T² scorings or a decomposition of larger backbones take minutes


class Diagnostics(pl.Callback):
    """Keep confidence, correctness and some features of each view while `trainer.validate` scores it.

    No image is run twice: `validation_step` has to return `{"features", "logits"}`. After the view "adapted" of a
    scoring, `diagnostics.safetensors` holds, i being the place of a task in the metadata's `tasks`:

    - `confidence.<view>.<i>`, `correct.<view>.<i>`, `label.<view>.<i>` [n], the last two where there are labels;
    - `features.<view>.<i>` [m, d] of m images drawn from all by the stream's seed, at the places `sample.<i>` [m] of
      `label.adapted.<i>`; without a `TaskStream` of the first m;
    - `distance.<view>` [T]: mean |feature − expert's feature| on those m images;
    - `cosine` [T, T] between task vectors, and `cross` [T, T]: accuracy of expert i (row) on task j (column), of
      `crossed` [T] images of each;
    - of the experts' task vectors, see `runs.interference`: `sign_conflicts` [2, G], by parameter of the metadata's
      `parameters`; `masks.density` [T], `masks.jaccard` [T, T] and `masks.kept_by` [T + 1] of their TALL-masks;
      `alignment.<view>` [T] of merges, the subspace alignment ratio;
    - `contribution` [L, T], where it was asked for: the agreement with task j's expert that is lost when layer i of the
      metadata's `layers` goes back to θ₀.

    With several processes the file holds the share of the first.

    Args:
        folder: where to write; default: the trainer's log folder.
        images: images of a task whose features are kept; the experts of other tasks see a quarter of them.
        cross: whether to run every expert on every task. `"auto"`: on a GPU, or for backbones below 20 M parameters.
        interference: whether to look at signs, masks and subspaces of the task vectors; `"auto"` as for `cross`.
        contributions: images of a task, at most `images`, on which to try each layer's share of the merge; 0: not at
            all. It costs a forward of each of them for every layer (block, or what lies outside the blocks) and task,
            and needs no label.
    """

    def __init__(
        self,
        folder: str | None = None,
        images: int = 200,
        cross: bool | Literal["auto"] = "auto",
        interference: bool | Literal["auto"] = "auto",
        contributions: int = 0,
    ) -> None:
        if images < 1:
            raise InputError(f"`images` must be at least 1, got {images}")
        if not 0 <= contributions <= images:
            raise InputError(f"`contributions` must be from 0 to `images`, {images}, got {contributions}")
        self.folder, self.images, self.cross = folder, images, cross
        self.interference, self.contributions = interference, contributions
        self._alignment: dict[str, Tensor] = {}
        self._merged: Mapping[str, Tensor] = {}
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
        self._keep_merge(trainer, pl_module, batch["task"])
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
        for kept in (self._kept, self._sample, self._alignment, self._chosen, self._seen):
            kept.clear()
        self._merged = {}

    def _watching(self, trainer: pl.Trainer) -> bool:
        """Only the scoring after the adaptation, by `trainer.validate`; not validation within `fit`."""
        return trainer.state.fn == "validate"

    def _keep_merge(self, trainer: pl.Trainer, module: pl.LightningModule, task: str) -> None:
        """Look at the merge while the view holds it: to merge a sharded bank anew, all processes would have to meet."""
        view = module.view
        if view not in ("anchor", "initial", _LAST) or not trainer.is_global_zero:
            return
        if view not in self._alignment and self._affords(self.interference, module):
            self._alignment[view] = alignment(module.experts, module.views.weights(view, task))
        if view == _LAST and self.contributions:
            self._merged = module.views.weights(view, task)

    @rank_zero_only
    @torch.no_grad()
    def _write(self, module: pl.LightningModule) -> None:
        arrays = {name: torch.cat(parts).cpu() for name, parts in self._kept.items()}
        arrays |= self._distances(arrays, len(module.scored_tasks))
        arrays["cosine"] = cosines(module.experts.vectors)
        names = {"tasks": list(module.scored_tasks)}
        if self._affords(self.cross, module) and any(name.startswith("label.") for name in arrays):
            arrays["cross"], arrays["crossed"] = self._cross(module, arrays)
        if self._affords(self.interference, module):
            masks = mask_statistics(module.experts)
            arrays |= {f"masks.{name}": value for name, value in vars(masks).items()}
            arrays |= {f"alignment.{view}": value for view, value in self._alignment.items()}
            arrays["sign_conflicts"], names["parameters"] = sign_conflicts(module.experts), list(module.experts.names)
        if self._merged:
            arrays["contribution"], names["layers"] = (
                self._contributions(module),
                list(layers_of(module.experts.layout)),
            )
        arrays = {name: value.cpu() for name, value in arrays.items()}
        with sparing(self._path):
            save_sealed(self._path, arrays, {key: json.dumps(value) for key, value in names.items()})

    def _distances(self, arrays: dict[str, Tensor], tasks: int) -> dict[str, Tensor]:
        found = {}
        for view in ("pretrained", "initial", "adapted"):
            pairs = [(arrays.get(f"features.{view}.{i}"), arrays.get(f"features.individual.{i}")) for i in range(tasks)]
            if all(a is not None and b is not None and a.shape == b.shape for a, b in pairs):
                found[f"distance.{view}"] = torch.stack([(a.float() - b.float()).abs().mean() for a, b in pairs])
        return found

    def _affords(self, chosen: bool | Literal["auto"], module: pl.LightningModule) -> bool:
        if chosen == "auto":
            return module.device.type == "cuda" or module.experts.pretrained.numel() < _SMALL
        return chosen

    def _contributions(self, module: pl.LightningModule) -> Tensor:
        images = {task: torch.cat(parts)[: self.contributions] for task, parts in self._sample.items()}
        number = (len(layers_of(module.experts.layout)) + 2) * sum(map(len, images.values()))
        _log.info("contributions of the layers: %d forward passes of an image", number)
        return contributions(module, self._merged, images)

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
