"""Starts: what the unlabelled stream gives before any gradient; merges in closed form."""

from adaptive_merge.parts import kinds
from adaptive_merge.starts.base import Start

globals().update(names := kinds(__name__, Start))
__all__ = list(names)
