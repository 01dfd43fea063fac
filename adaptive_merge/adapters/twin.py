"""Twin-Merging: shared knowledge, and each expert's own in a few directions (Lu et al., NeurIPS 2024).

θ(x) = θ + Σₜ wₜ(x) LR(θₜ − θ) with w = softmax of a router on what the shared model makes of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_merge.adapters.low_rank import LowRankRoute
from adaptive_merge.adapters.route import Layer, mean_token
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["Twin"]


class Twin(LowRankRoute):
    """A router on the mean token after the shared model's last block weighs low-rank experts for a second forward.

    Train it with the objective `Stream`: from which task's stream an image came, which needs no label. The published
    router learns the same from labelled sets, through batch normalisation and dropout; here it has neither, so that an
    image's gates depend on the image alone.

    Args:
        rank: share of a matrix's singular values that an expert keeps, in (0, 1]. Published: 0.1.
        hidden: width of the router.
    """

    def __init__(self, rank: float = 0.1, hidden: int = 256) -> None:
        super().__init__()
        if not 0 < rank <= 1 or hidden < 1:
            raise InputError(f"Twin needs a rank in (0, 1] and a hidden width of at least 1, got {rank} and {hidden}")
        self.rank, self.hidden = rank, hidden

    def place(self, backbone: MergedBackbone) -> None:
        super().place(backbone)
        width = backbone.block_width()
        layers = (nn.LayerNorm(width), nn.Linear(width, self.hidden), nn.LeakyReLU())
        self.router = nn.Sequential(*layers, nn.Linear(self.hidden, len(self.tasks)))

    def kept(self, full: int) -> int:
        return round(full * self.rank)

    def look(self, backbone: MergedBackbone, images: Tensor, weights: Mapping[str, Tensor]) -> None:
        means: list[Tensor] = []

        def note(_: Any, output: Any) -> Any:
            means.append(mean_token(output))
            return output

        with torch.no_grad():
            backbone(images, weights, [(backbone.blocks[-1], note)])
        self.logits_of_tasks = self.router(means[0])

    def gates(self, layer: Layer, tokens: Tensor) -> Tensor:
        return self.logits_of_tasks.softmax(-1)[:, None]

    def scores(self) -> Tensor:
        """The router's log-probabilities."""
        return self.logits_of_tasks.log_softmax(-1)
