"""What watches a run: history, progress, dashboards, diagnostics, the ledger of images, and the guard.

Only the guard ever changes what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ProgressBar

from adaptive_merge.callbacks.guard.guard import Guard
from adaptive_merge.callbacks.record.diagnostics import Diagnostics
from adaptive_merge.callbacks.record.history import History
from adaptive_merge.callbacks.record.ledger import Ledger
from adaptive_merge.callbacks.show.dashboard import Dashboard
from adaptive_merge.callbacks.show.progress import Progress
from adaptive_merge.callbacks.show.sturdy import Sturdy
from adaptive_merge.callbacks.show.wandb_runs import protect

__all__ = ["Dashboard", "Diagnostics", "Guard", "History", "Ledger", "Progress", "Sturdy", "protect", "watchers"]


def watchers(given: Sequence[Callback] = (), progress: bool = True) -> list[Callback]:
    """The callbacks that the user gave, and ours of the kinds that are not among them.

    Args:
        given: the user's callbacks; they come first.
        progress: whether to show progress, where the user gave no bar.
    """
    ours = [kind() for kind in (History, Dashboard, Diagnostics) if not any(isinstance(one, kind) for one in given)]
    if progress and not any(isinstance(one, ProgressBar) for one in given):
        ours.append(Progress())
    return [*given, *ours]
