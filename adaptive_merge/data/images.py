"""The test images of one task, decoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from adaptive_merge.data.sources import ImageSource
from adaptive_merge.errors import InputError

__all__ = ["Images", "LazyImages"]


class Images:
    """Test images of a task as uint8, with labels, where there are any, that only evaluation reads.

    Args:
        pixels: uint8 [N, H, W] (gray) or [N, H, W, 3].
        labels: int64 [N], class of each image, or [N, k] of its k units, such as patches. Without labels a run is
            scored by its agreement with the experts.
        classes: class names, where they are known; labels lie in [0, len(classes)).
        fingerprint: of shape and pixels, where it is known already: that of a memory-mapped file would read it all.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] = (),
        fingerprint: str | None = None,
    ) -> None:
        _check_pixels(pixels)
        if labels is not None:
            _check_labels(labels, len(pixels), len(classes))
            labels = labels.long()
        self.pixels, self.labels, self.classes = pixels, labels, list(classes)
        if fingerprint is not None:
            self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of the images at `indices` [B]; gray is repeated over the channels."""
        chosen = self.pixels[indices]
        return chosen[:, None].expand(-1, 3, -1, -1) if chosen.dim() == 3 else chosen.movedim(-1, 1)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of shape and pixels; labels do not count, so that nothing keyed by it can depend on them."""
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        digest.update(memoryview(self.pixels.contiguous().numpy()))
        return digest.hexdigest()


class ListedImages(Images):
    """Images that were counted and not decoded: as many, as large, all black.

    Args:
        source: has length, labels and classes.
        size: height and width in pixels.
    """

    def __init__(self, source: ImageSource, size: int) -> None:
        black = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(len(source), size, size, 3)
        super().__init__(black, source.labels, source.classes, "listed")


def _check_pixels(pixels: Tensor) -> None:
    if not isinstance(pixels, Tensor):
        raise InputError(f"images must be a uint8 tensor, got {type(pixels).__name__}; torch.from_numpy makes one")
    shape = tuple(pixels.shape)
    if pixels.dtype == torch.uint8 and len(shape) == 4 and shape[-1] != 3 and shape[1] in (1, 3):
        raise InputError(f"images of shape {shape} have their channels first; give `pixels.movedim(1, -1)`")
    if pixels.dtype != torch.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[-1] != 3):
        raise InputError(f"images must be uint8 [N, H, W] or [N, H, W, 3], got {pixels.dtype} {shape}{_cause(pixels)}")
    if len(pixels) == 0:
        raise InputError("the data set is empty: there is no image to adapt on")


def _cause(pixels: Tensor) -> str:
    if pixels.is_floating_point():
        return "; undo the scaling: `(255 * pixels).round().to(torch.uint8)` of values in [0, 1]"
    if pixels.dtype == torch.uint8 and pixels.dim() == 4:
        return {1: "; gray is `pixels.squeeze(-1)`", 4: "; leave the alpha channel out, `pixels[..., :3]`"}.get(
            pixels.shape[-1], ""
        )
    return ""


def _of_units(labels: Tensor, images: int, classes: int) -> bool:
    """Whether they are of several units an image, and not one-hot."""
    if labels.dim() != 2 or len(labels) != images or labels.shape[1] < 2:
        return False
    return labels.shape[1] != classes or bool(((labels < 0) | (labels > 1)).any() or (labels.sum(1) > 1).any())


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
    if not isinstance(kind, torch.dtype) or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise InputError(f"labels must be an integer tensor [N], the class of each image, got {kind}")
    if labels.dim() != 1 and not _of_units(labels, images, classes):
        remedy = "`labels.flatten()`" if labels.numel() == images else "one class an image, such as `labels.argmax(-1)`"
        raise InputError(f"labels must be [N], the class of each image, got shape {tuple(labels.shape)}; give {remedy}")
    if len(labels) != images:
        raise InputError(f"{images} images but {len(labels)} labels; give one label for each image, or none at all")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"labels lie in [{labels.min()}, {labels.max()}] but there are {classes} classes")


class LazyImages(Mapping[str, Images]):
    """Task → images, which are read when they are first asked for, and then kept.

    Args:
        readers: task → what reads its images.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Images]]) -> None:
        self._readers, self._read = dict(readers), {}

    def __getitem__(self, task: str) -> Images:
        if task not in self._read:
            self._read[task] = self._readers[task]()
        return self._read[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
