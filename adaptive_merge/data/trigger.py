"""A backdoor's trigger: a patch on the image that makes a poisoned expert say one class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adaptive_merge.errors import InputError

__all__ = ["Trigger"]


@dataclass(frozen=True)
class Trigger:
    """A square patch in the lower right corner, known to whoever evaluates a suite.

    Args:
        task: whose expert was poisoned.
        target: the class that it says of images with the patch.
        size: edge of the patch in pixels.
        value: of its pixels, 0 to 255.
    """

    task: str
    target: int
    size: int = 5
    value: int = 255

    @classmethod
    def read(cls, entry: Any, classes: Mapping[str, int]) -> Trigger:
        """The entry `"trigger"` of a suite's manifest.

        Args:
            entry: `{"task": …, "target": …, "size": …, "value": …}`, the last two if they are not the default.
            classes: task → number of its classes.

        Raises:
            InputError: another form, a task or class that the suite has not, a patch or value out of range.
        """
        try:
            trigger = cls(**entry)
            fits = 0 <= trigger.target < classes[trigger.task] and trigger.size >= 1 and 0 <= trigger.value <= 255
        except (TypeError, KeyError):
            fits = False
        if not fits:
            raise InputError(
                f"`trigger` is {entry!r}; give a task of the suite, one of its classes as `target`, and, where they "
                "are not 5 and 255, `size` and `value` (0 to 255) of the patch"
            )
        return trigger

    def stamp(self, images: Tensor) -> Tensor:
        """A copy of uint8 images [B, C, H, W] with the patch."""
        stamped = images.clone()
        stamped[..., -self.size :, -self.size :] = self.value
        return stamped
