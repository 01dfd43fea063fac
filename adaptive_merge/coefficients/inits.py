"""Start values of coefficients that have a name: closed forms of the task vectors, and what a method publishes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["CHOICES", "is_named", "named_start"]

CHOICES: Final = (
    "'average', 'published', 'metagpt' or 'norm^P' such as 'norm^-1', these two also as 'layerwise_metagpt' and "
    "'layerwise_norm^P'"
)
_WORDS: Final = ("average", "published")
_NORM: Final = re.compile(r"(layerwise_)?(?:metagpt|norm\^(-?\d+(?:\.\d+)?))")


def is_named(name: str) -> bool:
    """Whether a start has this name."""
    return name in _WORDS or _NORM.fullmatch(name) is not None


def named_start(name: str, bank: TaskVectors, group_of: Sequence[int]) -> Tensor:
    """λ [T, G] of a start by its name.

    - `"average"`: 1/T.
    - `"published"`: the equal coefficient of the static merge that the bank's transforms are for.
    - `"norm^P"`: λₜ = ‖τₜ‖ᴾ / Σₖ ‖τₖ‖ᴾ. P = 2 is `"metagpt"`, the closed form of Zhou et al. (EMNLP 2024); P = −1 that
      of NAN (arXiv 2505.16148) for equal lengths of all experts. A task that has moved nothing gets 0.
    - `"layerwise_…"`: the same in each group of parameters by itself.

    Args:
        name: for which `is_named` is true.
        bank: T task vectors.
        group_of: for each parameter its group, numbered from 0.

    Raises:
        InputError: `layerwise_` for a rule with one group.
    """
    tasks, groups = len(bank.tasks), max(group_of) + 1
    match = _NORM.fullmatch(name)
    if match is None:
        value = bank.published if name == "published" else name
        return torch.full((tasks, groups), 1 / tasks if value == "average" else float(value))
    power = 2.0 if match[2] is None else float(match[2])
    if match[1] is None:
        squares = torch.stack([vector.float().square().sum() for vector in bank.vectors]).cpu()
        return _shares(squares[:, None], power).repeat(1, groups)
    if groups == 1:
        whole = name.removeprefix("layerwise_")
        raise InputError(
            f"init {name!r} weighs layers by themselves, but this rule has one for all; set init {whole!r}"
        )
    return _shares(_squares(bank, group_of, groups), power)


def _squares(bank: TaskVectors, group_of: Sequence[int], groups: int) -> Tensor:
    """‖τₜ‖² of each group, [T, G]."""
    squares = torch.zeros(len(bank.tasks), groups, dtype=torch.float64)
    for group, part in zip(group_of, bank.layout.slices):
        squares[:, group] += bank.vectors[:, part].float().square().sum(1).cpu()
    return squares.float()


def _shares(squares: Tensor, power: float) -> Tensor:
    """‖τₜ‖ᴾ over its sum along the tasks, from squares [T, G]; 1/T where no task has moved anything."""
    logs = (power / 2 * squares.double().log()).masked_fill(squares <= 0, -torch.inf)
    # Relative to the largest, so that no power overflows.
    sizes = squares if power == 2 else (logs - logs.amax(0)).exp()
    total = sizes.sum(0)
    return torch.where(total > 0, sizes / total, 1 / len(squares)).float()
