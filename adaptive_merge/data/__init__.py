"""Task suites: images, the unlabelled stream over them, and what belongs together with them."""

from adaptive_merge.data.corruptions import Corruption
from adaptive_merge.data.images import Images
from adaptive_merge.data.protocols import Holdout, Online, Protocol, Transductive, Unseen
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.data.suite import Suite, load_suite

__all__ = [
    "Corruption",
    "Holdout",
    "Images",
    "Online",
    "Protocol",
    "Suite",
    "TaskStream",
    "Transductive",
    "Unseen",
    "load_suite",
]
