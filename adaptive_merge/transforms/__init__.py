"""Part 1 of a method, what the task vectors look like before merging: `TaskVectors → TaskVectors`, one file each."""

from adaptive_merge.parts import kinds
from adaptive_merge.transforms.base import Transform

globals().update(names := kinds(__name__, Transform))

from adaptive_merge.transforms.consensus import tall_masks  # noqa: E402
from adaptive_merge.transforms.ties import ties  # noqa: E402  # the function, not the module that `kinds` has imported

__all__ = [*names, "tall_masks", "ties"]
