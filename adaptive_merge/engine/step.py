"""One adaptation step: how the losses of all tasks become one scalar whose backward reaches everything that learns.

`joint` builds one ordinary graph. `per_task` bounds the activations to those of one task: merged weights and all
other trainables are used as detached leaves, each task's loss is back-propagated at once into them, and the step
returns total + (dot − dot.detach()) with dot = Σ ⟨live, leaf.grad⟩. Its value is the loss; its single backward
hands every collected gradient to the live parameters, so that automatic optimisation, clipping and DDP work
unchanged and every trainable gets its gradient exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.objectives import Prediction

__all__ = ["Batch", "joint", "per_task"]

Batch = dict[str, dict[str, Tensor]]
LossOf = Callable[[str, Prediction], Tensor]


def joint(model: AdaptedModel, batch: Batch, loss_of: LossOf) -> Tensor:
    """All tasks' images in one forward of the shared tower; the merge is one node of the graph."""
    images = torch.cat([part["image"] for part in batch.values()])
    features = model.backbone(images).split([len(part["image"]) for part in batch.values()])
    return torch.stack([loss_of(task, model(task, None, features=part)) for task, part in zip(batch, features)]).sum()


def per_task(
    model: AdaptedModel,
    batch: Batch,
    loss_of: LossOf,
    features: Mapping[str, Tensor | None],
    blocks: bool = False,
) -> Tensor:
    """One task after the other: collect gradients in leaves, then inject them.

    Args:
        model: merged backbone, adapters and heads.
        batch: task → {"image", …}.
        loss_of: the loss of a task's prediction.
        features: task → features [B, d] of its batch, where a frozen tower has computed them before.
        blocks: whether the losses look at the tower's blocks.
    """
    backbone = model.backbone
    learns = backbone.coefficients.learns
    state = backbone.coefficients.state() if learns else ()
    weights = backbone.merge_leaves(state) if learns else backbone.merge()
    live = {
        f"adapters.{name}": parameter
        for name, parameter in model.adapters.named_parameters()
        if parameter.requires_grad
    }
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in live.items()}
    total = torch.zeros((), device=backbone.device)
    for task, part in batch.items():
        options: dict[str, Any] = {"weights": weights, "features": features.get(task), "blocks": blocks}
        call = (task, part["image"])
        loss = loss_of(task, functional_call(model, leaves, call, options) if leaves else model(*call, **options))
        loss.backward()
        total += loss.detach()
    # What no task used keeps no gradient at all, so that Adam leaves it alone, momentum included.
    terms = [(live[name] * leaf.grad).sum() for name, leaf in leaves.items() if leaf.grad is not None]
    if learns:
        terms.append(backbone.inject(state, [weight.grad for weight in weights.values()]))
    dot = torch.stack(terms).sum()
    return total + (dot - dot.detach())
