"""A bank without its numbers, for what is to be known before they are read: sizes, and what an operation would take."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_merge import upstream
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["is_outline", "outlined"]


def outlined(bank: TaskVectors) -> TaskVectors:
    """A bank of the same tasks, shapes and types whose tensors are on the CPU by their word, and take no memory there.

    They go through every operation whose result's shape does not depend on numbers.
    """
    with upstream.shapes_alone():
        pretrained = _hollow(bank.pretrained)
        vectors = _hollow(bank.vectors) if bank.factors is None else bank.factors.mapped(_hollow)
        buffers = {name: _hollow(value) for name, value in bank.buffers.items()}
        own = {name: _hollow(value) for name, value in bank.own.items()}
    return TaskVectors(bank.tasks, bank.layout, pretrained, vectors, buffers, own)


def is_outline(bank: TaskVectors) -> bool:
    """Whether a bank has no numbers."""
    return upstream.is_hollow(bank.pretrained)


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
