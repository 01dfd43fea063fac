"""A run that is told to stop, in any phase: what is on the disk, and how to go on from it, in one message."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pytorch_lightning.utilities import rank_zero_only

from adaptive_merge.process import signals
from adaptive_merge.process.signals import Preempted, Signals

__all__ = ["Place", "answering"]

# The first of these that is there is the furthest that a run came.
_KEPT: Final = {
    "results.json": "the results are in {}",
    "checkpoints/last.ckpt": "what it learned is in {}",
    "start.safetensors": "what its start gave is in {}",
    "start.partial.safetensors": "what is solved of its start is in {}",
}


@dataclass
class Place:
    """What a run that is told to stop has to know of itself, as it becomes known."""

    folder: Path | None = None
    launcher: Any = None


@contextmanager
def answering() -> Iterator[Place]:
    """Answer signals while the block runs; a run that is told to stop says what it leaves behind.

    Raises:
        Preempted: a signal came; its code is the exit code.
    """
    place = Place()
    with ExitStack() as stack:
        listening = signals.current() or stack.enter_context(Signals())
        try:
            yield place
        except Preempted as stopped:
            _wind_up(place)
            _say(place, stopped)
            raise
        except Exception:
            if not listening.asked:
                raise
            # What a worker or another process died of, for it was told to stop as well.
            stopped = Preempted(signals.exit_code(listening.asked))
            _say(place, stopped)
            raise stopped from None


def _wind_up(place: Place) -> None:
    """The processes that Lightning has started for this run end with it."""
    if place.launcher is not None and getattr(place.launcher, "procs", None):
        place.launcher.kill(signal.SIGTERM)


def _say(place: Place, stopped: Preempted) -> None:
    stopped.announced = True
    if rank_zero_only.rank != 0:
        return
    kept = [text.format(place.folder / name) for name, text in _KEPT.items() if _there(place, name)]
    tail = f"{kept[0]}; --run.if_exists resume goes on from it" if kept else "nothing was saved yet; start it again"
    sys.stderr.write(f"adaptive-merge: told to stop: {tail} (exit code {stopped.code})\n")


def _there(place: Place, name: str) -> bool:
    return place.folder is not None and (place.folder / name).is_file()
