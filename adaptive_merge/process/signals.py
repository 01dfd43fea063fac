"""`Signals`: what tells a run to stop is answered from its first line to its last, once, with a documented exit code.

While steps are taken the signal is noted, and answered at the end of the step; before and after it ends what is under
way at once, for all that is worth keeping is on the disk by then. Nothing here waits for a lock or another process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import multiprocessing.util
import os
import re
import shutil
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Final, Self

__all__ = [
    "BY_SCRIPT",
    "EXIT_INTERRUPTED",
    "EXIT_REQUEUE",
    "EXIT_TERMINATED",
    "GO_ON",
    "INTERACTIVE",
    "INTERRUPT",
    "REQUEUE",
    "Preempted",
    "Signals",
    "current",
    "end_workers_at_exit",
    "exit_code",
    "ignore_signals",
    "slurm_job",
]

_log = logging.getLogger(__name__)
EXIT_REQUEUE: Final = 75  # EX_TEMPFAIL of sysexits.h: start me again
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_TERMINATED: Final = 128 + signal.SIGTERM
INTERACTIVE: Final = ("bash", "interactive")  # names that turn off SLURM mode in Lightning
# With this variable the batch script hands the job back, by the exit code: a container has no scontrol.
BY_SCRIPT: Final = "ADAPTIVE_MERGE_REQUEUE_BY_SCRIPT"
# What was asked, in order of rank: processes agree on the highest.
GO_ON, INTERRUPT, STOP, REQUEUE = range(4)
_CURRENT: list[Signals] = []


class Preempted(SystemExit):
    """The run was told to stop; its code is the exit code of the process.

    Args:
        code: 130, 143 or 75.
        saved: whether the end of the last step was saved.

    Attributes:
        announced: whether the user has read what is on the disk.
    """

    def __init__(self, code: int, saved: bool = False) -> None:
        super().__init__(code)
        self.saved, self.announced = saved, False


class Signals:
    """Answers to signals, for the time of the `with` block.

    Args:
        grace: seconds from a SIGTERM after which a process that has not come to the end of its step, because another
            one hangs, writes its traceback and ends.
        deferred: note what comes, and go on; else raise `Preempted` where the program is.
    """

    def __init__(self, grace: float = 15.0, deferred: bool = False) -> None:
        self.asked, self.deferred, self.grace, self.limited = GO_ON, deferred, grace, True
        self._process, self._leaving = os.getpid(), False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _answers()}
        self.listen()
        _CURRENT.append(self)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give the signals back; one that comes while the process winds up changes nothing any more."""
        faulthandler.cancel_dump_traceback_later()
        _CURRENT.remove(self)
        for number, before in self._before.items():
            handler = before or signal.SIG_DFL
            if isinstance(error, Preempted):
                handler = signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)

    def listen(self) -> None:
        """Put our answers over whoever else's are there."""
        for number in _answers():
            with contextlib.suppress(ValueError):  # not the main thread: somebody else answers signals here
                signal.signal(number, self._answer)

    def answer_now(self) -> None:
        """From here on a signal ends what is under way at once; so does one that has come already."""
        self.deferred = False
        faulthandler.cancel_dump_traceback_later()
        self.check()

    def check(self) -> None:
        """Raise `Preempted` if a signal has come."""
        if self.asked:
            self.leave()

    def leave(self, code: int | None = None, saved: bool = False) -> None:
        """Raise `Preempted`; what comes after this changes nothing, but a second Ctrl-C."""
        self._leaving = True
        faulthandler.cancel_dump_traceback_later()
        raise Preempted(exit_code(self.asked) if code is None else code, saved)

    def _answer(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            return  # in a process that was forked and does not know yet whose it is
        level = _answers()[signal.Signals(number)]
        if level == INTERRUPT and (self.asked or self._leaving):
            os._exit(EXIT_INTERRUPTED)
        self.asked = max(self.asked, level)
        if self.deferred:
            self._limit(number)
        elif not self._leaving:
            self.leave()

    def _limit(self, number: int) -> None:
        if number == signal.SIGTERM and self.limited and not self._leaving:
            with contextlib.suppress(ValueError, OSError, AttributeError):
                faulthandler.dump_traceback_later(self.grace, exit=True, file=sys.__stderr__)


def current() -> Signals | None:
    """Whoever answers signals in this process."""
    return _CURRENT[-1] if _CURRENT else None


def ignore_signals() -> None:
    """For a process that works for another: the terminal and the scheduler tell all of a job, and one decides."""
    for number in _answers():
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def end_workers_at_exit(process: int) -> None:
    """Let workers that ignore signals end when this process does, by a signal that cannot be ignored.

    A loader that something still refers to has living workers; the interpreter would tell them to end, and wait.

    Args:
        process: the id of this process: a fork of it has workers of its own.
    """
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take it for a worker's failure
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def exit_code(asked: int, first: bool | None = None) -> int:
    """The exit code of what was asked; under SLURM the first process hands the job back to the queue.

    Args:
        asked: the highest of what came.
        first: whether this is the process that speaks for the others; default: as the launcher says.
    """
    if asked != REQUEUE or not slurm_job():
        return EXIT_INTERRUPTED if asked == INTERRUPT else EXIT_TERMINATED
    first = _is_first() if first is None else first
    return EXIT_REQUEUE if not first or _requeue(str(slurm_job())) else EXIT_TERMINATED


def slurm_job() -> str | None:
    """The id of the SLURM job that this process is part of, as `scontrol requeue` wants it; None outside one."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if os.environ.get("SLURM_ARRAY_JOB_ID") and os.environ.get("SLURM_ARRAY_TASK_ID"):
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    usable = re.fullmatch(r"\d+(_\d+)?", job) and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE
    return job if usable else None


def _is_first() -> bool:
    return not any(os.environ.get(name, "0") not in ("", "0") for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def _requeue(job: str) -> bool:
    if os.environ.get(BY_SCRIPT):
        return True
    command = shutil.which("scontrol")
    if command is None:
        _log.warning("SLURM job %s is not requeued: there is no scontrol here", job)
        return False
    try:
        ended = subprocess.run([command, "requeue", job], check=False, timeout=60, capture_output=True, text=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("SLURM job %s is not requeued: %s", job, error)
        return False
    if ended.returncode:
        _log.warning("scontrol requeue %s ended with %d: %s", job, ended.returncode, ended.stderr.strip())
    return ended.returncode == 0


def _answers() -> dict[signal.Signals, int]:
    """Signal → what it asks for. Submitit may name another one as its warning that time runs out."""
    levels = {"SIGINT": INTERRUPT, "SIGTERM": STOP, "SIGUSR1": REQUEUE, "SIGUSR2": REQUEUE}
    if submitit := os.environ.get("SUBMITIT_PREEMPT_SIGNAL"):
        levels["SIG" + submitit.upper().removeprefix("SIG")] = REQUEUE
    numbers = {getattr(signal, name, None): level for name, level in levels.items()}
    return {number: level for number, level in numbers.items() if isinstance(number, signal.Signals)}
