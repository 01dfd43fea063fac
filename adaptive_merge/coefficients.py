"""Merging coefficients Λ [T, G]: how many scalars weigh the task vectors, where they start, how they are bounded."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptive_merge.errors import InputError
from adaptive_merge.task_vectors import Layout, TaskVectors

__all__ = ["BlockWise", "Bounds", "Coefficients", "Fixed", "LayerWise", "TaskWise"]

Bounds = Literal["clamp", "project", "free"]


class Coefficients(nn.Module, ABC):
    """One learnable scalar per task and group of parameters; subclasses say what a group is.

    θ(Λ)_p = θ₀_p + Σₜ λ_{t,g(p)} · τ_{t,p}.    (AdaMerging, Yang et al., ICLR 2024)

    The number of tasks and groups is known once `bind` has seen the bank; the module that owns the merge
    calls it.

    Args:
        init: start value: a number for all, one number per task, `"average"` (1/T), or `"metagpt"`
            (‖τₜ‖² / Σ‖τ‖², closed form of Zhou et al., EMNLP 2024).
        bounds: `"clamp"` bounds λ to [0, 1] inside the forward, as published: outside, the gradient is zero
            and λ never returns. `"project"` clips the stored value after each step, so the gradient stays
            alive. `"free"` does not bound.
        trainable: whether the coefficients learn.
    """

    granularity: ClassVar[str]

    def __init__(
        self,
        init: float | list[float] | Literal["average", "metagpt"] = 0.3,
        bounds: Bounds = "clamp",
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if bounds not in ("clamp", "project", "free"):
            raise InputError(f"unknown bounds {bounds!r} for the coefficients; choose 'clamp', 'project' or 'free'")
        self.init, self.bounds, self.trainable = init, bounds, trainable
        self.tasks: tuple[str, ...] = ()
        self.groups: tuple[str, ...] = ()
        self.group_of: tuple[int, ...] = ()
        self._fingerprint: tuple[int, str] | None = None

    def bind(self, task_vectors: TaskVectors) -> Coefficients:
        """Size the coefficients for a bank and set them to their start values. Returns itself."""
        labels = self.group_names(task_vectors.layout)
        self.groups = tuple(dict.fromkeys(labels))
        self.group_of = tuple(self.groups.index(label) for label in labels)
        self.tasks = task_vectors.tasks
        start = _start_values(self.init, task_vectors)[:, None].repeat(1, len(self.groups))
        self.values = nn.Parameter(start, requires_grad=self.trainable)
        return self

    @abstractmethod
    def group_names(self, layout: Layout) -> list[str]:
        """The group of each parameter: parameters of equal group share one λ per task."""

    def forward(self) -> Tensor:
        """Λ [T, G] as the merge uses it."""
        if self.bounds != "clamp":
            return self.values
        # The published gradient is 1 on the bounds themselves. `clamp`'s own is 1 there up to torch 2.14 and 0
        # from 2.15 on, where a coefficient that starts at 0 would never move.
        inside = (self.values >= 0) & (self.values <= 1)
        return torch.where(inside, self.values, self.values.detach().clamp(0, 1))

    @torch.no_grad()
    def project_(self) -> None:
        """Clip the stored values to [0, 1] where `bounds="project"`; call after each optimiser step."""
        if self.bounds == "project":
            self.values.clamp_(0, 1)

    @property
    def fingerprint(self) -> str:
        """sha256 of the values as they are now."""
        if self._fingerprint is None or self._fingerprint[0] != self.values._version:
            digest = hashlib.sha256(self.values.detach().cpu().numpy().tobytes()).hexdigest()
            self._fingerprint = (self.values._version, digest)
        return self._fingerprint[1]

    def table(self) -> dict[str, dict[str, float]]:
        """task → group → λ, for people and files."""
        rows = self().detach().tolist()
        return {task: dict(zip(self.groups, row)) for task, row in zip(self.tasks, rows)}


class TaskWise(Coefficients):
    """One coefficient per task: task-wise AdaMerging."""

    granularity = "task"

    def group_names(self, layout: Layout) -> list[str]:
        return ["all"] * len(layout.names)


class Fixed(TaskWise):
    """One constant per task: weight averaging (`init="average"`) and task arithmetic (`init=0.3`)."""

    def __init__(self, init: float | list[float] | Literal["average", "metagpt"] = 0.3) -> None:
        super().__init__(init, bounds="free", trainable=False)


class LayerWise(Coefficients):
    """One coefficient per task and named parameter tensor: layer-wise AdaMerging, aTLAS."""

    granularity = "layer"

    def group_names(self, layout: Layout) -> list[str]:
        return list(layout.names)


class BlockWise(Coefficients):
    """One coefficient per task and transformer block; what lies before and after the blocks is a group each."""

    granularity = "block"

    def group_names(self, layout: Layout) -> list[str]:
        blocks = layout.blocks
        last = max((index for index, block in enumerate(blocks) if block), default=-1)
        return [block or ("before" if index < last else "after") for index, block in enumerate(blocks)]


def _start_values(init: float | list[float] | str, task_vectors: TaskVectors) -> Tensor:
    """[T] start values."""
    tasks = len(task_vectors.tasks)
    if init == "average":
        return torch.full((tasks,), 1 / tasks)
    if init == "metagpt":
        squares = torch.stack([vector.float().square().sum() for vector in task_vectors.vectors]).cpu()
        return squares / squares.sum()
    if isinstance(init, str):
        raise InputError(f"unknown start {init!r} of the coefficients; give a number, a list, 'average' or 'metagpt'")
    if isinstance(init, Sequence):
        if len(init) != tasks:
            raise InputError(
                f"{len(init)} start coefficients for {tasks} experts ({', '.join(task_vectors.tasks)}); give one each"
            )
        return torch.tensor([float(value) for value in init])
    return torch.full((tasks,), float(init))
