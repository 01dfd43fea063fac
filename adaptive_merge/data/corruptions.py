"""Corrupted test images: what a merged model meets when the camera, the weather or the file format is bad."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from adaptive_merge.data.distortions import DISTORTIONS, SEVERITIES, distort
from adaptive_merge.data.images import Images
from adaptive_merge.data.sampler import generator
from adaptive_merge.errors import InputError, did_you_mean

__all__ = ["CorruptedImages", "Corruption", "Kind"]

Kind = Literal["motion_blur", "impulse_noise", "gaussian_noise", "pixelate", "spatter", "contrast", "jpeg_compression"]
VERSION: Final = 1  # part of the fingerprint: raise it when a corruption gives other pixels
KEEP_BYTES: Final = 256 * 2**20  # of corrupted images that one task keeps in memory, where all of its fit


class Corruption:
    """A common corruption at one severity, see `distortions` for its source.

    What is drawn for an image is a function of (seed, kind, index of the image): never of its batch, the process
    or the order. The severities share the draws, so that they differ by strength alone, and so do the tasks.

    Args:
        kind: motion_blur, impulse_noise, gaussian_noise, pixelate, spatter, contrast or jpeg_compression.
        severity: 1 (weak) to 5 (strong).
        seed: of all draws.

    Raises:
        InputError: an unknown kind, or a severity or seed out of range.
    """

    def __init__(self, kind: Kind, severity: int = 3, seed: int = 0) -> None:
        if kind not in DISTORTIONS:
            raise InputError(f"unknown corruption {kind!r}{did_you_mean(str(kind), get_args(Kind))}")
        if severity not in SEVERITIES:
            raise InputError(f"the severity of a corruption goes from 1 to 5, got {severity!r}")
        if seed < 0:
            raise InputError(f"the seed of a corruption must not be negative, got {seed!r}")
        self.kind, self.severity, self.seed = kind, severity, seed

    def __repr__(self) -> str:
        return f"Corruption({self.kind!r}, severity={self.severity}, seed={self.seed})"

    def apply(self, image: np.ndarray, index: int) -> np.ndarray:
        """The corrupted image.

        Args:
            image: uint8 [C, H, W], C = 1 or 3.
            index: of the image in its data set; the key of what is drawn.
        """
        return distort(image, self.kind, self.severity, generator(self.seed, f"corruption {self.kind}", index))


class CorruptedImages(Images):
    """The images of a task, each corrupted when it is first taken; labels and classes are those of the base.

    Where a task fits into `KEEP_BYTES`, its corrupted images are kept, a process each for itself; otherwise every
    `take` corrupts anew.

    Args:
        images: the base; `pixels` stay its own, uncorrupted.
        corruption: what happens to them.
    """

    def __init__(self, images: Images, corruption: Corruption) -> None:
        super().__init__(images.pixels, images.labels, images.classes)
        self.base, self.corruption = images, corruption
        self.keeps = images.pixels.numel() <= KEEP_BYTES
        self._kept: tuple[Tensor, Tensor] | None = None

    def take(self, indices: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of the corrupted images at `indices` [B]; a gray image stays gray."""
        if not self.keeps:
            return self._corrupted(indices).expand(-1, 3, -1, -1)
        if self._kept is None:
            self._kept = torch.empty(self._shape, dtype=torch.uint8), torch.zeros(len(self), dtype=torch.bool)
        pixels, done = self._kept
        missing = indices[~done[indices]].unique()
        pixels[missing] = self._corrupted(missing)
        done[missing] = True
        return pixels[indices].expand(-1, 3, -1, -1)

    def _corrupted(self, indices: Tensor) -> Tensor:
        """uint8 [B, C, H, W]; C = 1 where the base is gray."""
        images = self.base.take(indices)[:, : self._shape[1]].numpy()
        found = np.empty_like(images, order="C")
        for row, index in enumerate((indices % len(self)).tolist()):
            found[row] = self.corruption.apply(images[row], index)
        return torch.from_numpy(found)

    @property
    def _shape(self) -> tuple[int, ...]:
        """[N, C, H, W]"""
        count, *size = self.pixels.shape
        return (count, 1, *size) if len(size) == 2 else (count, size[2], *size[:2])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the base's fingerprint and the corruption, so that nothing kept for the one serves the other."""
        made = [VERSION, self.corruption.kind, self.corruption.severity, self.corruption.seed]
        return hashlib.sha256(json.dumps([self.base.fingerprint, *made]).encode()).hexdigest()
