"""What a tower and a head say: logits, the labels that a model expects, and how far two models agree."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_merge.errors import InputError
from adaptive_merge.starts.base import Problem
from adaptive_merge.starts.sites import Weights

__all__ = ["Agreement", "agreement", "as_features", "head_of", "label_weights", "logits_of"]


class Agreement(NamedTuple):
    """How far two models agree on some images.

    Args:
        share: of the images for which both name the same class, in [0, 1].
        divergence: mean Jensen–Shannon divergence of their predictions, in nats; 0 where they are equal.
    """

    share: float
    divergence: float


def head_of(problem: Problem, task: str) -> Tensor:
    """A task's head, in float32 on the anchor's device.

    Raises:
        InputError: there is none.
    """
    if task not in problem.heads:
        raise InputError(f"`heads` has none for task {task!r}; predictions need the head of every task")
    return problem.heads[task].detach().float().to(problem.anchor.device)


def as_features(output: Any) -> Tensor:
    """The features [B, d] in what a tower returns, which for Hugging Face's is a record."""
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output


def logits_of(tower: nn.Module, weights: Weights, images: Tensor, head: Tensor) -> Tensor:
    """Logits [B, C] of images [B, …] by a tower with these weights and buffers."""
    features = as_features(torch.func.functional_call(tower, dict(weights), (images,)))
    return F.normalize(features.float(), dim=-1) @ head.T


def label_weights(logits: Tensor, samples: int | None, key: str) -> Tensor:
    """How much each label [B, C] counts in an expectation over the model's own predictions.

    Args:
        logits: [B, C].
        samples: labels drawn an image; None: all labels, weighted by their probability.
        key: names the batch; the same key draws the same labels.
    """
    probabilities = logits.detach().softmax(-1)
    if samples is None:
        return probabilities
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    drawn = torch.multinomial(probabilities.cpu(), samples, True, generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(probabilities.shape).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return (counts / samples).to(logits.device)


def agreement(logits: Tensor, expected: Tensor) -> Tensor:
    """Sums over a batch: agreeing images, divergence in nats, images; float64 [3]."""
    first, second = logits.double().log_softmax(-1), expected.double().log_softmax(-1)
    middle = torch.logaddexp(first, second) - torch.log(first.new_tensor(2.0))
    divergence = 0.5 * (first.exp() * (first - middle) + second.exp() * (second - middle)).sum()
    same = (logits.argmax(-1) == expected.argmax(-1)).sum()
    return torch.stack([same.double(), divergence, first.new_tensor(len(logits))])
