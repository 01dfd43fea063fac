"""How many images a second an adaptation takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Rate", "count_images"]


class Rate:
    """Images per second between two looks; time spent paused (validation) does not count.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._images, self._paused = 0, 0.0
        self._since, self._pause_began = clock(), None

    def add(self, images: int) -> None:
        """Count the images of a step."""
        self._images += images

    def pause(self) -> None:
        """Validation begins."""
        self._pause_began = self._clock()

    def resume(self) -> None:
        """Validation ends."""
        if self._pause_began is not None:
            self._paused += self._clock() - self._pause_began
            self._pause_began = None

    def read(self) -> float:
        """Images a second since the last read; NaN where no image came."""
        now = self._clock()
        seconds, images = now - self._since - self._paused, self._images
        self._since, self._images, self._paused = now, 0, 0.0
        return images / seconds if images and seconds > 0 else float("nan")


def count_images(batch: Any) -> int:
    """Images in a training batch, task → {"image", …}; 0 for batches of another form."""
    if not isinstance(batch, Mapping):
        return 0
    return sum(len(part["image"]) for part in batch.values() if isinstance(part, Mapping) and "image" in part)
