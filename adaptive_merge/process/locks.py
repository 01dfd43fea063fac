"""Locks that are files: one process at a time, on any file system, and a lock whose process is gone stops nobody.

A lock is a file `NAME.N` with who holds it; the highest number counts. A lock left behind by a process that is gone is
taken over by making the next number, which only one of several that try can do (`link` fails where the name exists, on
NFS too); nobody ever removes what another may just have taken.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from adaptive_merge.errors import AdaptiveMergeError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["JOB", "LockedError", "alive", "holder", "in_turn", "locked"]

JOB: Final = "ADAPTIVE_MERGE_JOB"
"""Variable that names a job of which one attempt runs at a time, where the scheduler is not SLURM."""

_NO_FLOCK: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # NFS, Lustre
_TRIES = 20
_LOOK_EVERY = 1.0


class LockedError(AdaptiveMergeError):
    """Another process holds the lock; the message says which."""


@contextmanager
def locked(stem: Path, what: str, wait: bool = False, else_: str = "another --run.name") -> Iterator[None]:
    """Hold the lock while the block runs.

    Args:
        stem: of the lock's files, in a folder that is there.
        what: the lock protects, for messages.
        wait: for a process of this machine that holds it.
        else_: what the user may choose instead, for messages.

    Raises:
        LockedError: somebody else holds it.
        StorageError: no file can be made there.
    """
    try:
        own = _patient(stem, what, else_) if wait else _take(stem, what, else_, attempts=True)
    except OSError as error:
        raise _unwritable(stem, error) from error
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == process:  # not in a fork
            with suppress(OSError):
                own.unlink(missing_ok=True)


@contextmanager
def in_turn(path: Path, what: str) -> Iterator[None]:
    """One process after the other, by a lock on a file that the system takes back when its process ends.

    Where the file system has no such locks, `locked` stands in, and waits.

    Args:
        path: of the file; nothing is left of it, but its folder.
        what: as in `locked`.

    Raises:
        LockedError: a process that cannot be seen from here holds it.
        StorageError: no file can be made there.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = fcntl is not None and _wait_for(path, stack)
        except OSError as error:
            raise _unwritable(path, error) from error
        if not kept:
            stack.enter_context(locked(path, what, True, "another folder"))
        yield


def _wait_for(path: Path, stack: ExitStack) -> bool:
    """Whether the file system has locks; then ours is held until the stack unwinds."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        stack.callback(os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno not in _NO_FLOCK:
                raise
            return False
        with suppress(FileNotFoundError):  # whoever had it has removed it since
            if os.path.samestat(os.stat(path), os.fstat(file)):
                stack.callback(path.unlink, missing_ok=True)
                return True


def _unwritable(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or error
    return StorageError(f"{path.parent}: cannot be written to ({reason}); choose another place")


def holder(stem: Path) -> dict[str, Any] | None:
    """Who holds the lock: host, process, start; None where nobody does."""
    newest = _newest(stem)
    content = _read(newest[1]) if newest else None
    return content if content is not None and not _gone(content) else None


def _patient(stem: Path, what: str, else_: str) -> Path:
    while True:
        try:
            return _take(stem, what, else_)
        except LockedError:
            newest = _newest(stem)
            if newest and _far(_read(newest[1]) or {}):
                raise
            time.sleep(_LOOK_EVERY)


def _take(stem: Path, what: str, else_: str, attempts: bool = False) -> Path:
    """Make the next lock.

    Args:
        attempts: whether one process of a job takes it, so that another one of the same job is an earlier attempt's.
    """
    draft = stem.with_name(f"{stem.name}.partial-{os.getpid()}")
    try:
        draft.write_text(json.dumps(_ourselves()))
        for _ in range(_TRIES):
            number, path = _newest(stem) or (0, None)
            if path is not None and (content := _settled(path)) is not None and not _gone(content, attempts):
                raise LockedError(_told(content, path, what, else_))
            own = stem.with_name(f"{stem.name}.{number + 1}")
            if _made(draft, own) and _undisputed(stem, own, path):
                return own
        raise LockedError(f"{what}: others start there again and again; try once more")
    finally:
        draft.unlink(missing_ok=True)


def _settled(path: Path) -> dict[str, Any] | None:
    """The content of a lock; None once it is gone."""
    for _ in range(_TRIES):
        content = _read(path)
        if content is not None or not path.exists():
            return content
        time.sleep(0.02)  # being written, on a file system without links
    return {}  # nobody's: a process was killed while it wrote this


def _undisputed(stem: Path, own: Path, stale: Path | None) -> bool:
    """Whether nobody was faster while we looked; else our lock is withdrawn."""
    taken = stale is None or stale.exists()  # whoever takes over removes it, after that
    if not taken or (_newest(stem) or (0, own))[1] != own:
        own.unlink(missing_ok=True)
        return False
    if stale is not None:
        stale.unlink(missing_ok=True)
    return True


def _made(ours: Path, own: Path) -> bool:
    """Whether the lock was free, and is ours now."""
    try:
        os.link(ours, own)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with open(own, "x") as file:
                file.write(ours.read_text())
        except FileExistsError:
            return False
    return True


def _all(stem: Path) -> list[tuple[int, Path]]:
    """The lock's files, by number."""
    ends = ((path.name[len(stem.name) + 1 :], path) for path in stem.parent.glob(f"{stem.name}.*"))
    return sorted((int(end), path) for end, path in ends if end.isdigit())


