"""Stage after stage: what learns, by which objective, for how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Objective

__all__ = ["Stage", "at_step"]


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


def at_step(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that a run has reached after `step` steps."""
    for stage in stages[:-1]:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return stages[-1]
