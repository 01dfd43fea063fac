"""E-WEMoE: WEMoE with one router for all blocks and pruned task vectors (Shen et al., 2024, arXiv 2410.21804)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_merge.adapters.wemoe import WEMoE
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["EWEMoE"]


class EWEMoE(WEMoE):
    """Of each tensor of a task vector, the entries of largest magnitude; one router, asked before each MLP.

    The entries are kept with their places, 8 bytes each, instead of the bank's rows. The merge below the router stays
    that of whole task vectors, which costs nothing; the published code prunes them there as well.

    Args:
        density: share of the entries that is kept, in (0, 1]. Published: 0.1, and 0.01 at a loss of 2 points.
        hidden: width of the router; None: that of the tower.
    """

    shared = True

    def __init__(self, density: float = 0.1, hidden: int | None = None) -> None:
        super().__init__(hidden)
        if not 0 < density <= 1:
            raise InputError(f"the density of a pruned task vector lies in (0, 1], got {density}")
        self.density = density

    def freeze(self, backbone: MergedBackbone) -> dict[str, Tensor]:
        bank = backbone.task_vectors
        frozen: dict[str, Tensor] = {}
        for name in (name for layer in self.layers for name in (layer.weight, layer.bias) if name):
            vectors = bank.of(name).flatten(1)
            places = vectors.abs().topk(max(round(self.density * vectors.shape[1]), 1), 1).indices
            frozen |= {f"{name}.values": vectors.gather(1, places), f"{name}.places": places.int()}
        return frozen

    def tensors(self, bank: TaskVectors) -> dict[str, Tensor]:
        return self.frozen

    def vectors(self, name: str, bank: TaskVectors) -> Tensor:
        values, places = self.frozen[f"{name}.values"], self.frozen[f"{name}.places"]
        shape = bank.layout.shapes[bank.names.index(name)]
        flat = torch.zeros(len(values), bank.of(name)[0].numel(), dtype=values.dtype, device=values.device)
        return flat.scatter(1, places.long(), values).view(-1, *shape)
