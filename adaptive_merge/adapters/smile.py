"""SMILE: a token goes to the expert whose directions it lies in (Tang et al., arXiv 2408.10174). Nothing is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_merge.adapters.low_rank import LowRankRoute
from adaptive_merge.adapters.route import Layer
from adaptive_merge.errors import InputError

__all__ = ["SMILE"]


class SMILE(LowRankRoute):
    """At each matrix of each block, g = softmax over tasks of ‖Vₜᵀ x‖, of which the largest `top` count.

    As in the published code: V has `gate_rank` right singular vectors of θₜ − θ, the expert has `rank`, and the gates
    that count are divided by their sum. Unlike there, the queries, keys and values of open_clip are one matrix with one
    gate. Published over θ₀, with coefficients `Fixed(0.0)`.

    The task of an image is that of the largest gate, averaged over its tokens and all matrices.

    Args:
        rank: singular values of an expert's matrix, at most all. Published with ViT-B/32: 32.
        gate_rank: of them, those that the gate looks at. Published: 16.
        top: experts of a token. Published: 1.
    """

    def __init__(self, rank: int = 32, gate_rank: int = 16, top: int = 1) -> None:
        super().__init__()
        if not 1 <= gate_rank <= rank or top < 1:
            raise InputError(
                f"SMILE needs 1 ≤ gate_rank ≤ rank and top of at least 1, got rank {rank}, gate_rank {gate_rank} and "
                f"top {top}"
            )
        self.rank, self.gate_rank, self.top = rank, gate_rank, top

    def kept(self, full: int) -> int:
        return min(self.rank, full)

    def gates(self, layer: Layer, tokens: Tensor) -> Tensor:
        right = self.frozen[f"{layer.weight}.right"][:, : self.gate_rank]
        norms = (tokens.float() @ right.flatten(0, 1).mT).unflatten(-1, right.shape[:2]).norm(dim=-1)
        shares = norms.softmax(-1)
        self.seen.append(shares.mean(1))
        best = shares.topk(min(self.top, len(self.tasks)), -1)
        chosen = best.values / best.values.sum(-1, keepdim=True)
        return torch.zeros_like(shares).scatter(-1, best.indices, chosen)
