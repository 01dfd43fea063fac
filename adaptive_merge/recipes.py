"""Named constructors: each published method as the choice of parts that it is.

Every one takes the bank, the backbone and the heads, and gives an `AdaptiveMerge` for `trainer.fit` or, where
nothing learns, for `trainer.validate` and `merged_state_dict()`. Their YAML twins are in `configs/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from adaptive_merge.adapters.heads import HeadLike
from adaptive_merge.adapters.surgery import BlockSurgery, FeatureSurgery
from adaptive_merge.adapters.tint import Tint
from adaptive_merge.coefficients.linear import BlockWise, Bounds, Coefficients, Fixed, LayerWise, TaskWise
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.objectives.functional import Distance
from adaptive_merge.objectives.taught import FeatureDistance, PseudoLabel
from adaptive_merge.transforms.ties import Ties

__all__ = [
    "AdaMerging",
    "AdaMergingPP",
    "Surgery",
    "SurgeryV2",
    "TaskArithmetic",
    "TiesMerging",
    "Tinting",
    "TintingPP",
    "WeightAveraging",
]

Heads = Mapping[str, HeadLike]
Granularity = Literal["task", "layer", "block"]


def WeightAveraging(task_vectors: TaskVectors, backbone: nn.Module, heads: Heads) -> AdaptiveMerge:
    """The mean of the experts: every coefficient 1/T."""
    return AdaptiveMerge(task_vectors, backbone, heads, recipe="weight_averaging", coefficients=Fixed("average"))


def TaskArithmetic(task_vectors: TaskVectors, backbone: nn.Module, heads: Heads, scale: float = 0.3) -> AdaptiveMerge:
    """θ₀ + scale · Σ τ (Ilharco et al., ICLR 2023)."""
    return AdaptiveMerge(task_vectors, backbone, heads, recipe="task_arithmetic", coefficients=Fixed(scale))


def TiesMerging(
    task_vectors: TaskVectors,
    backbone: nn.Module,
    heads: Heads,
    scale: float = 0.3,
    density: float = 0.2,
    counted_over: int | None = None,
    reduce: Literal["sum", "mean"] = "sum",
) -> AdaptiveMerge:
    """Trim, elect a sign, merge what agrees (Yadav et al., NeurIPS 2023); arguments as for `Ties`."""
    transforms = (Ties(density, counted_over, reduce),)
    return AdaptiveMerge(task_vectors, backbone, heads, recipe="ties", transforms=transforms, coefficients=Fixed(scale))


def AdaMerging(
    task_vectors: TaskVectors,
    backbone: nn.Module,
    heads: Heads,
    granularity: Granularity = "layer",
    init: float = 0.3,
    bounds: Bounds = "clamp",
    **settings: Any,
) -> AdaptiveMerge:
    """Learn the coefficients by entropy minimisation (Yang et al., ICLR 2024).

    Args:
        task_vectors, backbone, heads: what is merged.
        granularity: one coefficient per task and: model (`"task"`), parameter tensor (`"layer"`), block.
        init: start value.
        bounds: see `Coefficients`.
        settings: further arguments of `AdaptiveMerge`, such as `lr`.
    """
    coefficients = _coefficients(granularity, init, bounds)
    settings = {"recipe": f"adamerging_{granularity}"} | settings
    return AdaptiveMerge(task_vectors, backbone, heads, coefficients=coefficients, **settings)


def AdaMergingPP(
    task_vectors: TaskVectors,
    backbone: nn.Module,
    heads: Heads,
    granularity: Granularity = "layer",
    init: float = 0.3,
    bounds: Bounds = "clamp",
    density: float = 0.2,
    counted_over: int | None = None,
    **settings: Any,
) -> AdaptiveMerge:
    """AdaMerging++: AdaMerging over TIES task vectors; arguments as for `AdaMerging` and `Ties`."""
    settings = {"recipe": f"adamerging_pp_{granularity}", "transforms": (Ties(density, counted_over),)} | settings
    return AdaMerging(task_vectors, backbone, heads, granularity, init, bounds, **settings)


def Surgery(
    task_vectors: TaskVectors,
    backbone: nn.Module,
    heads: Heads,
    rank: int = 16,
    kind: Distance = "l1",
    coefficients: Coefficients | None = None,
    **settings: Any,
) -> AdaptiveMerge:
    """Representation Surgery (Yang et al., ICML 2024): feature adapters on a frozen merge.

    Args:
        task_vectors, backbone, heads: what is merged.
        rank: of each adapter.
        kind: distance to the expert's features.
        coefficients: the merge; default task arithmetic, `Fixed(0.3)`. Adapted ones: `LayerWise(init="runs/…",
            trainable=False)`.
        settings: further arguments of `AdaptiveMerge`.
    """
    settings = {"recipe": "surgery", "adapters": [FeatureSurgery(rank)], "objective": FeatureDistance(kind)} | settings
    return AdaptiveMerge(task_vectors, backbone, heads, coefficients=coefficients or Fixed(0.3), **settings)


def SurgeryV2(
    task_vectors: TaskVectors,
    backbone: nn.Module,
    heads: Heads,
    rank: int = 16,
    coefficients: Coefficients | None = None,
    **settings: Any,
) -> AdaptiveMerge:
    """SurgeryV2 (Yang et al., 2024): adapters after every block as well; arguments as for `Surgery`."""
    parts = {"adapters": [BlockSurgery(rank)], "objective": FeatureDistance(blocks=True)}
    settings = {"recipe": "surgery_v2"} | parts | settings
    return AdaptiveMerge(task_vectors, backbone, heads, coefficients=coefficients or Fixed(0.3), **settings)


def Tinting(
    task_vectors: TaskVectors,
    backbone: nn.Module,
    heads: Heads,
    layer: str = "head",
    init: float = 0.3,
    bounds: Bounds = "clamp",
    confident: bool = False,
    lr: float = 1e-2,
    **settings: Any,
) -> AdaptiveMerge:
    """Model Tinting (Jung et al., 2024): coefficients and one per-task layer, taught by the experts' labels.

    Args:
        task_vectors, backbone, heads: what is merged.
        layer: `"head"` or a backbone parameter, see `Tint`.
        init, bounds: of the layer-wise coefficients. Published for 14 and 20 tasks: init 0.1.
        confident: the confidence filter of Tinting++.
        lr: of coefficients and tints alike, as published; `adapter_lr` sets the tints' apart.
        settings: further arguments of `AdaptiveMerge`.
    """
    parts = {"adapters": [Tint(layer)], "objective": PseudoLabel(confident=confident), "lr": lr}
    settings = {"recipe": "tinting_pp" if confident else "tinting"} | parts | settings
    return AdaptiveMerge(task_vectors, backbone, heads, coefficients=LayerWise(init, bounds), **settings)


def TintingPP(task_vectors: TaskVectors, backbone: nn.Module, heads: Heads, **settings: Any) -> AdaptiveMerge:
    """Tinting++: Tinting with the confidence filter; arguments as for `Tinting`. SyMerge is the same recipe."""
    return Tinting(task_vectors, backbone, heads, confident=True, **settings)


def _coefficients(granularity: str, init: float, bounds: Bounds) -> Coefficients:
    kinds = {"task": TaskWise, "layer": LayerWise, "block": BlockWise}
    if granularity not in kinds:
        raise InputError(f"unknown granularity {granularity!r}; choose {', '.join(map(repr, kinds))}")
    return kinds[granularity](init=init, bounds=bounds)
