"""Concrete masks: which entries of the task vectors are merged, learned along with how much of each task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from adaptive_merge.coefficients.linear import Bounds, Coefficients, Fixed, LayerWise, TaskWise
from adaptive_merge.errors import InputError
from adaptive_merge.merge.parts import BankPart
from adaptive_merge.merge.passes import combine, project
from adaptive_merge.merge.rule import Rule, State
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.upstream import version_of

__all__ = ["ConcreteMask"]


class ConcreteMask(Rule):
    """One mask over all entries, shared by the tasks: θ = θ₀ + m / mean(m) ⊙ Σₜ λₜ τₜ, the mean over each tensor.

    m = σ((x + log u − log(1 − u)) / temperature), u ~ U(0, 1), drawn anew in every step (Concrete Subspace Learning,
    Tang et al., 2023). With `granularity="fixed"`, Concrete task arithmetic, all steps learn x. Else, Concrete
    AdaMerging, each of the first `mask_steps` pairs of steps is one of the two levels, first order: λ steps once from
    its start with Adam at `inner_lr`, x steps at these λ on the next batch and mask, λ returns to its start. From then
    on the mask is that of the evaluation, and λ learns as in AdaMerging, with moments of its own.

    Noise depends on `seed` and the step alone: it is drawn on the CPU, the same on all processes and after a resume.

    Args:
        granularity: of λ: `"fixed"`, or what learns: one per task (`"task"`) or per task and tensor (`"layer"`).
        init: start of λ, as for `Coefficients`.
        bounds: of λ, as for `Coefficients`.
        mask_steps: pairs of steps that learn x; not used where λ is fixed.
        inner_lr: Adam's learning rate of λ while x learns.
        temperature: of the mask.
        mask: in evaluation: `"mean"` of `masks` drawn masks, one `"draw"` (published), or `"median"`, without noise.
        masks: how many the mean is taken over.
        seed: of the noise.

    Raises:
        InputError: a value outside its choices.
    """

    def __init__(
        self,
        granularity: Literal["fixed", "task", "layer"] = "fixed",
        init: float | list[float] | str = 0.3,
        bounds: Bounds = "clamp",
        mask_steps: int = 1000,
        inner_lr: float = 1.0,
        temperature: float = 0.5,
        mask: Literal["mean", "draw", "median"] = "mean",
        masks: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if granularity not in ("fixed", "task", "layer"):
            raise InputError(f"unknown granularity {granularity!r} of a mask; choose 'fixed', 'task' or 'layer'")
        if mask not in ("mean", "draw", "median"):
            raise InputError(f"unknown mask {mask!r} for the evaluation; choose 'mean', 'draw' or 'median'")
        if temperature <= 0 or masks < 1 or mask_steps < 0:
            raise InputError("a mask needs temperature above 0, masks of at least 1 and mask_steps of at least 0")
        self.granularity, self.init, self.bounds, self.mask_steps = granularity, init, bounds, mask_steps
        self.inner_lr, self.temperature, self.mask, self.masks, self.seed = inner_lr, temperature, mask, masks, seed
        self.linear, self.inner = self._coefficients(), self._coefficients()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._last: tuple[object, Tensor] | None = None

    steps: Tensor

    def _coefficients(self) -> Coefficients:
        if self.granularity == "fixed":
            return Fixed(self.init)
        return (TaskWise if self.granularity == "task" else LayerWise)(self.init, self.bounds)

    def bind(self, task_vectors: TaskVectors) -> Self:
        self.linear.bind(task_vectors)
        self.inner.bind(task_vectors)
        self.tasks, self.groups, self.free = self.linear.tasks, self.linear.groups, self.linear.free
        self.names = task_vectors.layout.names
        self.sizes = [place.stop - place.start for place in task_vectors.layout.slices]
        self.logits = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.register_buffer("start", self.inner.values.detach().clone(), persistent=False)
        self.rates = {} if self.granularity == "fixed" else {"inner.values": self.inner_lr}
        return self

    start: Tensor

    @property
    def turn(self) -> Literal["mask", "inner", "coefficients"]:
        """What the step under way moves: a function of the steps begun."""
        step = int(self.steps)
        if self.granularity == "fixed":
            return "mask"
        if step > 2 * self.mask_steps:
            return "coefficients"
        return "inner" if step % 2 else "mask"

    def state(self) -> State:
        """Λ [T, G] and the mask [P], divided by its mean over each tensor."""
        if not self.training:
            return self.linear(), self._settled_mask()
        self.steps += 1
        # DDP waits for a gradient of every parameter, also of those that have no turn.
        none = 0.0 * (self.logits[0] + self.linear.values.sum() + self.inner.values.sum())
        if self.turn == "coefficients":
            return self.linear() + none, self._settled_mask()
        return self.inner() + none, self._normalised(self._noise(int(self.steps)))

    def withhold_(self) -> None:
        """Leave gradients to what has its turn."""
        turns = {"mask": self.logits, "inner": self.inner.values, "coefficients": self.linear.values}
        for parameter in (value for turn, value in turns.items() if turn != self.turn):
            parameter.grad = None

    @torch.no_grad()
    def bound_(self) -> None:
        self.linear.bound_()
        self.inner.bound_()
        if self.turn == "mask":
            self.inner.values.copy_(self.start)

    def _normalised(self, noise: Tensor | float) -> Tensor:
        masks = torch.sigmoid((self.logits + noise) / self.temperature).split(self.sizes)
        return torch.cat([mask / mask.mean() for mask in masks])

    def _noise(self, number: int) -> Tensor:
        """log u − log(1 − u) [P] of a step, from 1, or of a mask of the evaluation, from −1 downwards."""
        # torch's generator on the CPU looks at the last 32 bits of a seed alone.
        digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        uniform = torch.rand(self.logits.shape, generator=generator).clamp_(1e-6, 1 - 1e-6)
        return uniform.logit_().to(self.logits.device)

    @torch.no_grad()
    def _settled_mask(self) -> Tensor:
        """The mask of the evaluation; kept until the logits change."""
        key = (version_of(self.logits), id(self.logits), self.logits.device)
        if self._last is None or self._last[0] != key:
            if self.mask == "median":
                value = self._normalised(0.0)
            else:
                value = torch.zeros_like(self.logits)
                count = self.masks if self.mask == "mean" else 1
                for number in range(count):
                    value += self._normalised(self._noise(-1 - number)) / count
            self._last = (key, value)
        return self._last[1]

    @torch.no_grad()
    def combine(self, part: BankPart, state: State, out: Tensor) -> None:
        combine(part.bank, state[0], part.of(self.linear.group_of), out)
        out.sub_(part.bank.pretrained).mul_(state[1][part.columns]).add_(part.bank.pretrained)

    @torch.no_grad()
    def project(self, part: BankPart, gradients: Sequence[Tensor | None], state: State, out: State) -> None:
        groups, mask = part.of(self.linear.group_of), state[1][part.columns]
        flat = torch.zeros_like(mask)
        for gradient, place in zip(gradients, part.bank.layout.slices):
            if gradient is not None:
                flat[place] = gradient.reshape(-1)
        if self.turn == "mask":
            moved = combine(part.bank, state[0], groups).sub_(part.bank.pretrained)
            out[1][part.columns] += flat * moved
        else:
            masked = part.bank.layout.views(flat * mask)
            out[0].add_(project(part.bank, masked, groups, len(self.groups)))

    def rebase(self, task_vectors: TaskVectors) -> None:
        raise InputError("a mask cannot go on from a start: there λ is 0, and a mask of nothing learns nothing")

    @torch.no_grad()
    def kept(self) -> dict[str, dict[str, float]]:
        """Task → parameter → mean of the mask before it is divided by it; the tasks share one mask."""
        masks = torch.sigmoid(self.logits / self.temperature).split(self.sizes)
        shares = {name: float(mask.mean()) for name, mask in zip(self.names, masks)}
        return {task: shares for task in self.tasks}

    def display(self) -> Tensor | None:
        return None if self.granularity == "fixed" else self.linear()

    @property
    def held_bytes(self) -> int:
        """Of the mask of the evaluation."""
        return self.logits.nbytes

    @property
    def learns(self) -> bool:
        return self.logits.requires_grad or self.linear.values.requires_grad
