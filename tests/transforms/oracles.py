"""The published merges as their papers write them: dense, in numpy, one tensor at a time, name by name.

Each function takes τ as {task: {name: array}} and gives the merged Δ as {name: array}. They share no code with
the transforms; what a transform returns has to sum to them.
"""

from __future__ import annotations

import numpy as np


def arrays(bank):
    return {
        task: {name: value.double().numpy() for name, value in bank.layout.unflatten(row).items()}
        for task, row in zip(bank.tasks, bank.vectors)
    }


def is_matrix(name, value):
    return value.ndim == 2 and "text_projection" not in name


def per_tensor(vectors, matrix, other=None):
    """`matrix` of the list of the tasks' matrices; of everything else the mean, or `other`."""
    first = next(iter(vectors.values()))
    other = other or (lambda values: sum(values) / len(values))
    return {
        name: (matrix if is_matrix(name, value) else other)([vector[name] for vector in vectors.values()])
        for name, value in first.items()
    }


def split(rule):
    """The rule on thirds of the rows, put together again."""
    return lambda values: np.vstack([rule(list(thirds)) for thirds in zip(*(np.split(v, 3) for v in values))])


def whiten(x):
    p, _, qt = np.linalg.svd(x, full_matrices=False)
    return p @ qt


def tsvm(values):
    rank = int(min(values[0].shape) / len(values))
    u, s, vt = zip(*(np.linalg.svd(value, full_matrices=False) for value in values))
    left = whiten(np.hstack([x[:, :rank] for x in u]))
    right = whiten(np.vstack([x[:rank] for x in vt]))
    return left @ np.diag(np.concatenate([x[:rank] for x in s])) @ right


def iso_c(values):
    u, s, vt = np.linalg.svd(sum(values), full_matrices=False)
    return s.mean() * u @ vt


def iso_cts(values, fraction=0.8):
    tasks, rank = len(values), min(values[0].shape)
    specific = round((rank - int(rank * fraction)) / tasks)
    k = rank - specific * tasks
    u, s, vt = np.linalg.svd(sum(values), full_matrices=False)
    lefts, rights, spectrum = [], [], list(s[:k])
    for value in values:
        rest = value - u[:, :k] @ u[:, :k].T @ value
        own_u, own_s, own_vt = np.linalg.svd(rest, full_matrices=False)
        lefts.append(own_u[:, :specific])
        rights.append(own_vt[:specific])
        spectrum += list(own_s[:specific])
    left, right = whiten(np.hstack([*lefts, u[:, :k]])), whiten(np.vstack([*rights, vt[:k]]))
    return np.mean(spectrum) * left @ right


def low_rank(value, rank):
    u, s, vt = np.linalg.svd(value, full_matrices=False)
    s[rank:] = 0
    return u @ np.diag(s) @ vt


def cart(vectors, share, alpha):
    found = {}
    for name in next(iter(vectors.values())):
        values = [vector[name] for vector in vectors.values()]
        mean = sum(values) / len(values)
        centred = [value - mean for value in values]
        if mean.ndim == 2 and ("attn" in name or "mlp" in name):
            centred = [low_rank(value, int(share * min(value.shape))) for value in centred]
        found[name] = mean + alpha * sum(centred)
    return found


def svc(merged, vectors, a, directions=None):
    """`directions`: of the matrix that U is taken from, where Δ has equal singular values; default Δ."""
    found = dict(merged)
    for name, delta in merged.items():
        if is_matrix(name, delta):
            u = np.linalg.svd((directions or merged)[name], full_matrices=False)[0]
            gamma = []
            for r in range(u.shape[1]):
                responses = [(u[:, r] @ delta, u[:, r] @ vector[name]) for vector in vectors.values()]
                gamma.append(len(vectors) / sum(max(a, x @ y / (y @ y)) for x, y in responses))
            found[name] = u @ np.diag(gamma) @ u.T @ delta
    return found


def star(value, eta):
    u, s, vt = np.linalg.svd(value, full_matrices=False)
    rank = min(np.searchsorted(np.cumsum(s), s.sum() * eta / 100) + 1, len(s))
    kept = s[:rank] * s.sum() / s[:rank].sum()
    return u[:, :rank] @ np.diag(kept) @ vt[:rank]


def breadcrumbs(value, beta, gamma):
    if value.ndim == 0:
        return value
    rows = value.reshape(-1, value.shape[-1]).copy()
    for row in rows:
        order = np.argsort(-np.abs(row))
        outliers, kept = int(len(row) * gamma), int(len(row) * beta)
        row[np.r_[order[:outliers], order[outliers + kept :]]] = 0
    return rows.reshape(value.shape)


def adam(start, gradient, steps, lr):
    x, first, second = start.copy(), 0.0, 0.0
    for step in range(1, steps + 1):
        g = gradient(x)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        x = x - lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return x


def wudi(values, steps, lr):
    def gradient(merged):
        return sum(2 * (merged - value) @ value.T @ value / np.sum(value**2) for value in values)

    return adam(sum(values), gradient, steps, lr)


def wudi_loss(merged, values):
    return sum(np.sum(((merged - value) @ value.T) ** 2) / np.sum(value**2) for value in values)


def doge_delta(values, eta, subspace, steps, lr):
    tasks, rank = len(values), min(values[0].shape)
    weights = [eta / np.linalg.norm(value) for value in values]
    stack = np.zeros((values[0].shape[0], rank))
    for task, value in enumerate(values):
        part = rank // tasks
        stack[:, task * part : (task + 1) * part] = np.linalg.svd(value, full_matrices=False)[0][:, :part]
    basis = np.linalg.svd(stack, full_matrices=False)[0][:, : rank // subspace]

    def gradient(delta):
        merged = sum(weight * (value + delta) for weight, value in zip(weights, values))
        gaps = [(value * (value - merged)).sum(1, keepdims=True) for value in values]
        full = -2 * sum(weights) * sum(gap * value for gap, value in zip(gaps, values))
        return full - basis @ basis.T @ full

    return weights, adam(np.zeros_like(values[0]), gradient, steps, lr)


def doge(vectors, eta=0.07, keep=0.3, subspace=6, steps=400, lr=1e-4):
    first = next(iter(vectors.values()))
    names = [name for name, value in first.items() if value.ndim == 2 and ("attn" in name or "mlp" in name)]
    cut = {}
    for task, vector in vectors.items():
        size = np.sort(np.abs(np.concatenate([vector[name].ravel() for name in names])))
        cut[task] = size[len(size) - int(len(size) * keep) - 1]
    found = {name: np.zeros_like(value) for name, value in first.items()}
    for name in names:
        weights, delta = doge_delta([vector[name] for vector in vectors.values()], eta, subspace, steps, lr)
        for weight, (task, vector) in zip(weights, vectors.items()):
            found[name] += weight * (vector[name] + delta) * (np.abs(vector[name]) >= cut[task])
    return found
