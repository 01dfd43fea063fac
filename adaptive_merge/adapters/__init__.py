"""Part 3 of a method, what a task has of its own on top of the shared merge: surgery, a tint, or several of them."""

from adaptive_merge.adapters.base import Adapter
from adaptive_merge.parts import kinds

globals().update(names := kinds(__name__, Adapter))
__all__ = list(names)
