"""The mathematics of the objectives: pure functions on tensors."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "BINS",
    "Distance",
    "calibration_bin",
    "confidence_filter",
    "entropy",
    "feature_distance",
    "jensen_shannon",
    "log_probabilities",
    "normalised_entropy",
    "undefined",
]

Distance = Literal["l1", "l2", "smooth_l1", "cosine"]
BINS = 15
"""Of the expected calibration error (Guo et al., ICML 2017)."""


def entropy(logits: Tensor) -> Tensor:
    """H(x) = −Σₖ pₖ log pₖ in nats, [B] from logits [B, C]; finite, with finite gradients, for saturated logits."""
    log_p = log_probabilities(logits)
    return -(log_p.exp() * log_p).sum(-1)


def undefined(logits: Tensor) -> Tensor:
    """Whether logits [U, C] predict nothing, bool [U]: one of them is NaN or +∞, or all are −∞."""
    return logits.detach().float().softmax(-1).amax(-1).isnan()


def normalised_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of a batch over ln C: 0 is certain, 1 knows nothing. Scalar, no gradient."""
    return entropy(logits.detach()).mean() / math.log(max(logits.shape[-1], 2))


def jensen_shannon(logits: Tensor, other: Tensor) -> Tensor:
    """JS divergence in nats, [B] from two logits [B, C]; 0 for equal predictions, at most ln 2."""
    log_p, log_q = log_probabilities(logits), log_probabilities(other)
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


def log_probabilities(logits: Tensor) -> Tensor:
    """log p of logits [B, C] in at least float32, finite everywhere."""
    # A class at −inf has p = 0: its clamped logarithm keeps 0 · log 0 at 0, in the gradient as well.
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return log_p.clamp_min(torch.finfo(log_p.dtype).min / 4)


def calibration_bin(confidence: Tensor) -> Tensor:
    """Which of the `BINS` bins of equal width, closed above, each confidence in [0, 1] lies in, int64 of its shape."""
    return (confidence.nan_to_num() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
