"""What belongs together: a pre-trained model, its experts, their heads and test images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from adaptive_merge.adapters.heads import HeadLike
from adaptive_merge.data.images import Images
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.data.trigger import Trigger
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["Experts", "Suite"]


@dataclass(frozen=True)
class Suite:
    """What belongs together.

    Args:
        name: of the suite.
        task_vectors: the bank of the pre-trained model and its experts.
        backbone: the encoder's structure, carrying `image_mean` and `image_std`.
        heads: task → frozen classifier weight [C, d], or another `Head`.
        images: task → test images.
        notes: what was read → what its reader has to say about it.
        trigger: of the backdoor that one of the experts is known to have.
    """

    name: str
    task_vectors: TaskVectors
    backbone: nn.Module
    heads: Mapping[str, HeadLike]
    images: Mapping[str, Images]
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    trigger: Trigger | None = None

    @property
    def data(self) -> TaskStream:
        """A stream over the images with its default settings."""
        return TaskStream(self.images)


class Experts(Mapping[str, dict[str, Tensor]]):
    """Task → the tensors of its expert, read when they are asked for, so that one expert at a time is in memory."""

    def __init__(self, tasks: Sequence[str], read: Callable[[str], dict[str, Tensor]]) -> None:
        self.tasks, self.read = tasks, read

    def __getitem__(self, task: str) -> dict[str, Tensor]:
        return self.read(task)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)
