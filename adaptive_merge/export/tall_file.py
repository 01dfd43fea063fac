"""Experts as one vector and a bit mask for each.

TALL-masks (Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024).

Expert t is rebuilt as θ₀ + mₜ ⊙ τ_MT with mₜ = |τₜ| > λₜ |τ_MT − τₜ|, entry by entry: T experts for two models and T
bits an entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.sealed import load_sealed, save_sealed
from adaptive_merge.transforms.consensus import tall_masks

__all__ = ["FILE", "TallMasks", "load_tall", "packed_mask"]

FILE: Final = "tall.safetensors"
FORMAT: Final = "adaptive_merge.tall"
VERSION: Final = 1
_BUFFER: Final = "buffer."


class TallMasks:
    """Experts that are rebuilt from one vector.

    Args:
        layout: names and shapes of the parameters, P entries.
        pretrained: θ₀ [P], float32.
        merged: τ_MT [P], float32.
        masks: task → mₜ, uint8 [⌈P/8⌉]: eight entries a byte, the first in the highest bit, as `numpy.packbits` does.
        thresholds: task → λₜ.
        buffers: what the backbone carries besides parameters.
    """

    def __init__(
        self,
        layout: Layout,
        pretrained: Tensor,
        merged: Tensor,
        masks: Mapping[str, Tensor],
        thresholds: Mapping[str, float],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self.layout, self.pretrained, self.merged = layout, pretrained, merged
        self.masks, self.thresholds, self.buffers = dict(masks), dict(thresholds), dict(buffers)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(self.masks)

    def mask(self, task: str) -> Tensor:
        """mₜ, bool [P]."""
        if task not in self.masks:
            raise InputError(f"there is no task {task!r} in these masks{did_you_mean(task, self.masks)}")
        bits = np.unpackbits(self.masks[task].numpy(), count=self.layout.numel)
        return torch.from_numpy(bits).bool()

    def expert(self, task: str) -> dict[str, Tensor]:
        """The state dict θ₀ + mₜ ⊙ τ_MT of an expert as it is rebuilt."""
        rebuilt = self.pretrained + torch.where(self.mask(task), self.merged, 0.0)
        return self.layout.unflatten(rebuilt) | self.buffers

    def save(self, path: str | Path) -> None:
        """Write one sealed safetensors file."""
        header = {"format": FORMAT, "version": VERSION, "thresholds": self.thresholds}
        header |= {"names": self.layout.names, "shapes": self.layout.shapes}
        tensors = {"pretrained": self.pretrained, "merged": self.merged}
        tensors |= {_mask_name(row): mask for row, mask in enumerate(self.masks.values())}
        tensors |= {_BUFFER + name: buffer for name, buffer in self.buffers.items()}
        save_sealed(path, tensors, {FORMAT: json.dumps(header)})


def load_tall(path: str | Path) -> TallMasks:
    """What `export --format tall` wrote; `expert(task)` of it gives each expert back.

    Args:
        path: the folder, or the file in it.

    Raises:
        MissingFileError: no such file.
        InputError: changed since it was written, or not such a file.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    tensors, metadata = load_sealed(path)
    if FORMAT not in metadata:
        raise InputError(f"`{path}`: sealed by this program, but holds no masks; expected one of export --format tall")
    header = json.loads(metadata[FORMAT])
    if header.get("version") != VERSION:
        raise InputError(
            f"`{path}`: expected version {VERSION} of the file, found {header.get('version')!r}; read it with the "
            "version of the program that wrote it"
        )
    layout = Layout(tuple(header["names"]), tuple(tuple(shape) for shape in header["shapes"]))
    masks = {task: tensors[_mask_name(row)] for row, task in enumerate(header["thresholds"])}
    buffers = {name[len(_BUFFER) :]: value for name, value in tensors.items() if name.startswith(_BUFFER)}
    return TallMasks(layout, tensors["pretrained"], tensors["merged"], masks, header["thresholds"], buffers)


def packed_mask(bank: TaskVectors, task: str, merged: Tensor, threshold: float) -> Tensor:
    """mₜ of an expert in a bank, packed as `TallMasks` keeps it."""
    row, kept = bank.vectors[bank.tasks.index(task)], torch.empty(bank.layout.numel, dtype=torch.bool)
    for part in bank.layout.slices:  # in float64 as in `Consensus`, a tensor at a time
        kept[part] = tall_masks(row[part].double()[None], merged[part].double(), threshold)[0]
    return torch.from_numpy(np.packbits(kept.numpy()))


def _mask_name(row: int) -> str:
    """Of a tensor in the file: task names may hold what safetensors does not take."""
    return f"mask.{row}"
