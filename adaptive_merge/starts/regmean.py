"""RegMean, RegMean++ and LOT: Gram matrices of the inputs weigh the experts' layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.starts.base import Problem, mean_of_experts
from adaptive_merge.starts.engine import ClosedForm, Pair, View
from adaptive_merge.starts.sites import Layer, Seen, Site
from adaptive_merge.starts.systems import GramSystem, ScaleSystem, System
from adaptive_merge.starts.tower import Block

__all__ = ["LOT", "RegMean", "RegMeanPP"]


class RegMean(ClosedForm):
    """RegMean (arXiv 2212.09849): Wᵀ = (Σ_t G̃_t)⁻¹ Σ_t G̃_t W_tᵀ over the inputs in each expert; the rest is averaged.

    Args:
        shrink: what off-diagonal entries of the Grams are multiplied by, in [0, 1]; published for vision: .9 to 1.
    """

    views: ClassVar[tuple[View, ...]] = ("expert",)

    def __init__(self, shrink: float = 0.95) -> None:
        if not 0 <= shrink <= 1:
            raise InputError(f"`shrink` multiplies off-diagonal entries and lies between 0 and 1, got {shrink}")
        self.shrink = shrink

    def initial(self, problem: Problem) -> Tensor:
        return mean_of_experts(problem.experts)

    def system(self, site: Site, anchor: Layer, pretrained: Layer) -> System:
        return GramSystem(anchor, self.shrink)

    def outputs(self, site: Site, expert: Layer) -> int:
        return 0  # the targets follow from the Gram

    def pair(self, site: Site, seen: Mapping[View, Seen], expert: Layer) -> Pair:
        x = site.rows_of(seen[self.views[0]].x, expert.weight.shape[-1])
        return Pair(x, x[:, :0])


class RegMeanPP(RegMean):
    """RegMean++: as RegMean, but each expert's block is run on what comes through the merged blocks before it.

    As fusion_bench 54c9e8c has it, except that what follows the last block is merged too, where that leaves the
    last norm at θ₀.

    Args:
        shrink: as for `RegMean`.
    """

    views: ClassVar[tuple[View, ...]] = ("crossed",)


class LOT(ClosedForm):
    """LOT (NeurIPS 2025): RegMean of task vectors with a pseudo-inverse, τ = (Σ_t X_tᵀX_t)⁺ Σ_t X_tᵀX_t τ_t.

    Scales of norms are averaged with E[z²] as weights, all else plainly.

    Args:
        scale: what the merged task vector is multiplied by; published: 1.2 for ViT-B/32, 1.5 for ViT-L/14.
    """

    views: ClassVar[tuple[View, ...]] = ("expert",)

    def __init__(self, scale: float = 1.2) -> None:
        if not scale > 0:
            raise InputError(f"`scale` multiplies the merged task vector and is above 0, got {scale}")
        self.scale = scale

    def initial(self, problem: Problem) -> Tensor:
        return mean_of_experts(problem.experts, self.scale)

    def solves(self, site: Site, block: Block) -> bool:
        return site.kind == "norm" or super().solves(site, block)

    def system(self, site: Site, anchor: Layer, pretrained: Layer) -> System:
        if site.kind == "norm":
            return ScaleSystem(pretrained, self.scale)
        return GramSystem(anchor, base=pretrained, pseudo=True, scale=self.scale)

    def outputs(self, site: Site, expert: Layer) -> int:
        return len(expert.weight) if site.kind == "norm" else 0

    def pair(self, site: Site, seen: Mapping[View, Seen], expert: Layer) -> Pair:
        x = site.rows_of(seen["expert"].x, expert.weight.shape[-1])
        return Pair(x, x if site.kind == "norm" else x[:, :0])
