"""The contract of an adapter: the places where a task, or an image, may differ from the shared merge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from adaptive_merge.adapters.heads import Head
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["Adapter", "Site"]

Site = Callable[[str | None, Any, Any], Any]
"""(task, first input of a submodule, its output) → what replaces the output."""


class Adapter(nn.Module, ABC):
    """What is learned beside the merge, most often per task. Subclasses override the places they change.

    All other places stay the identity, and so does the whole adapter before it has learned: the view "initial" leaves
    adapters out. `bind` sizes the parameters once backbone and heads are known. Those of tasks are kept in
    `nn.ParameterList`s in the order of the tasks, because a task may have a name that no module may have.
    """

    changes_tower: bool = False
    """Whether it works inside the tower; true by itself where `weights`, `sites` or `block` is overridden."""

    needs_task: bool = True
    """Whether `weights`, `sites` and `block` look at the task. Where they do not, they are given None, and all tasks
    share one forward of the tower."""

    replaces: ClassVar[bool] = False
    """Whether its sites run in place of their submodules, and are given None for the output."""

    tasks: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "changes_tower" not in vars(cls):
            cls.changes_tower = cls.overrides("weights", "sites", "block")

    @classmethod
    def overrides(cls, *places: str) -> bool:
        """Whether a subclass changes one of these places."""
        return any(getattr(cls, place) is not getattr(Adapter, place) for place in places)

    def bind(self, backbone: MergedBackbone, heads: Mapping[str, Head]) -> Adapter:
        """Create the parameters for these tasks. Returns itself."""
        self.tasks = backbone.task_vectors.tasks
        self.create(backbone, heads)
        return self

    @abstractmethod
    def create(self, backbone: MergedBackbone, heads: Mapping[str, Head]) -> None:
        """Create the parameters; `self.tasks` is set."""

    def look(self, backbone: MergedBackbone, images: Tensor, weights: Mapping[str, Tensor]) -> None:
        """What a route wants to see of the images [B, …] before their forward with `weights`; default: nothing."""

    def weights(self, task: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tower's parameters for this task."""
        return weights

    def sites(self, backbone: MergedBackbone, weights: Mapping[str, Tensor]) -> Mapping[str, Site]:
        """Submodules of the tower by name, such as `transformer.resblocks.0.mlp`, and what becomes of their outputs.

        Asked before each forward. The functions run where the submodule runs, also under autocast.

        Args:
            backbone: has the bank (`task_vectors`), for functions that mix experts.
            weights: the tower's parameters of this forward; gradients flow into them.
        """
        return {}

    def block(self, task: str, index: int, tokens: Tensor) -> Tensor:
        """The output [B, N, width] of the tower's block `index`, in float32, after its sites."""
        return tokens

    def features(self, task: str, features: Tensor) -> Tensor:
        """The features [B, d]."""
        return features

    def logits(self, task: str, features: Tensor, logits: Tensor) -> Tensor:
        """The logits [U, C], given the features [B, d] that the head computed them from (`Head.seen`)."""
        return logits

    def fold(self, task: str, weights: Mapping[str, Tensor], head: Head) -> tuple[Mapping[str, Tensor], Head]:
        """A plain tower and head that do what the task's do with this adapter; for exports.

        Args:
            task: whose model; any, where `needs_task` is false.
            weights: the tower's parameters so far.
            head: the task's head so far.

        Raises:
            InputError: there are none; the message is the reason.
        """
        if self.overrides("sites", "block", "features", "logits"):
            raise InputError(f"{type(self).__name__} changes submodules, features or logits by code of its own")
        return self.weights(task, weights), head

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
