"""WUDI: the merged matrix that interferes least with each task's own (Cheng et al., "Whoever Started the Interference
Should End It", ICML 2025, arXiv 2503.08099). Needs no data: the rows of a task vector stand for its inputs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.matrices import QKV, average, by_matrix, check_qkv

__all__ = ["WUDI", "wudi"]


class WUDI(Transform):
    """Minimise Σₜ ‖(M − τₜ) τₜᵀ‖² / ‖τₜ‖² over M with Adam, from M = Σₜ τₜ; Σₜ of the rows at coefficient 1 is M.

    M is joint. Each row is its task vector plus 1/T of what the optimisation has added, M − Σₜ τₜ.

    Args:
        steps: of Adam, ≥ 0.
        lr: of Adam, in units of the weights: no entry moves further than about lr · steps.
        qkv: `"fused"`, as the authors ran open_clip, or `"split"`: Q, K and V as matrices of their own.
    """

    takes = "own"
    joint = True
    published = 1.0

    def __init__(self, steps: int = 300, lr: float = 1e-5, qkv: QKV = "fused") -> None:
        if steps < 0 or lr <= 0:
            raise InputError(f"WUDI needs steps ≥ 0 and lr > 0, got {steps} and {lr}")
        self.steps, self.lr, self.qkv = steps, lr, check_qkv(qkv)

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        return by_matrix(bank, partial(wudi, steps=self.steps, lr=self.lr), average, self.qkv)


def wudi(matrices: Tensor, steps: int, lr: float) -> Tensor:
    """τₜ + (M − Σₜ τₜ)/T for matrices [T, m, n]; tasks that have moved nothing have no say."""
    matrices = matrices.double()
    merged = matrices.sum(0)
    start = merged.clone()
    squares = matrices.square().sum((1, 2))
    weights = torch.where(squares > 0, 1 / squares, 0.0)
    # The gradient 2 Σₜ wₜ (M − τₜ) τₜᵀτₜ is 2 (M G − K), two matrices that do not change.
    gram, target = torch.zeros_like(merged.T @ merged), torch.zeros_like(merged)
    for weight, matrix in zip(weights, matrices):
        own = weight * (matrix.T @ matrix)
        gram += own
        target += matrix @ own
    optimizer = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        merged.grad = 2 * (merged @ gram - target)
        optimizer.step()
    return matrices + (merged - start) / len(matrices)
