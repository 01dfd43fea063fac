"""Merging coefficients Λ [T, G]: how many scalars weigh the task vectors, where they start, how they are bounded."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from adaptive_merge.coefficients.inits import CHOICES, is_named, named_start
from adaptive_merge.coefficients.published import ALL, read_coefficients
from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.parts import BankPart
from adaptive_merge.merge.passes import combine, project
from adaptive_merge.merge.rule import Rule, State
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["BlockWise", "Bounds", "Coefficients", "Fixed", "LayerWise", "LinearRule", "TaskWise"]

Bounds = Literal["clamp", "project", "free"]


class LinearRule(Rule):
    """θ(Λ)_p = θ₀_p + Σₜ λ_{t,g(p)} · τ_{t,p}; subclasses say what a group of parameters is, and make Λ of what learns.

    The arguments `init` and `trainable` of subclasses are those of `Coefficients`.
    """

    granularity: ClassVar[str]
    init: float | list[float] | str
    group_of: tuple[int, ...] = ()
    """For each parameter of the bank its column of Λ."""

    @abstractmethod
    def group_names(self, layout: Layout) -> list[str]:
        """The group of each parameter: parameters of equal group share one λ per task."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Λ [T, G] as the merge uses it."""

    def arrange(self, task_vectors: TaskVectors) -> Tensor:
        """Take over the tasks and groups of a bank; the start values [T, G] of `init`."""
        labels = self.group_names(task_vectors.layout)
        self.groups = tuple(dict.fromkeys(labels))
        self.group_of = tuple(self.groups.index(label) for label in labels)
        self.tasks = task_vectors.tasks
        return self._start_values(task_vectors)

    @property
    def settings(self) -> dict[str, str]:
        """What the arguments do not say: what is weighed and, of a file to start from, its values and not its path."""
        groups = hashlib.sha256(repr((self.groups, self.group_of)).encode()).hexdigest()
        reads = isinstance(self.init, str) and not is_named(self.init)
        start = {"init": f"values of sha256 {self.fingerprint}"} if reads else {}
        return {"groups": f"{len(self.groups)}, sha256 {groups}"} | start

    def state(self) -> State:
        return (self(),)

    @torch.no_grad()
    def combine(self, part: BankPart, state: State, out: Tensor) -> None:
        combine(part.bank, state[0], part.of(self.group_of), out)

    @torch.no_grad()
    def project(self, part: BankPart, gradients: Sequence[Tensor | None], state: State, out: State) -> None:
        out[0].add_(project(part.bank, gradients, part.of(self.group_of), len(self.groups)))

    def display(self) -> Tensor:
        return self()

    def _start_values(self, task_vectors: TaskVectors) -> Tensor:
        """[T, G]."""
        tasks, init = len(self.tasks), self.init
        if isinstance(init, str):
            named = is_named(init)
            return named_start(init, task_vectors, self.group_of) if named else self._read(init, task_vectors)
        if isinstance(init, Sequence):
            if len(init) != tasks:
                listed = ", ".join(self.tasks)
                raise InputError(f"{len(init)} start coefficients for {tasks} experts ({listed}); give one each")
            column = torch.tensor([float(value) for value in init])
        else:
            column = torch.full((tasks,), float(init))
        return column[:, None].repeat(1, len(self.groups))

    def _read(self, source: str, bank: TaskVectors) -> Tensor:
        """[T, G] of a run folder or a file, matched by the names of tasks and groups.

        Task-wise values spread over all groups. Groups that no expert has moved may be absent; their λ is 0.
        """
        name, _, table = source.partition("#") if not Path(source).exists() else (source, "", "")
        if not Path(name).exists():
            raise MissingFileError(
                f"coefficients cannot start at {source!r}: give a number, a list, {CHOICES}, or an existing run folder "
                "or file of coefficients"
            )
        default = "tw_adamerging" if self.granularity == "task" else "lw_adamerging"
        rows = read_coefficients(Path(name), self.tasks, bank.layout, table or default)
        _check_names(name, "task", self.tasks, rows)
        known = next(iter(rows.values()))
        if list(known) == [ALL]:
            return torch.tensor([[rows[task][ALL]] for task in self.tasks]).repeat(1, len(self.groups))
        parts = zip(self.group_of, bank.layout.slices)
        moved = {self.groups[group] for group, part in parts if bool(bank.vectors[:, part].any())}
        _check_names(name, "group", [group for group in self.groups if group in moved or group in known], known)
        return torch.tensor([[rows[task].get(group, 0.0) for group in self.groups] for task in self.tasks])


