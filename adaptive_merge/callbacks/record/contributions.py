"""What each layer's share of a merge is worth to each task, without labels."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor

from adaptive_merge.merge.layout import Layout

__all__ = ["OUTSIDE", "contributions", "layers_of"]

OUTSIDE = "outside the blocks"


def layers_of(layout: Layout) -> dict[str, list[str]]:
    """Layer → its parameters: the repeated blocks in order, and whatever lies outside them."""
    layers: dict[str, list[str]] = {}
    for name, block in zip(layout.names, layout.blocks):
        layers.setdefault(block or OUTSIDE, []).append(name)
    return layers


@torch.no_grad()
def contributions(module: pl.LightningModule, merged: Mapping[str, Tensor], images: Mapping[str, Tensor]) -> Tensor:
    """Agreement with each task's expert that is lost when a layer goes back to θ₀, [L, T]; NaN of tasks without images.

    Below 0, the task would be served better without the layer's share. The removal half of Hi-Merging's contributions
    (ACL 2025), with agreement in place of labelled scores, and of the whole merge, since not every rule has a share
    for each task. It costs L + 2 forwards of the images.

    Args:
        module: an `AdaptiveMerge`, whose adapters and heads are used.
        merged: name → parameter of its merge; what is tried is put back.
        images: task → unlabelled images [n, …].
    """
    layers, experts = layers_of(module.experts.layout), module.experts
    base = experts.layout.unflatten(experts.pretrained)
    result = torch.full((len(layers), len(experts.tasks)), float("nan"))
    for column, task in enumerate(experts.tasks):
        if task not in images or not len(images[task]):
            continue
        predict = module.model.heads[task].predict
        expert = module.views.weights("individual", task)
        target = predict(module.model(task, images[task], expert, adapted=False).logits)
        trials = [{}, *({name: base[name].to(module.device) for name in names} for names in layers.values())]
        rows = [predict(module.model(task, images[task], dict(merged) | trial).logits) == target for trial in trials]
        whole, *without = (row.float().mean() for row in rows)
        result[:, column] = torch.stack([whole - rest for rest in without])
    return result
