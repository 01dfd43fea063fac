"""SVC: calibrate the singular values of a merge that counts shared directions several times (ICML 2026).

"When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", arXiv 2602.05536. A veneer on any merge:
it compares the merge, direction by direction, with the task vectors it was made of.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.inner import apply_inner
from adaptive_merge.transforms.matrices import QKV, RANK_TOLERANCE, average, check_qkv, pieces, svd

__all__ = ["FLAT", "SVC", "svc"]

FLAT: Final = 1e-4
"""Relative difference up to which leading singular values count as equal; float32 leaves about 1e-6 between them."""


class SVC(Transform):
    """Singular value calibration of Δ = scale · Σₜ of what `transform` returns; the rows sum to it at coefficient 1.

    The task vectors compared with are those of the bank that SVC is given. So what makes the merge goes inside
    (`SVC(TSVM(), scale=1.0, a=1.0)`) and not before it in the list of transforms.

    Args:
        transform: what makes the merge; default none, which is task arithmetic.
        scale: the equal coefficient of the merge that is calibrated. The result does not scale with it.
        a: least response that is counted, > 0. Published: 0.1 on task arithmetic, 0.2 on Iso-CTS, 1.0 on TSV-M.
        other: what is no matrix: `"merged"`, as published, stays as it is in the merge; `"mean"` becomes the mean of
            the task vectors, as in TSV-M and Iso-C.
        qkv: `"fused"` or `"split"`: Q, K and V as matrices of their own.
    """

    takes = "experts"
    joint = True
    published = 1.0

    def __init__(
        self,
        transform: Transform | None = None,
        scale: float = 0.3,
        a: float = 0.1,
        other: Literal["merged", "mean"] = "merged",
        qkv: QKV = "fused",
    ) -> None:
        if a <= 0:
            raise InputError(f"SVC divides by the least response a, which has to be above 0; got {a}")
        if other not in ("merged", "mean"):
            raise InputError(f"SVC leaves other tensors 'merged' or makes them the 'mean', got other {other!r}")
        self.transform, self.scale, self.a, self.other, self.qkv = transform, scale, a, other, check_qkv(qkv)

    @torch.no_grad()
    def __call__(self, bank: TaskVectors) -> TaskVectors:
        result = apply_inner(self.transform, bank).vectors
        for piece in pieces(bank.layout, self.qkv):
            parts = self.scale * result[:, piece.part].double().view(-1, *piece.shape)
            experts = bank.vectors[:, piece.part].double().view_as(parts)
            if piece.matrix and parts.any():
                parts = svc(parts, experts, self.a)
            elif not piece.matrix and self.other == "mean":
                parts = average(experts)
            result[:, piece.part] = parts.reshape(len(result), -1).to(result.dtype)
        return bank.with_vectors(result)


def svc(parts: Tensor, experts: Tensor, a: float) -> Tensor:
    """The parts [T, m, n] of a merge Δ = Σₜ partsₜ = U S Vᵀ such that they sum to U diag(γ) S Vᵀ.

    γᵣ = T / Σₜ max(a, sₜᵣ) with sₜᵣ = ⟨uᵣᵀΔ, uᵣᵀτₜ⟩ / ‖uᵣᵀτₜ‖² the response of expert t [T, m, n] along uᵣ, taken as 0
    where it has none. What lies outside the directions of Δ cancels in the sum and stays as it is.
    """
    merged = parts.sum(0)
    u, s = _directions(merged, experts.sum(0))
    shared, own = u.T @ merged, u.T @ experts
    power = own.square().sum(-1)
    response = torch.where(power > 0, (shared * own).sum(-1) / power, 0.0)
    gamma = 1 / response.clamp_min(a).mean(0)
    change = torch.where(s > RANK_TOLERANCE * s[0], gamma - 1, 0.0)
    return parts + (u * change) @ (u.T @ parts)


def _directions(merged: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """U and S of a merge, where leading values are equal along the directions of the summed experts.

    Iso makes them equal, and then every rotation of U is a left basis too: which one comes back would be the solver's
    choice, and γ differs between them. (A bfloat16 bank does not hold Iso well enough to see that they are equal.)
    """
    u, s, _ = svd(merged)
    flat = int((s > (1 - FLAT) * s[0]).sum())
    turn = svd(u[:, :flat].T @ experts)[0]
    return torch.cat([u[:, :flat] @ turn, u[:, flat:]], 1), s
