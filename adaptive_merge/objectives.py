"""What an unlabelled batch asks for: losses per image, on predictions alone or against the task's own expert.

The mathematics are pure functions on tensors; the classes below them are what a recipe names. Losses are per
image, not means: the module divides by the number of images kept over all processes, so that a filter that
keeps three images here and seven there weighs them alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptive_merge.errors import InputError

__all__ = [
    "Entropy",
    "ExpertDivergence",
    "FeatureDistance",
    "Objective",
    "Prediction",
    "PseudoLabel",
    "confidence_filter",
    "entropy",
    "feature_distance",
    "jensen_shannon",
    "normalised_entropy",
]

Distance = Literal["l1", "l2", "smooth_l1", "cosine"]


@dataclass(frozen=True)
class Prediction:
    """What a model says about a batch of one task.

    Args:
        features: [B, d], after the task's adapters.
        logits: [B, C] of the task's head.
        blocks: mean token [B, width] after each block, where somebody asked for it.
    """

    features: Tensor
    logits: Tensor
    blocks: tuple[Tensor, ...] = ()


class Objective(ABC):
    """A loss per image of one task's unlabelled batch."""

    needs_expert: ClassVar[bool] = False
    """Whether it looks at the expert's prediction."""

    needs_blocks: bool = False
    """Whether it looks at the tower's blocks."""

    filters: bool = False
    """Whether `keep` may leave images out."""

    average: Callable[[Tensor], Tensor] = staticmethod(lambda value: value)
    """Makes a mean over this process's images of a task one over all processes' images; the module sets it."""

    @abstractmethod
    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        """The loss of each image, [B]; `expert` is the frozen expert's prediction for the same images."""

    def keep(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        """Which images count, bool [B]; not differentiated. Asked where `filters` is true; default: all."""
        return torch.ones_like(prediction.logits[:, 0], dtype=torch.bool)


def entropy(logits: Tensor) -> Tensor:
    """H(x) = −Σₖ pₖ log pₖ in nats, [B] from logits [B, C]; finite, with finite gradients, for saturated logits."""
    log_p = _log_p(logits)
    return -(log_p.exp() * log_p).sum(-1)


def normalised_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of a batch over ln C: 0 is certain, 1 knows nothing. Scalar, no gradient."""
    return entropy(logits.detach()).mean() / math.log(max(logits.shape[-1], 2))


def jensen_shannon(logits: Tensor, other: Tensor) -> Tensor:
    """JS divergence in nats, [B] from two logits [B, C]; 0 for equal predictions, at most ln 2."""
    log_p, log_q = _log_p(logits), _log_p(other)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1))


def feature_distance(features: Tensor, target: Tensor, kind: Distance = "l1") -> Tensor:
    """Distance per image, [B] from features [B, d]: mean over dimensions, or 1 − cosine."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(features, target, dim=-1)
    losses = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
    return losses[kind](features, target, reduction="none").mean(-1)


def confidence_filter(logits: Tensor, expert_logits: Tensor) -> Tensor:
    """Tinting++: keep an image, bool [B], unless the two disagree and the merged model is the more confident.

    p and q are the softmax of merged model and expert: drop where argmax p ≠ argmax q and max q < max p.
    """
    p, q = logits.softmax(-1).max(-1), expert_logits.softmax(-1).max(-1)
    return (p.indices == q.indices) | (q.values >= p.values)


def _log_p(logits: Tensor) -> Tensor:
    # A class at −inf has p = 0: its clamped logarithm keeps 0 · log 0 at 0, in the gradient as well.
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return log_p.clamp_min(torch.finfo(log_p.dtype).min / 4)


class Entropy(Objective):
    """Prediction entropy (AdaMerging, eq. 6; Tent), with two optional parts against collapse.

    Args:
        diversity: weight w of −w · H(p̄), where p̄ is the mean prediction of the task's batch over all processes:
            the images are to be spread over the classes while each is certain of its own.
        reliable: in (0, 1]: images of an entropy of `reliable` · ln C or more do not count, the others count by
            exp(reliable · ln C − H) (EATA, eq. 2 and 3, there with 0.4). A step that keeps no image changes nothing.
    """

    def __init__(self, diversity: float = 0.0, reliable: float | None = None) -> None:
        if not 0 <= diversity < math.inf or (reliable is not None and not 0 < reliable <= 1):
            raise InputError(
                f"`diversity` is at least 0 and `reliable`, a part of ln C, in (0, 1]; got {diversity} and {reliable}"
            )
        self.diversity, self.reliable, self.filters = diversity, reliable, reliable is not None

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        losses = entropy(prediction.logits)
        if self.reliable is not None:
            losses = losses * (self._margin(prediction) - losses.detach()).exp()
        if self.diversity:
            # Its mean is −H(p̄), and as Σₖ dp̄ₖ = 0, so is its gradient, though log p̄ is held fixed.
            log_mean = self._mean(prediction).clamp_min(torch.finfo(losses.dtype).tiny).log()
            losses = losses + self.diversity * (_log_p(prediction.logits).exp() * log_mean).sum(-1)
        return losses

    def keep(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return entropy(prediction.logits.detach()) < self._margin(prediction)

    def _margin(self, prediction: Prediction) -> float:
        return math.inf if self.reliable is None else self.reliable * math.log(max(prediction.logits.shape[-1], 2))

    def _mean(self, prediction: Prediction) -> Tensor:
        """p̄ [C] of the images that count."""
        kept = self.keep(prediction, None)[:, None]
        probabilities = _log_p(prediction.logits.detach()).exp() * kept
        images = max(len(kept), 1)  # a process's part of a small batch may be empty
        share = self.average(kept.sum().to(probabilities.dtype) / images)
        return self.average(probabilities.sum(0) / images) / share.clamp_min(1e-12)


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
        self.kind, self.needs_blocks = kind, blocks

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        pairs = [(prediction.features, expert.features)]
        if self.needs_blocks:
            pairs += zip(prediction.blocks, expert.blocks)
        return torch.stack([feature_distance(ours, theirs, self.kind) for ours, theirs in pairs]).sum(0)


class PseudoLabel(Objective):
    """Cross-entropy to what the expert says (Model Tinting, SyMerge).

    Args:
        soft: the expert's probabilities as target instead of its label.
        confident: the confidence filter of Tinting++ and SyMerge.
    """

    needs_expert = True

    def __init__(self, soft: bool = False, confident: bool = False) -> None:
        self.soft, self.filters = soft, confident

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        target = expert.logits.softmax(-1) if self.soft else expert.logits.argmax(-1)
        return F.cross_entropy(prediction.logits, target, reduction="none")

    def keep(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return confidence_filter(prediction.logits.detach(), expert.logits)


class ExpertDivergence(Objective):
    """Jensen–Shannon divergence to the expert's prediction (DivMerge, EACL 2026)."""

    needs_expert = True

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return jensen_shannon(prediction.logits, expert.logits)
