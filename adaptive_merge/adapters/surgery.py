"""Representation surgery: small per-task adapters that pull merged features back to the expert's.

z′ = z − U·ReLU(D z), without biases. D starts Kaiming-uniform (a = √5), U at zero, so surgery starts as the
identity, and D gets no gradient in the very first update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adaptive_merge.adapters.base import Adapter
from adaptive_merge.adapters.heads import Head
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["BlockSurgery", "FeatureSurgery", "surgery"]


def surgery(z: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """z − U·ReLU(D z) for z [..., d], D [r, d], U [d, r]."""
    return z - (z @ down.T).relu() @ up.T


class FeatureSurgery(Adapter):
    """One adapter per task on the backbone's features (Yang et al., "Representation Surgery", ICML 2024, eq. 5).

    Where a head takes several tokens of an image, it is on each of them.

    Args:
        rank: r, at least 1 and at most the feature width d. Published: 16.
    """

    def __init__(self, rank: int = 16) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"a surgery rank must be at least 1, got {rank}")
        self.rank = rank

    def create(self, backbone: MergedBackbone, heads: Mapping[str, Head]) -> None:
        tokens = {heads[task].tokens for task in self.tasks}
        if len(tokens) > 1:
            raise InputError(f"surgery needs features of equally many tokens in all tasks; the heads have {tokens}")
        self.tokens = tokens.pop()
        self.down, self.up = _pairs(len(self.tasks), self.rank, heads[self.tasks[0]].width // self.tokens)

    def features(self, task: str, features: Tensor) -> Tensor:
        row = self.row(task)
        tokens = features.unflatten(-1, (self.tokens, -1))
        return surgery(tokens, self.down[row], self.up[row]).flatten(-2)

    def fold(self, task: str, weights: Mapping[str, Tensor], head: Head) -> tuple[Mapping[str, Tensor], Head]:
        """Only where every U is 0: then surgery is the identity."""
        if any(bool(up.any()) for up in self._ups(self.row(task))):
            name = f"{type(self).__name__} of rank {self.rank}"
            raise InputError(f"{name} has a ReLU between its two matrices, which no layer of the tower has")
        return weights, head

    def _ups(self, row: int) -> list[Tensor]:
        return [self.up[row]]


class BlockSurgery(FeatureSurgery):
    """An adapter after every block on every token, and one on the features (Yang et al., "SurgeryV2", 2024).

    Depth and width come from the backbone, its blocks by their names or by `AdaptiveMerge(blocks=…)`: ViT-B and ViT-L
    work alike. Published: rank 16 for ViT-B, 4 for L.

    Args:
        rank: r of every adapter.
    """

    def create(self, backbone: MergedBackbone, heads: Mapping[str, Head]) -> None:
        super().create(backbone, heads)
        self.depth = len(backbone.blocks)
        width = backbone.block_width()
        self.block_down, self.block_up = _pairs(len(self.tasks) * self.depth, self.rank, width)

    def block(self, task: str, index: int, tokens: Tensor) -> Tensor:
        row = self.row(task) * self.depth + index
        return surgery(tokens, self.block_down[row], self.block_up[row])

    def _ups(self, row: int) -> list[Tensor]:
        blocks = range(row * self.depth, (row + 1) * self.depth)
        return [self.up[row], *(self.block_up[place] for place in blocks)]


def _pairs(count: int, rank: int, width: int) -> tuple[nn.ParameterList, nn.ParameterList]:
    if rank > width:
        raise InputError(
            f"a surgery rank of {rank} is larger than the {width} features it works on; choose at most {width}"
        )
    down = nn.ParameterList(nn.Parameter(torch.empty(rank, width)) for _ in range(count))
    for matrix in down:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return down, nn.ParameterList(nn.Parameter(torch.zeros(width, rank)) for _ in range(count))
