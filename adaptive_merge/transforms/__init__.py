"""Part 1 of a method, what the task vectors look like before merging: `TaskVectors → TaskVectors`, one file each."""

from adaptive_merge.parts import kinds
from adaptive_merge.transforms.base import Transform

globals().update(names := kinds(__name__, Transform))
__all__ = list(names)
