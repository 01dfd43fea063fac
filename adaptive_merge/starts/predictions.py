"""What a tower and a head say: logits, the labels that a model expects, and how far two models agree."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_merge.adapters.heads import Head, frozen_heads
from adaptive_merge.objectives.functional import undefined
from adaptive_merge.starts.base import Agreement, Problem
from adaptive_merge.starts.sites import Weights

__all__ = [
    *("agreement", "answers", "as_features"),
    *("heads_of", "label_weights", "logits_of", "mean_agreement"),
]


SCALES = tuple(2 ** (step / 4) for step in range(-2, 7))
"""Of a merged model's logits. Merged models are less sure than experts, the more so the further an anchor reaches: no
loss of accuracy, but at one scale the divergence chose the surest, at up to .7 points (embedded suite).
"""


def heads_of(problem: Problem) -> dict[str, Head]:
    """All tasks' heads, frozen, in float32 on the anchor's device.

    Raises:
        InputError: a task without a head, or with one that cannot be used.
    """
    heads = frozen_heads(problem.heads, problem.experts.tasks, None)
    return {task: head.to(problem.anchor.device) for task, head in heads.items()}


def as_features(output: Any) -> Tensor:
    """The features [B, d] in what a tower returns, which for Hugging Face's is a record."""
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output


def logits_of(tower: nn.Module, weights: Weights, images: Tensor, head: Head) -> Tensor:
    """Logits [B, k, C] of images [B, …] by a tower with these weights and buffers."""
    return answers(head, as_features(torch.func.functional_call(tower, dict(weights), (images,))))


def answers(head: Head, features: Tensor) -> Tensor:
    """A head's logits [B, k, C] of features [B, d]: k units an image."""
    return head(head.seen(features.float())).unflatten(0, (len(features), -1))


def label_weights(logits: Tensor, samples: int | None, key: str) -> Tensor:
    """How much each label [B, k, C] counts in an expectation over the model's own predictions.

    Args:
        logits: [B, k, C].
        samples: labels drawn a unit; None: all labels, weighted by their probability.
        key: names the batch; the same key draws the same labels.
    """
    probabilities = logits.detach().softmax(-1)
    if samples is None:
        return probabilities
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    rows = probabilities.flatten(0, 1).cpu()
    drawn = torch.multinomial(rows, samples, True, generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(rows.shape).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return (counts / samples).view(logits.shape).to(logits.device)


def agreement(logits: Tensor, expected: Tensor) -> Tensor:
    """Sums over the units of a batch [B, k, C]: their number, those that agree, and the divergence in nats at each of
    `SCALES`; float64 [2 + scales].
    """
    same = (logits.argmax(-1) == expected.argmax(-1)) & ~(undefined(logits) | undefined(expected))
    same = same.double()
    second = expected.double().log_softmax(-1)
    divergences = [_divergence((scale * logits.double()).log_softmax(-1), second) for scale in SCALES]
    return torch.stack([same.new_tensor(same.numel()), same.sum(), *divergences])


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Sum of the Jensen–Shannon divergences of log-probabilities [..., C]."""
    middle = torch.logaddexp(first, second) - math.log(2)
    return 0.5 * (first.exp() * (first - middle) + second.exp() * (second - middle)).sum()


def mean_agreement(totals: Tensor) -> Agreement:
    """Of tasks that weigh the same, from each one's sums [T, 2 + scales] as `agreement` gives them."""
    means = (totals[:, 1:] / totals[:, :1].clamp_min(1)).cpu()
    return Agreement(float(means[:, 0].mean()), float(means[:, 1:].amin(1).mean()))
