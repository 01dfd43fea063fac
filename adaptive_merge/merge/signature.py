"""Experts that were made unmergeable: attention out of line with the MLP of the same block."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["Locked", "locked_experts", "warn_of_locks"]

_log = logging.getLogger(__name__)
# Fine-tuning leaves a cosine above 0.9 with θ₀; rotated queries and keys leave one near 0. An expert of another
# pre-trained model is off everywhere, its MLP as well.
COSINE, TIMES = 0.7, 4.0


@dataclass(frozen=True)
class Locked:
    """The matrix of attention that is farthest out of line.

    Args:
        task: whose expert.
        name: of the parameter.
        ratio: ‖τ‖ / ‖θ₀‖ of it, of the queries, keys or values alone where they are fused.
        cosine: between θ₀ + τ and θ₀ there.
        mlp: the largest ‖τ‖ / ‖θ₀‖ among the other matrices of its block.
    """

    task: str
    name: str
    ratio: float
    cosine: float
    mlp: float

    def __str__(self) -> str:
        return (
            f"expert {self.task!r}: {self.name!r} is far from the pre-trained weights (‖τ‖/‖θ₀‖ {self.ratio:.2f}, "
            f"cosine {self.cosine:.2f}) while the MLP of its block is not ({self.mlp:.3f}). Weights that compute the "
            "same in another basis look like that (MergeLock): the expert works alone and spoils a merge. Ask its "
            "publisher for a version to merge, or leave the task out"
        )


@torch.no_grad()
def locked_experts(bank: TaskVectors) -> list[Locked]:
    """Experts whose attention, in some block, is out of line with its MLP; reads the blocks' matrices once.

    MergeLock (arXiv 2509.01548) multiplies queries and keys, and values and outputs, by matrices that cancel: the
    function stays, the weights leave the neighbourhood of θ₀ in which task vectors add up.
    """
    rows: dict[str, list[tuple[str, bool, Tensor, Tensor]]] = defaultdict(list)
    for name, shape, part, block in zip(bank.names, bank.layout.shapes, bank.layout.slices, bank.layout.blocks):
        if block and len(shape) == 2:
            cuts = 3 if name.endswith("in_proj_weight") and shape[0] % 3 == 0 else 1
            base, vectors = bank.pretrained[part].view(cuts, -1), bank.vectors[:, part].view(len(bank.tasks), cuts, -1)
            rows[block].append((name, "attn" in name or "attention" in name, *_compare(base, vectors.float())))
    deviations = [_worst(task, row, parts) for row, task in enumerate(bank.tasks) for parts in rows.values()]
    worst = {one.task: one for one in sorted(filter(None, deviations), key=lambda one: one.ratio)}
    return [worst[task] for task in bank.tasks if task in worst]


def warn_of_locks(bank: TaskVectors) -> None:
    """Say which experts of a bank look locked."""
    for locked in locked_experts(bank):
        _log.warning("%s", locked)


def _compare(base: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """‖τ‖ / ‖θ₀‖ and cos(θ₀ + τ, θ₀), [T, cuts] each, of θ₀ [cuts, n] and τ [T, cuts, n]."""
    norm = base.norm(dim=-1).clamp_min(1e-12)
    cosine = torch.cosine_similarity(base + vectors, base.expand_as(vectors), dim=-1)
    return vectors.norm(dim=-1) / norm, cosine


def _worst(task: str, row: int, parts: list[tuple[str, bool, Tensor, Tensor]]) -> Locked | None:
    mlp = max((float(ratio[row].max()) for _, attention, ratio, _ in parts if not attention), default=None)
    inside = [
        Locked(task, name, float(ratio), float(cosine), mlp)
        for name, attention, ratios, cosines in parts
        if attention and mlp is not None
        for ratio, cosine in zip(ratios[row], cosines[row])
        if cosine < COSINE and ratio > TIMES * mlp
    ]
    return max(inside, key=lambda one: one.ratio, default=None)
