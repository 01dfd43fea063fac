"""What a task has of its own on top of the shared merge: nothing, surgery, a tint, or several of them."""

from adaptive_merge.adapters.base import Adapter
from adaptive_merge.adapters.surgery import BlockSurgery, FeatureSurgery
from adaptive_merge.adapters.tint import Tint

__all__ = ["Adapter", "BlockSurgery", "FeatureSurgery", "Tint"]
