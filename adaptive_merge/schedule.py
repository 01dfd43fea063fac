"""Stage after stage: what learns, by which objective, for how long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from adaptive_merge.errors import InputError, check_number
from adaptive_merge.objectives.base import Objective

__all__ = ["Stage", "adam", "at_step", "check_rates"]


class Stage:
    """A part of a run: what learns, by which objective, for how many steps.

    Args:
        steps: optimiser steps of this stage; the last stage goes on to the end of the run.
        learn: what learns meanwhile; the rest stands still.
        objective: what the unlabelled batches ask for.
    """

    def __init__(self, steps: int, learn: Literal["coefficients", "adapters", "all"], objective: Objective) -> None:
        if steps < 1 or learn not in ("coefficients", "adapters", "all"):
            raise InputError(
                f"a stage takes at least 1 step and learns 'coefficients', 'adapters' or 'all', got {steps}, {learn!r}"
            )
        self.steps, self.learn, self.objective = steps, learn, objective


def check_rates(lr: float, adapter_lr: float, betas: Sequence[float], weight_decay: float) -> None:
    """Refuse what Adam cannot learn with, before it is asked to."""
    for name, value in {"lr": lr, "adapter_lr": adapter_lr, "weight_decay": weight_decay}.items():
        check_number(name, value, 0.0)
    for beta in betas:
        check_number("betas", beta, 0.0, 1.0)


def at_step(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that a run has reached after `step` steps."""
    for stage in stages[:-1]:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return stages[-1]


def adam(
    groups: Iterable[tuple[list[nn.Parameter], float]], betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Adam over parameters and their rates, AdamW where weights decay; groups without parameters are left out."""
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    named = [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]
    return kind(named, betas=betas, weight_decay=weight_decay)
