"""The models that a run is compared by."""

from __future__ import annotations

from typing import Literal

__all__ = ["VIEWS", "View"]

View = Literal["pretrained", "individual", "anchor", "initial", "adapted"]
"""`"anchor"`: the static merge that a start was solved from."""
VIEWS: tuple[View, ...] = ("pretrained", "individual", "initial", "adapted")
