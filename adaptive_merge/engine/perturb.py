"""Images under a task's universal perturbation, which is first moved one step against the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.schedule import Stage

__all__ = ["check_share", "perturbed"]


def check_share(stages: Sequence[Stage], owns: bool) -> None:
    """InputError where processes own tasks, and a perturbation would be known to its owner alone."""
    if owns and any(stage.objective.perturbs for stage in stages):
        raise InputError(
            "the perturbations of an adversarial objective are learned by all processes together; set data.share to "
            "samples"
        )


def perturbed(
    task: str,
    images: Tensor,
    clean: Prediction,
    backbone: MergedBackbone,
    objective: Objective,
    logits: Callable[[Tensor], Tensor],
    average: Callable[[Tensor], Tensor],
) -> Tensor:
    """Logits [U, C] under the perturbation δ after its step; differentiable in what the model learns.

    Args:
        task: whose images.
        images: [B, 3, H, W], uint8 or normalised.
        clean: what the model says about them, which is what the step turns against.
        backbone: says how images are normalised.
        objective: keeps δ, see `Objective.perturbation`.
        logits: the model, images → logits.
        average: a mean over this process's images as one over all of them.
    """
    pixels = backbone.normalise(images).float()
    low, high = (backbone.normalise(torch.full_like(images[:1], value)) for value in (0, 255))
    bounded = images.dtype == torch.uint8  # of other images nobody knows the range

    def shifted(delta: Tensor) -> Tensor:
        moved = pixels + delta
        if not bounded:
            return moved
        # Releases of torch differ in what `clamp` passes at its ends, where most pixels of a black ground lie.
        return torch.where((moved >= low) & (moved <= high), moved, moved.detach().clamp(low, high))

    delta = objective.perturbation(task, pixels).clone().requires_grad_()
    losses = F.cross_entropy(logits(shifted(delta)), clean.logits.detach().argmax(-1), reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum() / max(len(losses), 1), delta)
    objective.ascend(task, average(gradient))
    return logits(shifted(objective.perturbation(task, pixels)))
