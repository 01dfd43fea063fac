"""What a training batch has to be, also where it comes from a loader of the user's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from adaptive_merge.errors import InputError, did_you_mean

__all__ = ["check_batch"]

_FORM = 'a step takes {task: {"image": tensor [B, ...]}}, with the tasks of the merge'


def check_batch(batch: Any, tasks: Collection[str], idle: bool = False) -> None:
    """Refuse what is no batch, in one sentence.

    Args:
        batch: task → {"image": [B, …]}; "index" int64 [B] of the images and "weight", a number, where a stream of ours
            gives them. Labels and all else are not looked at.
        tasks: of the merge; a step may leave some out.
        idle: whether a process may have no part in a step.

    Raises:
        InputError: naming what was found.
    """
    if not isinstance(batch, Mapping):
        raise InputError(f"{_FORM}; the loader gave a {type(batch).__name__}")
    if not batch and not idle:
        raise InputError(f"{_FORM}; the loader gave an empty one")
    for task, part in batch.items():
        if task not in tasks:
            raise InputError(f"{_FORM}; there is no task {task!r}{did_you_mean(str(task), tasks)}")
        image = part.get("image") if isinstance(part, Mapping) else None
        if not isinstance(image, Tensor):
            content = sorted(map(str, part)) if isinstance(part, Mapping) else f"a {type(part).__name__}"
            raise InputError(f"{_FORM}; that of task {task!r} is {content}")
        _check_image(task, image, part.get("index"))


def _check_image(task: str, image: Tensor, index: Any) -> None:
    if image.dim() < 2:
        raise InputError(f"{_FORM}; the images of task {task!r} have shape {tuple(image.shape)}: add the batch's axis")
    if image.dim() == 4 and image.shape[1] not in (1, 3) and image.shape[-1] in (1, 3):
        raise InputError(
            f"the images of task {task!r} have shape {tuple(image.shape)}: the channels come first, [B, 3, H, W]"
        )
    if isinstance(index, Tensor) and len(index) != len(image):
        raise InputError(f"task {task!r}: {len(image)} images with {len(index)} indices; give one index for each image")
