"""DARE: drop entries at random and rescale the rest (Yu et al., "Language Models are Super Mario", ICML 2024)."""

from __future__ import annotations

import hashlib

import torch

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform

__all__ = ["DARE"]


class DARE(Transform):
    """mₜ ⊙ τₜ / (1 − drop) with mₜ Bernoulli(1 − drop): the expectation is τₜ.

    A task's mask depends on the seed and on its name only: other tasks, their order and the device do not matter.

    Args:
        drop: p, the share of the entries that is dropped, in [0, 1).
        seed: of the masks.
    """

    def __init__(self, drop: float = 0.9, seed: int = 0) -> None:
        if not 0 <= drop < 1:
            raise InputError(f"DARE drops a share of the entries in [0, 1), got drop {drop}")
        self.drop, self.seed = drop, seed

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        result = torch.empty_like(bank.vectors)
        for task, row, vector in zip(bank.tasks, result, bank.vectors):
            digest = hashlib.sha256(f"{self.seed}:{task}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            for part in bank.layout.slices:
                kept = torch.rand(part.stop - part.start, generator=generator) >= self.drop
                row[part] = vector[part] * kept.to(vector.device) / (1 - self.drop)
        return bank.with_vectors(result)
