"""The contract of an adapter: four places where a task may differ from the shared merge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["Adapter"]


class Adapter(nn.Module, ABC):
    """Per-task parameters. Subclasses override the places they change; all others stay the identity.

    `bind` sizes the parameters once backbone and heads are known. They are kept in `nn.ParameterList`s in the
    order of the tasks, because a task may have a name that no module may have.
    """

    changes_tower: bool = False
    """Whether `weights` or `block` is overridden, so that tasks cannot share one forward of the tower."""

    tasks: tuple[str, ...] = ()

    def bind(self, backbone: MergedBackbone, heads: Mapping[str, Tensor]) -> Adapter:
        """Create the parameters for these tasks. Returns itself."""
        self.tasks = backbone.task_vectors.tasks
        self.create(backbone, heads)
        return self

    @abstractmethod
    def create(self, backbone: MergedBackbone, heads: Mapping[str, Tensor]) -> None:
        """Create the parameters; `self.tasks` is set."""

    def weights(self, task: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tower's parameters for this task."""
        return weights

    def block(self, task: str, index: int, tokens: Tensor) -> Tensor:
        """The output [B, N, width] of the tower's block `index`."""
        return tokens

    def features(self, task: str, features: Tensor) -> Tensor:
        """The features [B, d]."""
        return features

    def logits(self, task: str, features: Tensor, logits: Tensor) -> Tensor:
        """The logits [B, C], given the unit features [B, d] that they were computed from."""
        return logits

    def row(self, task: str) -> int:
        """Position of a task; InputError where it is missing or unknown."""
        if task not in self.tasks:
            raise InputError(
                f"{type(self).__name__} has nothing for task {task!r}{did_you_mean(str(task), self.tasks)}"
            )
        return self.tasks.index(task)


def stacked(parts: Sequence[Tensor]) -> nn.ParameterList:
    """One parameter per task, each a contiguous copy of its own."""
    return nn.ParameterList(nn.Parameter(part.detach().clone().contiguous()) for part in parts)
