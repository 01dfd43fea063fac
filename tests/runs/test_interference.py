"""Signs, masks and subspaces of task vectors, against the definitions written out entry by entry in NumPy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

import adaptive_merge as am
from adaptive_merge.runs.interference import alignment, cosines, mask_statistics, sign_conflicts


@pytest.fixture
def sparse(bank):
    """The bank with entries that no task moves, and a parameter that one task alone moves."""
    vectors = bank.vectors.clone()
    generator = torch.Generator().manual_seed(3)
    vectors[torch.rand(vectors.shape, generator=generator) < 0.3] = 0
    vectors[1:, bank.layout.slices[2]] = 0
    return bank.with_vectors(vectors)


def test_sign_conflicts_count_entries_and_pairs(sparse):
    found = sign_conflicts(sparse).numpy()
    for column, part in enumerate(sparse.layout.slices):
        entries = sparse.vectors[:, part].numpy().T
        shared = [entry for entry in entries if np.count_nonzero(entry) > 1]
        opposed = [entry for entry in shared if entry.min() < 0 < entry.max()]
        pairs = [a * b < 0 for entry in entries for a, b in combinations(entry, 2) if a and b]
        assert found[0, column] == pytest.approx(len(opposed) / max(len(shared), 1))
        assert found[1, column] == pytest.approx(np.mean(pairs) if pairs else 0.0)


def test_mask_statistics_are_sets_of_entries(sparse):
    vectors = sparse.vectors.double().numpy()
    moved = set(np.flatnonzero(np.abs(vectors).sum(0)))
    total = vectors.sum(0)
    kept = [{p for p in moved if abs(row[p]) > 0.4 * abs(total[p] - row[p])} for row in vectors]
    found = mask_statistics(sparse)
    assert np.allclose(found.density, [len(one) / len(moved) for one in kept])
    expected = [[len(one & other) / len(one | other) for other in kept] for one in kept]
    assert np.allclose(found.jaccard, expected)
    by = [sum(sum(p in one for one in kept) == k for p in moved) / len(moved) for k in range(len(kept) + 1)]
    assert np.allclose(found.kept_by, by)


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.5])
def test_alignment_is_the_share_inside_the_leading_directions(bank, epsilon):
    merged = bank.layout.unflatten(bank.pretrained + 0.3 * bank.vectors.sum(0))
    expected = np.zeros((len(bank.tasks), 0))
    for name, shape in zip(bank.names, bank.layout.shapes):
        if len(shape) == 2:
            base = bank.layout.unflatten(bank.pretrained)[name]
            u, s, _ = np.linalg.svd((merged[name] - base).double().numpy(), full_matrices=False)
            tails = [np.sum(s[k:] ** 2) for k in range(len(s) + 1)]
            k = next(k for k, tail in enumerate(tails) if tail <= epsilon**2 * np.sum(s**2) + 1e-14 * np.sum(s**2))
            inside = u[:, :k] @ u[:, :k].T
            ratios = [[np.linalg.norm(inside @ v) / np.linalg.norm(v)] for v in bank.of(name).double().numpy()]
            expected = np.hstack([expected, ratios])
    assert expected.shape[1] == 4
    assert np.allclose(alignment(bank, merged, epsilon), expected.mean(1), atol=1e-4)


def test_alignment_of_merges_that_can_be_told_by_hand(bank):
    base = bank.layout.unflatten(bank.pretrained)
    assert alignment(bank, base).tolist() == [0, 0, 0]
    alone = bank.expert("green")
    assert alignment(bank, alone, epsilon=0.0)[1] == pytest.approx(1, abs=1e-5)
    still = bank.with_vectors(bank.vectors * torch.tensor([[0.0], [1.0], [1.0]]))
    values = alignment(still, alone)
    assert values.isnan().tolist() == [True, False, False]


def test_cosines_are_those_of_the_rows(bank):
    expected = torch.nn.functional.cosine_similarity(bank.vectors[:, None], bank.vectors[None], dim=-1)
    assert torch.allclose(cosines(bank.vectors), expected, atol=1e-5)
    zero = am.TaskVectors(bank.tasks, bank.layout, bank.pretrained, 0 * bank.vectors, {})
    assert cosines(zero.vectors).isfinite().all()
