"""The one door for errors: which ones are the user's to mend, and what is said of them.

Every error leaves the command line here. Ours (`AdaptiveMergeError`) speak for themselves. What the machine or another
library refuses becomes one message as well, wherever it is raised before the first step. What is left is a fault of
this program: it keeps its traceback, for nobody could mend it from one line, and asks for a report.
"""

from __future__ import annotations

import errno
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from adaptive_merge.errors import AdaptiveMergeError

__all__ = ["REPORT", "message_of", "origin"]

REPORT: Final = (
    "This is a fault of adaptive-merge, not of your input. Please report it with the lines above and the command."
)
_OURS: Final = "adaptive_merge"
# Their frames say nothing of who is at fault: they do what they are called for.
_TRANSPARENT: Final = ("torch", "numpy")
# Once one of these is on the stack, a run is under way.
_STEPS: Final = ("training_step", "validation_step", "optimizer_step", "backward")
_REMEDIES: Final = {
    errno.ENOSPC: "make room, or choose another --run.root",
    errno.EDQUOT: "your quota is used up: make room, or choose another --run.root",
    errno.EACCES: "you may not read or write it: change its permissions, or choose another place",
    errno.EPERM: "you may not read or write it: change its permissions, or choose another place",
    errno.EROFS: "it is on a read-only file system: choose another place",
    errno.ENOENT: "it is not there",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
    errno.EIO: "the disk cannot be read: copy the file from elsewhere",
    errno.ESTALE: "the network file system lost it: start again",
}


def message_of(error: BaseException) -> str | None:
    """What to tell the user, in one message; None for a fault of this program."""
    if isinstance(error, AdaptiveMergeError):
        return str(error)
    if (buried := next((e for e in _chain(error) if isinstance(e, AdaptiveMergeError)), None)) is not None:
        return str(buried)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _of_memory(error)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, ValueError) and "null byte" in str(error):
        return "a path holds a null byte, which no file's name can; correct it"
    if any(frame.f_code.co_name in _STEPS for frame, _ in traceback.walk_tb(error.__traceback__)):
        return None
    place = origin(error)
    return None if place == _OURS else _of_library(error, place)


def origin(error: BaseException) -> str:
    """The package that raised it, or the file of a user's own part."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((place for file in reversed(files) if (place := _package(file)) is not None), _OURS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The causes of an error that others raised from it; what they raised while handling another does not count."""
    seen: list[BaseException] = []
    cause = error.__cause__
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__
    return iter(seen)


def _package(file: str) -> str | None:
    """The package of a file of code, a user's own by its path; None for those that say nothing."""
    path = Path(file).resolve()
    if path.is_relative_to(Path(__file__).resolve().parent.parent):
        return _OURS
    # By name and not by this interpreter's own folders: packages may lie in a user's, or in another environment's.
    homes = [place for place, part in enumerate(path.parts[:-1]) if part in ("site-packages", "dist-packages")]
    if homes:
        name = path.parts[homes[-1] + 1].removesuffix(".py")
        return None if name in _TRANSPARENT else name
    if file.startswith("<") or path.is_relative_to(sysconfig.get_path("stdlib")):
        return None
    return str(file)


def _of_memory(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return (
        f"not enough memory ({first or type(error).__name__}); lower --data.images_per_task or "
        "--data.eval_batch_size, set --suite.dtype bfloat16, or take fewer tasks with --suite.tasks"
    )


def _of_system(error: OSError) -> str:
    files = " and ".join(f"`{os.fsdecode(name)}`" for name in (error.filename, error.filename2) if _is_path(name))
    reason = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "--debug shows where it was needed")
    return f"{files + ': ' if files else ''}{reason}; {remedy}"


def _is_path(name: object) -> bool:
    return isinstance(name, (str, bytes, os.PathLike))


def _of_library(error: BaseException, place: str) -> str:
    """`place`: the package, or the file of a user's part."""
    text = " ".join(str(error).split()) or "no reason is given"
    who = f"`{place}`" if os.sep in place else place
    return f"{who} refuses this: {text} ({type(error).__name__}); --debug shows where"
