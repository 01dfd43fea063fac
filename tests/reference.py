"""Straight-line ports of the published loops: the oracles of the tests, written to be read beside the papers."""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.nn import functional as F


def logits_of(backbone, parameters, images, head, mean=0.5, std=0.25):
    features = functional_call(backbone, parameters, (normalised(images, mean, std),))
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


def surgery(features, expert_features, rank, adapters, order, lr=1e-3, steps=20):
    """The published loop on features: task by task, one Adam over all adapters, one step per task and batch.

    `features(task, step)` and `expert_features(task, step)` give [B, d]; `adapters` is task → [D, U] leaves.
    """
    optimizer = torch.optim.Adam([matrix for pair in adapters.values() for matrix in pair], lr=lr)
    for step in range(steps):
        for task in order:
            down, up = adapters[task]
            z = features(task, step)
            loss = (z - torch.relu(z @ down.T) @ up.T - expert_features(task, step)).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def tinting(backbone, pretrained, vectors, heads, experts, stream, confident, lr=1e-2, updates=20):
    """The published loop: coefficients and heads in one Adam, one step per task; `stream(update)` → task, images."""
    coefficients = torch.full((len(vectors), len(pretrained)), 0.3, requires_grad=True)
    weights = {task: head.clone().requires_grad_() for task, head in heads.items()}
    biases = {task: torch.zeros(len(head), requires_grad=True) for task, head in heads.items()}
    optimizer = torch.optim.Adam([coefficients, *weights.values(), *biases.values()], lr=lr)
    for update in range(updates):
        task, images = stream(update)
        features = F.normalize(
            functional_call(backbone, merge(pretrained, vectors, coefficients), (normalised(images),)), dim=-1
        )
        logits = features @ weights[task].T + biases[task]
        with torch.no_grad():
            expert = logits_of(backbone, experts[task], images, heads[task])
        label, keep = expert.argmax(1), torch.ones(len(images), dtype=torch.bool)
        if confident:
            p, q = logits.softmax(1), expert.softmax(1)
            agree = p.argmax(1) == label
            keep = agree | (~agree & (q.max(1).values - p.max(1).values >= 0))
        if not keep.any():
            continue
        loss = F.cross_entropy(logits[keep], label[keep])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return coefficients.detach(), {task: weight.detach() for task, weight in weights.items()}


def normalised(images, mean=0.5, std=0.25):
    return (images.float() / 255 - mean) / std