def _newest(stem: Path) -> tuple[int, Path] | None:
    return max(_all(stem), default=None)


def _read(path: Path | None) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text()) if path else None
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _ourselves() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "space": _link("/proc/self/ns/pid"),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        **_job(),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _job() -> dict[str, str]:
    """The job of a scheduler that starts one attempt at a time, and which attempt this is."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return {"job": job, "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}
    job = os.environ.get(JOB, "")
    return {"job": job, "restart": f"{socket.gethostname()} {_link('/proc/self/ns/pid')}" if job else "0"}


def _gone(content: dict[str, Any], attempts: bool = True) -> bool:
    """Whether whoever wrote this certainly runs no more."""
    us, process = _ourselves(), content.get("process")
    if not isinstance(process, int):
        return True  # damaged
    # SLURM counts attempts for all nodes of a job; elsewhere another host may be another attempt or another node.
    known = attempts or "SLURM_JOB_ID" in os.environ
    if known and us["job"] and content.get("job") == us["job"] and content.get("restart") != us["restart"]:
        return True  # the same job was started again: what ran before is over
    if content.get("host") != us["host"]:
        return _left_queue(str(content.get("job", "")), content.get("cluster", "") == us["cluster"])
    if content.get("boot") != us["boot"]:
        return True  # the machine has been started since
    if content.get("space") != us["space"]:
        return False  # in another container: its processes cannot be seen from here
    return not alive(process) or _started(process) != content.get("started")


def _left_queue(job: str, ours: bool) -> bool:
    """Whether SLURM knows of a job that it is over; False where there is no SLURM to ask, or it does not answer.

    Args:
        job: its id.
        ours: whether it is of the cluster that is asked, as far as can be told.
    """
    squeue = shutil.which("squeue")
    if squeue is None or not job.isdigit():
        return False
    try:
        told = subprocess.run(
            [squeue, "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    # Of a job that ended long ago nothing is known any more, and that is an error.
    return ours and (not told.stdout.strip() if told.returncode == 0 else "Invalid job id" in told.stderr)


def _far(content: dict[str, Any]) -> bool:
    """Whether it cannot be seen from here when its process ends."""
    us = _ourselves()
    return bool(content) and any(content.get(key) != us[key] for key in ("host", "space"))


def _told(content: dict[str, Any], path: Path | None, what: str, else_: str) -> str:
    whose = f"process {content.get('process')} on {content.get('host')}, since {content.get('since')}"
    if not _far(content):
        return f"{what}: in use by {whose}; wait until it has ended, stop it, or choose {else_}"
    return (
        f"{what}: in use by {whose}, as far as can be seen from here; where that process is gone, remove `{path}` and "
        f"start again, else choose {else_}"
    )


def alive(process: int) -> bool:
    """Whether a process of this machine is there, whoever's it is."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _started(process: int) -> str:
    """When a process started, in the system's own ticks: its number may be another's by now."""
    fields = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
