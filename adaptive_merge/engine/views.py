"""The models that a run is compared by."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["ROUTED", "VIEWS", "View", "gain", "percent"]

View = Literal["pretrained", "individual", "anchor", "initial", "adapted"]
"""`"anchor"`: the static merge that a start was solved from."""
VIEWS: tuple[View, ...] = ("pretrained", "individual", "initial", "adapted")
ROUTED = ("routing", "known", "unknown")
"""Of a route: share of images that it sends to their task; accuracy with the task known, and left to the route."""


def percent(share: float) -> float:
    """A share in [0, 1] as people are shown it, in percent with one decimal; halves go up.

    The same for a number and for its nearest in float32, so that one accuracy is never two.
    """
    return math.floor(1000 * share + 0.5 + 1e-4) / 10 if math.isfinite(share) else share


def gain(after: float, before: float) -> float:
    """Percentage points from one share to another, as far as they are shown apart: 88.5 and 90.5 are 2.0."""
    return round(percent(after) - percent(before), 1)
