"""Straight-line ports of the published loops: the oracles of the tests, written to be read beside the papers."""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.nn import functional as F


def logits_of(backbone, parameters, images, head, mean=0.5, std=0.25):
    features = functional_call(backbone, parameters, ((images.float() / 255 - mean) / std,))
    return F.normalize(features, dim=-1) @ head.T


def merge(pretrained, vectors, coefficients):
    """θ₀ + Σₜ clamp(λ_{l,t}) τ_{t,l} with one graph node per product, as published; Λ is [T, L] or [T, 1]."""
    columns = range(len(pretrained)) if coefficients.shape[1] > 1 else [0] * len(pretrained)
    return {
        name: pretrained[name]
        + sum(coefficients[t, column].clamp(0, 1) * vector[name] for t, vector in enumerate(vectors))
        for name, column in zip(pretrained, columns)
    }


def adamerging(backbone, pretrained, vectors, heads, stream, layer_wise=True, init=0.3, lr=1e-3, steps=20):
    """The published loop: merge anew for every task, sum the mean entropies, one Adam step. Λ after each step."""
    columns = len(pretrained) if layer_wise else 1
    coefficients = torch.full((len(vectors), columns), init, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    trajectory = []
    for step in range(steps):
        loss = 0.0
        for task, images in stream(step).items():
            logits = logits_of(backbone, merge(pretrained, vectors, coefficients), images, heads[task])
            loss = loss - (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trajectory.append(coefficients.detach().clone())
    return torch.stack(trajectory)


def ties(flat_vectors, share=0.2):
    """Trim at `share` of each vector, elect signs, keep what agrees; [T, n] in, [T, n] out, not summed."""
    n = flat_vectors.shape[1]
    k = n - int(n * share)
    threshold = flat_vectors.abs().sort(dim=1).values[:, k - 1 : k]
    trimmed = flat_vectors * (flat_vectors.abs() >= threshold)
    sign = torch.sign(trimmed.sum(0))
    sign[sign == 0] = torch.sign(sign.sum())
    keep = torch.where(sign > 0, trimmed > 0, trimmed < 0)
    return trimmed * keep
