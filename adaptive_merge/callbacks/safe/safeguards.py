"""What every run is watched by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning import Callback

from adaptive_merge.callbacks.safe.faults import FaultGuard
from adaptive_merge.callbacks.safe.preemption import Preemption
from adaptive_merge.callbacks.safe.rank_check import RankAgreement
from adaptive_merge.callbacks.safe.rng import RngState

__all__ = ["safeguards"]


def safeguards(folder: str | Path, given: Sequence[Callback] = ()) -> list[Callback]:
    """Exact resume, agreement, faults and preemption for the run in `folder`; no kind that is among `given`.

    They come before any callback that saves a checkpoint.
    """
    ours = [RngState(), FaultGuard(), RankAgreement(), Preemption(Path(folder) / "checkpoints" / "last.ckpt")]
    return [callback for callback in ours if not any(isinstance(one, type(callback)) for one in given)]