class Coefficients(LinearRule):
    """One learnable scalar per task and group of parameters; subclasses say what a group is.

    θ(Λ)_p = θ₀_p + Σₜ λ_{t,g(p)} · τ_{t,p}.    (AdaMerging, Yang et al., ICLR 2024)

    The number of tasks and groups is known once `bind` has seen the bank; the module that owns the merge
    calls it.

    Args:
        init: start value: a number for all, one number per task, a name of `named_start` such as `"average"`,
            `"published"`, `"metagpt"`, `"layerwise_metagpt"` or `"norm^-1"`, or the path of a run folder or of a file
            of coefficients: one that a run wrote, or one that AdaMerging, fusion_bench or Model Tinting published (see
            `read_coefficients`; `FILE#lw_adamergingpp` names one of the tables in AdaMerging's source file).
        bounds: `"clamp"` bounds λ to [0, 1] inside the forward, as published: outside, the gradient is zero
            and λ never returns. `"project"` clips the stored value after each step, so the gradient stays
            alive. `"free"` does not bound.
        trainable: whether the coefficients learn.
    """

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

    def bind(self, task_vectors: TaskVectors) -> Self:
        """Size the coefficients for a bank and set them to their start values. Returns itself."""
        self.values = nn.Parameter(self.arrange(task_vectors), requires_grad=self.trainable)
        self.free = self.trainable and self.bounds == "free"
        return self

    def forward(self) -> Tensor:
        """Λ [T, G] as the merge uses it."""
        if self.bounds != "clamp":
            return self.values
        # `clamp`'s own gradient is 0 on the bounds themselves as well (torch 2.14): a coefficient that starts at 0
        # would never move. Here it is 1 there.
        inside = (self.values >= 0) & (self.values <= 1)
        return torch.where(inside, self.values, self.values.detach().clamp(0, 1))

    @torch.no_grad()
    def rebase(self, task_vectors: TaskVectors) -> None:
        """All coefficients at 0, where the merge is the start itself; from there they move both ways."""
        if self.trainable and self.bounds != "free":
            raise InputError(
                f"coefficients that go on from a start begin at 0 and move both ways; bounds {self.bounds!r} would "
                "hold them in [0, 1], set `bounds: free`"
            )
        self.values.zero_()

    @torch.no_grad()
    def bound_(self) -> None:
        """Clip the stored values to [0, 1] where `bounds="project"`."""
        if self.bounds == "project":
            self.values.clamp_(0, 1)


class TaskWise(Coefficients):
    """One coefficient per task: task-wise AdaMerging."""

    granularity = "task"

    def group_names(self, layout: Layout) -> list[str]:
        return [ALL] * len(layout.names)


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
        layout.depth("BlockWise")
        blocks = layout.blocks
        last = max(index for index, block in enumerate(blocks) if block)
        return [block or ("before" if index < last else "after") for index, block in enumerate(blocks)]


def _check_names(path: str, what: str, expected: Sequence[str], known: Mapping[str, object]) -> None:
    """InputError where a file lacks one of these tasks or groups, or has others."""
    lacking = [name for name in expected if name not in known]
    if lacking:
        raise InputError(f"{path}: there is no coefficient for {what} {lacking[0]!r}{did_you_mean(lacking[0], known)}")
    surplus = [name for name in known if name not in expected]
    if surplus:
        raise InputError(f"{path}: this merge has no {what} {surplus[0]!r}{did_you_mean(surplus[0], expected)}")
