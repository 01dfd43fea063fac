"""MASS: a first look at the image chooses experts for the second (Crisostomi et al., 2025). Nothing is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_merge.adapters.low_rank import LowRankRoute, pretrained
from adaptive_merge.adapters.route import Layer, as_tokens
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["MASS"]


class MASS(LowRankRoute):
    """The merge looks first; the experts whose directions explain the class token best join it for a second look.

    At the first linear layer of each chosen block, the residual of task t is rₜ = ‖x − Vₜ Vₜᵀ x‖ of the class token x.
    Residuals are averaged over blocks, standardised over tasks, and s = softmax(−r / temperature). Tasks of s above
    `threshold`, the best `most` of them, or else the best, count; their scores are divided by their sum, g. The second
    look has θ₀ + Σₜ gₜ Uₜ Sₜ Vₜᵀ in the matrices of the blocks, of task vectors before transforms, and the merge in all
    else: two forwards an image.

    Published over TSV-M, that is with the transform `TSVM` and coefficients `Fixed(1.0)`. There the task vectors that
    join are made orthogonal to one another before they are added at 1; here their weighted mean is taken.

    Args:
        blocks: numbers of the chosen blocks; None: the one at three quarters of the depth (9 of 12).
        rank: share of a matrix's singular values that an expert has; None: 1/T, as in TSV-M.
        threshold: that a score is above, in [0, 1).
        most: tasks that join, at least 1.
        temperature: of the scores, above 0.
    """

    def __init__(
        self,
        blocks: Sequence[int] | None = None,
        rank: float | None = None,
        threshold: float = 0.2,
        most: int = 3,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= threshold < 1 or most < 1 or temperature <= 0 or not (rank is None or 0 < rank <= 1):
            raise InputError(
                "MASS needs a threshold in [0, 1), most of at least 1, a temperature above 0 and a rank in (0, 1]; got "
                f"{threshold}, {most}, {temperature} and {rank}"
            )
        self.blocks = None if blocks is None else list(blocks)
        self.rank, self.threshold, self.most, self.temperature = rank, threshold, most, temperature

    def place(self, backbone: MergedBackbone) -> None:
        super().place(backbone)
        depth = len(backbone.blocks)
        chosen = [3 * depth // 4] if self.blocks is None else self.blocks
        if not chosen or not all(0 <= number < depth for number in chosen):
            raise InputError(f"MASS looks at blocks 0 to {depth - 1} of this backbone, at least one; got {chosen}")
        linear = [layer for layer in self.layers if not layer.attention]
        self.looked = [next(one for one in linear if one.block == backbone.blocks[number]) for number in chosen]

    def own(self, backbone: MergedBackbone, merged: Mapping[str, Tensor], name: str) -> Tensor:
        return backbone.experts.of(name).double()

    def freeze(self, backbone: MergedBackbone) -> dict[str, Tensor]:
        names = [name for layer in self.layers for name in (layer.weight, layer.bias) if name]
        return super().freeze(backbone) | {f"{name}.start": pretrained(backbone, name) for name in names}

    def weights(self, task: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        starts = {name: value for name, value in self.frozen.items() if name.endswith(".start")}
        return {**weights, **{name.removesuffix(".start"): value for name, value in starts.items()}}

    def kept(self, full: int) -> int:
        return int(full * (1 / len(self.tasks) if self.rank is None else self.rank))

    @torch.no_grad()
    def look(self, backbone: MergedBackbone, images: Tensor, weights: Mapping[str, Tensor]) -> None:
        residuals: list[Tensor] = []
        backbone(images, weights, [(layer.site, partial(self._residual, layer, residuals)) for layer in self.looked])
        mean = torch.stack(residuals).mean(0)
        standard = (mean - mean.mean(1, keepdim=True)) / (mean.std(1, keepdim=True, correction=0) + 1e-6)
        self.shares = (-standard / self.temperature).softmax(-1)
        best = self.shares.topk(min(self.most, len(self.tasks)), -1)
        counts = best.values > self.threshold
        counts[:, 0] = True
        chosen = best.values * counts
        self.joined = torch.zeros_like(self.shares).scatter(-1, best.indices, chosen / chosen.sum(-1, keepdim=True))

    def _residual(self, layer: Layer, residuals: list[Tensor], tokens: Tensor, output: Any) -> Any:
        x, right = as_tokens(tokens)[:, 0].float(), self.frozen[f"{layer.weight}.right"]
        parts = torch.einsum("bi,tki->btk", x, right)
        residuals.append((x[:, None] - torch.einsum("btk,tki->bti", parts, right)).norm(dim=-1))
        return output

    def gates(self, layer: Layer, tokens: Tensor) -> Tensor:
        return self.joined[:, None]

    def scores(self) -> Tensor:
        """s of the first look."""
        return self.shares
