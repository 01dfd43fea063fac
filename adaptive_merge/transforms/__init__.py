"""What the task vectors look like before merging: pure functions `TaskVectors → TaskVectors`, one file a method."""

from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.ties import Ties, ties

__all__ = ["Ties", "Transform", "ties"]
