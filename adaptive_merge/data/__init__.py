"""Images and the unlabelled stream over them: protocols, draws, corruptions, the cache of decoded images."""

from adaptive_merge.data.corruptions import Corruption
from adaptive_merge.data.images import Images
from adaptive_merge.data.protocols import Holdout, Online, Protocol, Transductive, Unseen
from adaptive_merge.data.stream import TaskStream

__all__ = [
    "Corruption",
    "Holdout",
    "Images",
    "Online",
    "Protocol",
    "TaskStream",
    "Transductive",
    "Unseen",
]
