"""What a batch asks for with the task's own expert as the teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.objectives.functional import (
    Distance,
    confidence_filter,
    feature_distance,
    jensen_shannon,
    log_probabilities,
)

__all__ = ["ExpertDivergence", "ExpertKL", "FeatureDistance", "PseudoLabel"]


class FeatureDistance(Objective):
    """Distance of the features to the expert's (Representation Surgery, eq. 6).

    Args:
        kind: `"l1"` as published, `"l2"`, `"smooth_l1"` or `"cosine"`.
        blocks: also sum the distances of the mean tokens after every block (SurgeryV2).
    """

    needs_expert = True

    def __init__(self, kind: Distance = "l1", blocks: bool = False) -> None:
        if kind not in ("l1", "l2", "smooth_l1", "cosine"):
            raise InputError(f"unknown feature distance {kind!r}; choose 'l1', 'l2', 'smooth_l1' or 'cosine'")
        self.kind, self.blocks, self.needs_blocks = kind, blocks, blocks

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        pairs = [(prediction.features, required(expert).features)]
        if self.needs_blocks:
            pairs += zip(prediction.blocks, required(expert).blocks)
        return torch.stack([feature_distance(ours, theirs, self.kind) for ours, theirs in pairs]).sum(0)


class PseudoLabel(Objective):
    """Cross-entropy to what the expert says (Model Tinting, SyMerge).

    Args:
        soft: the expert's probabilities as target instead of its label.
        confident: the confidence filter of Tinting++ and SyMerge.
    """

    needs_expert = True

    def __init__(self, soft: bool = False, confident: bool = False) -> None:
        self.soft, self.confident, self.filters = soft, confident, confident

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        logits = required(expert).logits
        target = logits.softmax(-1) if self.soft else logits.argmax(-1)
        return F.cross_entropy(prediction.logits, target, reduction="none")

    def keep(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return confidence_filter(prediction.logits.detach(), required(expert).logits)


class ExpertDivergence(Objective):
    """Jensen–Shannon divergence to the expert's prediction (DivMerge, EACL 2026)."""

    needs_expert = True

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return jensen_shannon(prediction.logits, required(expert).logits)


class ExpertKL(Objective):
    """KL(softmax(expert/T) ‖ softmax(merged/T)): the expert's probabilities, softened by a temperature T.

    As SAMerging has it, with T = 2 and no factor T² (arXiv 2512.21288). Its sharpness-aware step is not here: as
    released it does not merge anew between its two passes, both give the same gradient, and it changes nothing.

    Args:
        temperature: T.
        scaled: with the factor T² of distillation (Hinton et al., 2015), which keeps the size of the gradient.
    """

    needs_expert = True

    def __init__(self, temperature: float = 1.0, scaled: bool = False) -> None:
        if not 0 < temperature < math.inf:
            raise InputError(f"`temperature` is a positive number, got {temperature}")
        self.temperature, self.scaled = temperature, scaled

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        p = log_probabilities(required(expert).logits / self.temperature)
        losses = (p.exp() * (p - log_probabilities(prediction.logits / self.temperature))).sum(-1)
        return self.temperature**2 * losses if self.scaled else losses


def required(expert: Prediction | None) -> Prediction:
    """The expert's prediction, which the objective cannot do without; InputError where there is none."""
    if expert is None:
        raise InputError("this objective is taught by the task's expert: give the expert's prediction as `expert`")
    return expert
