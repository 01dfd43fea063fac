"""FeatCal and the compensated regression: targets from the experts' own paths, ridge to an anchor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.starts.base import Problem
from adaptive_merge.starts.engine import ClosedForm, Pair, View
from adaptive_merge.starts.sites import Layer, Seen, Site
from adaptive_merge.starts.systems import FeatCalSystem, NormSystem, RidgeSystem, System
from adaptive_merge.starts.tower import Block, Chain

__all__ = ["CompensatedRegression", "FeatCal"]


class CompensatedRegression(ClosedForm):
    """Layer by layer, the merged model is made to say what each expert says on its own path.

    Where a layer writes to the residual stream, its target is the expert's stream after it minus the merged stream
    before it, so that errors made earlier are made good. Ridge regression to the anchor, weight and bias at once:

        [Wᵀ; bᵀ] = (Σ_t C_t/n_t + λI)⁻¹ (Σ_t K_t/n_t + λ·A)

    Args:
        strength: λ, in units of the inputs' Grams, each of Frobenius norm 1.
        mixing: share of the target that is the expert's own path's; the rest is what the expert's layer says on the
            merged model's input. In [0, 1].
        compensation: share of the residual stream's error that is made good. In [0, 1].
        extrapolation: ρ; solutions are drawn to A = ρ·anchor + (1 − ρ)·θ₀.
        other_tokens: weight of the other tokens in the last block, after whose attention the class token alone
            reaches the features.
        norms: whether LayerNorms are solved as well.
        stem: whether convolutions before a transformer are solved as well.
        tail: whether the map from the class token to the features is solved.
    """

    views: ClassVar[tuple[View, ...]] = ("merged", "expert")
    layer_by_layer: ClassVar[bool] = True

    def __init__(
        self,
        strength: float = 0.05,
        mixing: float = 1.0,
        compensation: float = 1.0,
        extrapolation: float = 1.0,
        other_tokens: float = 0.01,
        norms: bool = False,
        stem: bool = False,
        tail: bool = True,
    ) -> None:
        _check(strength, mixing=mixing, compensation=compensation, other_tokens=other_tokens)
        self.strength, self.mixing, self.compensation = strength, mixing, compensation
        self.extrapolation, self.other_tokens = extrapolation, other_tokens
        self.norms, self.stem, self.tail = norms, stem, tail

    def pull(self, problem: Problem) -> Tensor:
        return _extrapolated(problem, self.extrapolation)

    def solves(self, site: Site, block: Block) -> bool:
        if site.kind == "norm":
            return self.norms
        if site.kind == "conv":
            return self.stem or not block.advances
        return self.tail or not _is_tail(block)

    def system(self, site: Site, anchor: Layer, pretrained: Layer) -> System:
        return (NormSystem if site.kind == "norm" else RidgeSystem)(anchor, self.strength)

    def pair(self, site: Site, seen: Mapping[View, Seen], expert: Layer) -> Pair:
        merged, own = seen["merged"], seen["expert"]
        x, y = site.rows_of(merged.x, expert.weight.shape[-1]), site.outputs_of(own.y)
        if site.stream and self.compensation:
            lost = site.outputs_of(_lost(merged, own))
            y = y + self.compensation * lost
        if self.mixing < 1:
            y = self.mixing * y + (1 - self.mixing) * _apply(site, expert, x)
        return Pair(x, y)


class FeatCal(ClosedForm):
    """FeatCal (arXiv 2605.13030, egangu/featcal 18c68b6): block by block, with mixed targets and LayerNorms.

    The patch and positional embeddings and what follows the last block stay as in the anchor.

    Args:
        strength: λ.
        mixing: α, share of the expert's own path in the targets; in [0, 1].
        extrapolation: ρ; solutions are drawn to ρ·anchor + (1 − ρ)·θ₀. The paper's 2 to 2.2 are for task arithmetic
            of .3; for an anchor that is as large as it should be, about 1.
        other_tokens: weight of the other tokens in the last block, except for keys and values.
    """

    views: ClassVar[tuple[View, ...]] = ("merged", "expert")

    def __init__(
        self, strength: float = 0.05, mixing: float = 0.25, extrapolation: float = 1.0, other_tokens: float = 0.01
    ) -> None:
        _check(strength, mixing=mixing, other_tokens=other_tokens)
        self.strength, self.mixing, self.extrapolation = strength, mixing, extrapolation
        self.other_tokens = other_tokens

    def pull(self, problem: Problem) -> Tensor:
        return _extrapolated(problem, self.extrapolation)

    def solves(self, site: Site, block: Block) -> bool:
        return not _is_tail(block) and (site.kind == "norm" or super().solves(site, block))

    def system(self, site: Site, anchor: Layer, pretrained: Layer) -> System:
        return (NormSystem if site.kind == "norm" else FeatCalSystem)(anchor, self.strength)

    def pair(self, site: Site, seen: Mapping[View, Seen], expert: Layer) -> Pair:
        x = site.rows_of(seen["merged"].x, expert.weight.shape[-1])
        own, mixing = site.outputs_of(seen["expert"].y), 0.0 if site.kind == "norm" else self.mixing
        return Pair(x, mixing * own + (1 - mixing) * _apply(site, expert, x))


def _extrapolated(problem: Problem, share: float) -> Tensor:
    """share·anchor + (1 − share)·θ₀ [P]."""
    if share == 1:
        return problem.anchor
    return torch.lerp(problem.experts.pretrained.to(problem.anchor.device), problem.anchor, share)


def _lost(merged: Seen, own: Seen) -> Tensor:
    """What the merged stream lacks before a layer that writes to it, in units of the layer's output."""
    scale = merged.scale.abs().clamp_min(1e-12).copysign(merged.scale)
    return (own.before - merged.before + (own.scale - merged.scale) * own.y) / scale


def _apply(site: Site, layer: Layer, x: Tensor) -> Tensor:
    """A layer on inputs [n, in]."""
    if site.kind == "norm":
        return x * layer.weight + layer.shift
    return F.linear(x, *layer)


def _is_tail(block: Block) -> bool:
    """Whether a block of a transformer is what follows the last one: it has no map that writes to a stream."""
    return isinstance(block, Chain) and not any(site.stream for sites in block.sites for site in sites)


def _check(strength: float, **shares: float) -> None:
    if not strength > 0:
        raise InputError(f"`strength` is the weight of the anchor and above 0, got {strength}")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise InputError(f"`{name}` is a share between 0 and 1, got {value}")
