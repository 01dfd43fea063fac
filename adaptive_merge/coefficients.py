"""Merging coefficients Λ [T, G]: how many scalars weigh the task vectors, where they start, how they are bounded."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptive_merge.checkpoints.coefficients import load_coefficients
from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.task_vectors import Layout, TaskVectors

__all__ = ["BlockWise", "Bounds", "Coefficients", "Fixed", "LayerWise", "TaskWise"]

Bounds = Literal["clamp", "project", "free"]


class Coefficients(nn.Module, ABC):
    """One learnable scalar per task and group of parameters; subclasses say what a group is.

    θ(Λ)_p = θ₀_p + Σₜ λ_{t,g(p)} · τ_{t,p}.    (AdaMerging, Yang et al., ICLR 2024)

    The number of tasks and groups is known once `bind` has seen the bank; the module that owns the merge
    calls it.

    Args:
        init: start value: a number for all, one number per task, `"average"` (1/T), `"metagpt"`
            (‖τₜ‖² / Σ‖τ‖², closed form of Zhou et al., EMNLP 2024), or the path of a run folder or of a file of
            coefficients by name, such as published ones.
        bounds: `"clamp"` bounds λ to [0, 1] inside the forward, as published: outside, the gradient is zero
            and λ never returns. `"project"` clips the stored value after each step, so the gradient stays
            alive. `"free"` does not bound.
        trainable: whether the coefficients learn.
    """

    granularity: ClassVar[str]

    def __init__(
        self,
        init: float | list[float] | str = 0.3,
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
        start = self._start_values(task_vectors)
        self.values = nn.Parameter(start, requires_grad=self.trainable)
        return self

    @abstractmethod
    def group_names(self, layout: Layout) -> list[str]:
        """The group of each parameter: parameters of equal group share one λ per task."""

    def _start_values(self, task_vectors: TaskVectors) -> Tensor:
        """[T, G]."""
        tasks, init = len(self.tasks), self.init
        if init == "metagpt":
            squares = torch.stack([vector.float().square().sum() for vector in task_vectors.vectors]).cpu()
            column = squares / squares.sum()
        elif isinstance(init, str) and init != "average":
            return self._read(Path(init))
        elif isinstance(init, Sequence) and init != "average":
            if len(init) != tasks:
                listed = ", ".join(self.tasks)
                raise InputError(f"{len(init)} start coefficients for {tasks} experts ({listed}); give one each")
            column = torch.tensor([float(value) for value in init])
        else:
            column = torch.full((tasks,), 1 / tasks if init == "average" else float(init))
        return column[:, None].repeat(1, len(self.groups))

    def _read(self, path: Path) -> Tensor:
        """[T, G] of a run folder or a file, matched by the names of tasks and groups."""
        if not path.exists():
            raise MissingFileError(
                f"coefficients cannot start at {str(path)!r}: give a number, a list, 'average', 'metagpt', or an "
                "existing run folder or file of coefficients"
            )
        path = path / "coefficients.json" if path.is_dir() else path
        found = load_coefficients(path)
        for wanted, given, what in ((self.tasks, found, "task"), (self.groups, next(iter(found.values())), "group")):
            for name in (name for name in wanted if name not in given):
                raise InputError(f"{path}: there is no coefficient for {what} {name!r}{did_you_mean(name, given)}")
            for name in (name for name in given if name not in wanted):
                raise InputError(f"{path}: this merge has no {what} {name!r}{did_you_mean(name, wanted)}")
        return torch.tensor([[found[task][group] for group in self.groups] for task in self.tasks])

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

    def __init__(self, init: float | list[float] | str = 0.3) -> None:
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
