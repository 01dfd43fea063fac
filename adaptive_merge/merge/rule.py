"""The contract of what is learned about a merge."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from adaptive_merge.errors import InputError
from adaptive_merge.merge.state_dicts import raw
from adaptive_merge.upstream import version_of

if TYPE_CHECKING:
    from adaptive_merge.merge.parts import BankPart
    from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["Rule", "State"]

State = tuple[Tensor, ...]
"""What a merge reads of a rule, such as (Λ [T, G],) or (Λ, mask [P])."""


class Rule(nn.Module, ABC):
    """How θ is made of the bank: θ = f(θ₀, τ, state), where the state is made of the rule's parameters.

    The engine never looks at the parameters. It asks for the state once a step, merges with `combine`, and gives the
    gradients of θ to `project`; the state's own graph leads back to the parameters. In evaluation mode (`self.training`
    is false) the state has to be the same at every call; in training mode it may be drawn at random.
    """

    tasks: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    """Columns of `display`, such as parameter names."""
    free: bool = False
    """Whether what `display` shows learns without bounds, and so may run away."""
    rates: Mapping[str, float] = {}
    """Learning rates of parameters, by name, that are not the run's; known after `bind`."""

    @abstractmethod
    def bind(self, task_vectors: TaskVectors) -> Self:
        """Make the parameters for a bank and set them to their start. Returns itself."""

    @abstractmethod
    def state(self) -> State:
        """What the merge reads, differentiable in the parameters that learn."""

    @abstractmethod
    def combine(self, part: BankPart, state: State, out: Tensor) -> None:
        """Write θ of a part's columns to `out` [columns of the part], float32; no gradient."""

    @abstractmethod
    def project(self, part: BankPart, gradients: Sequence[Tensor | None], state: State, out: State) -> None:
        """Add what a part's columns say about ∂L/∂state to `out`, which is shaped as `state`; no gradient.

        Args:
            part: some columns of the bank.
            gradients: ∂L/∂θ, one tensor per parameter of the part; None where a parameter got none.
            state: what `combine` was given.
            out: where to add; starts at zero.
        """

    def rated(self, learned: Sequence[nn.Parameter], lr: float) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of parameters and their learning rates: first those of `learned` that have none of their own."""
        own = [(value, self.rates[name]) for name, value in self.named_parameters() if name in self.rates]
        others = [value for value in learned if all(value is not known for known, _ in own)]
        return [(others, lr), *(([value], rate) for value, rate in own)]

    def rebase(self, task_vectors: TaskVectors) -> None:
        """Go on from a bank of the same tasks and parameters around a start: there θ is to be the bank's θ₀.

        Called after `bind`, before anything has been learned.

        Raises:
            InputError: this rule has no such values, or its settings do not allow them.
        """
        raise InputError(f"{type(self).__name__} cannot go on from a start; write its `rebase`, or leave `start` out")

    def display(self) -> Tensor | None:
        """[T, G] of `tasks` and `groups` for people, on the rule's device; None: there is nothing to draw."""
        return None

    def table(self) -> Mapping[str, Mapping[str, float]] | None:
        """task → group → value of `display`, for people and files."""
        shown = self.display()
        if shown is None:
            return None
        return {task: dict(zip(self.groups, row)) for task, row in zip(self.tasks, shown.detach().tolist())}

    def withhold_(self) -> None:
        """Take away (`grad = None`) the gradients of what is not to move in this step; called before the optimiser's.

        They exist by then on all processes, so parameters that take turns need no other DDP.
        """

    def kept(self) -> Mapping[str, Mapping[str, float]] | None:
        """Task → parameter → share of it that a mask keeps, for people and files; None: there is no such mask."""
        return None

    def bound_(self) -> None:
        """Bring stored values back into their bounds; called after each optimiser step."""

    @property
    def held_bytes(self) -> int:
        """Bytes that it keeps on the device between merges, beside its parameters, once it has merged."""
        return 0

    @property
    def learns(self) -> bool:
        """Whether anything of it learns at the moment."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def version(self) -> tuple[int | bool, ...]:
        """Changes with the values, and between training and evaluation."""
        return (self.training, *(version_of(parameter) for parameter in self.parameters()))

    @property
    def fingerprint(self) -> str:
        """sha256 of the values as they are now."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(raw(parameter))
        return digest.hexdigest()

    @torch.no_grad()
    def settled(self) -> State:
        """A copy of the state as it is used in evaluation."""
        training = self.training
        try:
            return tuple(value.detach().clone() for value in self.eval().state())
        finally:
            self.train(training)
