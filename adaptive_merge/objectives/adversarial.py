"""DAM's adversarial term: certain predictions also under a perturbation that is the same for all images of a task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.objectives.certainty import Entropy
from adaptive_merge.objectives.functional import entropy

__all__ = ["Adversarial"]


class Adversarial(Objective):
    """ℓ(x) + weight · H(x + δₜ), where δₜ is learned against the model: the adversarial term of DAM (ICLR 2025).

    Before each step, one step of Adam moves δₜ, from 0, to raise the cross-entropy of the merge on x + δₜ against what
    it says of x. A trigger is such a perturbation: what no perturbation can turn, no trigger can. The published code
    clamps normalised pixels to [0, 1], which cuts off most of an image; here x + δₜ stays in the range that pixels have
    after normalisation. It costs two more forwards and backwards of the images, one task after the other.

    Args:
        objective: ℓ; default `Entropy()`.
        weight: of the entropy under the perturbation. At 0 nothing is perturbed, and ℓ alone is asked for.
        lr: of the perturbations' Adam, in units of normalised pixels.
    """

    def __init__(self, objective: Objective | None = None, weight: float = 0.1, lr: float = 1e-4) -> None:
        if not 0 <= weight < math.inf or not 0 < lr < math.inf:
            raise InputError(f"Adversarial needs a weight of at least 0 and lr above 0, got {weight} and {lr}")
        self.objective, self.weight, self.lr = objective or Entropy(), weight, lr
        self.perturbs = weight > 0
        for name in ("needs_expert", "needs_blocks", "filters", "smooth_maximum"):
            if hasattr(self.objective, name):
                setattr(self, name, getattr(self.objective, name))
        self._adams: dict[str, torch.optim.Adam] = {}

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        losses = self.objective.losses(prediction, expert)
        if prediction.perturbed is None:
            return losses
        return losses + self.weight * entropy(prediction.perturbed)

    def keep(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return self.objective.keep(prediction, expert)

    def statistics(self, prediction: Prediction, expert: Prediction | None) -> Tensor | None:
        return self.objective.statistics(prediction, expert)

    def perturbation(self, task: str, like: Tensor) -> Tensor:
        """δ of a task, [3, H, W], for images [B, 3, H, W]; zeros before its first step."""
        delta = self._delta(task)
        if delta is None:
            return torch.zeros(like.shape[1:], device=like.device)
        if delta.device != like.device:  # it was read from a checkpoint
            self._restore(task, {name: value.to(like.device) for name, value in self._values(task).items()})
        return delta.to(like.device)

    def ascend(self, task: str, gradient: Tensor) -> None:
        """One step of Adam up the gradient [3, H, W], which is the mean over all processes."""
        if self._delta(task) is None:
            self._adams[task] = self._adam(torch.zeros_like(gradient))
        adam = self._adams[task]
        adam.param_groups[0]["params"][0].grad = gradient
        adam.step()
        adam.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {task: self._values(task) for task in self._adams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._adams = {}
        for task, values in state.items():
            self._restore(task, values)

    def _delta(self, task: str) -> Tensor | None:
        return self._adams[task].param_groups[0]["params"][0].detach() if task in self._adams else None

    def _adam(self, delta: Tensor) -> torch.optim.Adam:
        return torch.optim.Adam([delta.requires_grad_()], lr=self.lr, maximize=True)

    def _values(self, task: str) -> dict[str, Tensor]:
        """δ, the moments and the number of steps."""
        adam = self._adams[task]
        return {
            "delta": adam.param_groups[0]["params"][0].detach().clone(),
            **{name: value.clone() for name, value in adam.state_dict()["state"].get(0, {}).items()},
        }

    def _restore(self, task: str, values: Mapping[str, Tensor]) -> None:
        adam = self._adams[task] = self._adam(values["delta"].clone())
        moments = {name: value.clone() for name, value in values.items() if name != "delta"}
        adam.load_state_dict(adam.state_dict() | {"state": {0: moments} if moments else {}})
