"""How long the processes of a run wait for one another before the run ends."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from lightning_fabric.plugins.collectives.torch_collective import default_pg_timeout
from pytorch_lightning.strategies import Strategy

__all__ = ["PATIENCE", "bound_waiting"]

PATIENCE: Final = timedelta(minutes=5)


def bound_waiting(strategy: Strategy) -> None:
    """Wait 5 minutes for a process that hangs, not Lightning's 30, unless the strategy was given a timeout.

    Call before the strategy forms the processes' group. A timeout that the user gave is kept, 30 minutes too.
    """
    # The very object, not an equal one: it is the default of the strategies' argument.
    if getattr(strategy, "_timeout", None) is default_pg_timeout:
        strategy._timeout = PATIENCE
