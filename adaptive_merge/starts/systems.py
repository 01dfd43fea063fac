"""Linear systems: what a site's weights have to satisfy, given every task's moments; solved in float64."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from adaptive_merge.starts.sites import Layer
from adaptive_merge.starts.sums import Moments

__all__ = ["FeatCalSystem", "GramSystem", "NormSystem", "RidgeSystem", "ScaleSystem", "Statistics", "System", "solve"]

# Below this share of the largest eigenvalue, what float32 products add up to is noise.
RESOLUTION = 1e-6


class System(ABC):
    """Adds up the tasks at one site.

    Args:
        anchor: the site's layer in the anchor.
    """

    def __init__(self, anchor: Layer) -> None:
        self.anchor = anchor.double()

    @abstractmethod
    def add(self, moments: Moments, expert: Layer) -> None:
        """One task's moments and the site's layer in its expert."""

    @abstractmethod
    def solution(self) -> Layer:
        """The layer for all tasks that were added."""


class RidgeSystem(System):
    """Ridge regression with an anchor, weight and bias at once: x₁ = [x; 1].

        [Wᵀ; bᵀ] = (Σ_t C_t/n_t + λI)⁻¹ (Σ_t K_t/n_t + λ·A),  n_t = ‖E[x xᵀ]‖_F

    Args:
        anchor: as for `System`.
        strength: λ.
    """

    def __init__(self, anchor: Layer, strength: float) -> None:
        super().__init__(anchor)
        self.strength = strength
        bias = [] if self.anchor.bias is None else [self.anchor.bias[None]]
        self.target = torch.cat([self.anchor.weight.T, *bias])
        self.left = self.target.new_zeros(len(self.target), len(self.target))
        self.right = torch.zeros_like(self.target)

    def add(self, moments: Moments, expert: Layer) -> None:
        share, width = 1 / _norm(moments), len(moments.x)
        self.left[:width, :width].add_(moments.gram, alpha=share)
        self.right[:width].add_(moments.cross, alpha=share)
        if self.anchor.bias is not None:
            self.left[width, :width].add_(moments.x, alpha=share)
            self.left[:width, width].add_(moments.x, alpha=share)
            self.left[width, width] += share
            self.right[width].add_(moments.y, alpha=share)

    def solution(self) -> Layer:
        alive = self.left.diagonal() != 0  # of other inputs nothing is known: they stay at the anchor
        self.left.diagonal().add_(alive, alpha=self.strength)
        solved = solve(self.left, self.right.add_(self.target, alpha=self.strength))
        solved = torch.where(alive[:, None], solved, self.target)
        return Layer(solved.T, None) if self.anchor.bias is None else Layer(solved[:-1].T, solved[-1])


class FeatCalSystem(System):
    """FeatCal's two steps: the weight from the inputs as they are, then the bias (field: arXiv 2605.13030, 18c68b6).

    Wᵀ = (Σ_t C_t/n_t + λI)⁻¹ (Σ_t E[x (y − b_t)ᵀ]/n_t + λ·A_Wᵀ)
    b = (Σ_t (E[y] − W E[x])/n_t + λ·A_b) / (Σ_t 1/n_t + λ)
    """

    def __init__(self, anchor: Layer, strength: float) -> None:
        super().__init__(anchor)
        self.strength = strength
        self.left = anchor.weight.new_zeros((anchor.weight.shape[1],) * 2, dtype=torch.float64)
        self.right = torch.zeros_like(self.anchor.weight.T)
        self.x, self.y, self.share = (
            self.left.new_zeros(self.left.shape[0]),
            self.left.new_zeros(len(anchor.weight)),
            0.0,
        )

    def add(self, moments: Moments, expert: Layer) -> None:
        norm = _norm(moments)
        self.left.add_(moments.gram, alpha=1 / norm)
        self.right.add_(moments.cross, alpha=1 / norm)
        self.right -= moments.x[:, None] * expert.shift / norm
        self.x, self.y, self.share = self.x + moments.x / norm, self.y + moments.y / norm, self.share + 1 / norm

    def solution(self) -> Layer:
        self.left.diagonal().add_(self.strength)
        weight = solve(self.left, self.right.add_(self.anchor.weight.T, alpha=self.strength)).T
        if self.anchor.bias is None:
            return Layer(weight, None)
        missing = self.y - weight @ self.x + self.strength * self.anchor.shift
        return Layer(weight, missing / (self.share + self.strength))


class GramSystem(System):
    """RegMean's weighting by Gram matrices: Wᵀ = (Σ_t G_t)⁻¹ Σ_t G_t W_tᵀ; biases are averaged.

    Args:
        anchor: as for `System`.
        shrink: what off-diagonal entries of the Grams are multiplied by.
        base: None, or the pre-trained layer: then task vectors are solved for and not weights (LOT).
        pseudo: whether to take the pseudo-inverse.
        scale: what the solved task vectors are multiplied by.
    """

    def __init__(
        self, anchor: Layer, shrink: float = 1.0, base: Layer | None = None, pseudo: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__(anchor)
        self.shrink, self.pseudo, self.scale = shrink, pseudo, scale
        self.base = Layer(torch.zeros_like(self.anchor.weight), None) if base is None else base.double()
        self.left = self.anchor.weight.new_zeros((anchor.weight.shape[1],) * 2)
        self.right, self.mean = torch.zeros_like(self.anchor.weight.T), torch.zeros_like(self.anchor.weight)
        self.bias, self.tasks = torch.zeros_like(self.base.shift), 0

    def add(self, moments: Moments, expert: Layer) -> None:
        gram = moments.gram * self.shrink
        gram.diagonal().copy_(moments.gram.diagonal())
        moved = expert.weight.double() - self.base.weight
        self.left, self.right = self.left + gram, self.right + gram @ moved.T
        self.mean, self.tasks = self.mean + moved, self.tasks + 1
        self.bias = self.bias + expert.shift.double() - self.base.shift

    def solution(self) -> Layer:
        if self.pseudo:
            solved = (pseudo_inverse(self.left) @ self.right).T
        else:
            silent = self.left.diagonal() == 0  # inputs that say nothing of their weights: the mean
            solved = torch.where(silent, self.mean / self.tasks, solve(self.left, self.right).T)
        weight = self.base.weight + self.scale * solved
        bias = self.base.shift + self.scale * self.bias / self.tasks
        return Layer(weight, None if self.anchor.bias is None else bias)


class NormSystem(System):
    """Scale and shift of a norm, entry by entry a 2 × 2 ridge regression (FeatCal).

    [[Σ_t E[z²] + λ, Σ_t E[z]], [Σ_t E[z], T + λ]] (γ, β)ᵀ = (Σ_t E[z y] + λ·A_γ, Σ_t E[y] + λ·A_β)
    """

    def __init__(self, anchor: Layer, strength: float) -> None:
        super().__init__(anchor)
        self.strength = strength
        self.square, self.z, self.zy, self.y = (torch.zeros_like(self.anchor.weight) for _ in range(4))
        self.tasks = 0

    def add(self, moments: Moments, expert: Layer) -> None:
        self.square, self.z = self.square + moments.gram, self.z + moments.x
        self.zy, self.y, self.tasks = self.zy + moments.cross, self.y + moments.y, self.tasks + 1

    def solution(self) -> Layer:
        first, second = self.square + self.strength, self.tasks + self.strength
        right = self.zy + self.strength * self.anchor.weight, self.y + self.strength * self.anchor.shift
        determinant = (first * second - self.z**2).clamp_min(1e-8)
        gamma = (second * right[0] - self.z * right[1]) / determinant
        return Layer(gamma, (first * right[1] - self.z * right[0]) / determinant)


class ScaleSystem(System):
    """LOT for a norm: task vectors of the scale, weighted by E[z²] entry by entry; those of the shift, averaged."""

    def __init__(self, base: Layer, scale: float) -> None:
        super().__init__(base)
        self.scale = scale
        self.square, self.weighted, self.shift = (torch.zeros_like(self.anchor.weight) for _ in range(3))
        self.tasks = 0

    def add(self, moments: Moments, expert: Layer) -> None:
        self.square = self.square + moments.gram
        self.weighted = self.weighted + moments.gram * (expert.weight - self.anchor.weight)
        self.shift, self.tasks = self.shift + (expert.shift - self.anchor.shift), self.tasks + 1

    def solution(self) -> Layer:
        weight = self.anchor.weight + self.scale * self.weighted / self.square.clamp_min(1e-12)
        return Layer(weight, self.anchor.shift + self.scale * self.shift / self.tasks)


class Statistics(System):
    """Running mean and variance of a BatchNorm over the merged model's inputs, tasks weighing the same."""

    def __init__(self, anchor: Layer) -> None:
        super().__init__(anchor)
        self.mean, self.square = (torch.zeros_like(self.anchor.weight) for _ in range(2))
        self.tasks, self.tokens = 0, 0.0

    def add(self, moments: Moments, expert: Layer) -> None:
        self.mean, self.square = self.mean + moments.x, self.square + moments.gram
        self.tasks, self.tokens = self.tasks + 1, self.tokens + moments.tokens

    def solution(self) -> Layer:
        mean = self.mean / self.tasks
        biased = (self.square / self.tasks - mean**2).clamp_min(0)
        return Layer(mean, biased * self.tokens / max(self.tokens - 1, 1))


def solve(left: Tensor, right: Tensor) -> Tensor:
    """left⁻¹ right of a symmetric positive definite matrix; its pseudo-inverse, with a warning, where it is not.

    Inputs that are always zero, as behind dead ReLUs and in padding, get zeros without more ado.
    """
    alive = left.diagonal() != 0
    if not alive.all():
        solved = torch.zeros_like(right)
        solved[alive] = solve(left[alive][:, alive], right[alive])
        return solved
    factor, failed = torch.linalg.cholesky_ex(left)
    if not failed:
        return torch.cholesky_solve(right, factor)
    warnings.warn(
        f"a system of {len(left)} equations is singular: more images, or a larger `strength`, would settle it; "
        "the pseudo-inverse is taken",
        stacklevel=2,
    )
    return pseudo_inverse(left) @ right


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix that was summed from float32 products."""
    return torch.linalg.pinv(matrix, rtol=RESOLUTION, hermitian=True)


def _norm(moments: Moments) -> float:
    """n_t; 1 for inputs that are zero throughout, which then say nothing."""
    return float(torch.linalg.matrix_norm(moments.gram)) or 1.0
