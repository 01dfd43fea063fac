"""The one door for files: whoever reads sees the old content or the new one, never a part; an error is one message."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adaptive_merge.errors import InputError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    *("check_output", "note", "observing", "replacing", "reserve", "save_json", "save_tensors", "save_text"),
    *("shipped", "sparing", "strict_json"),
]

_log = logging.getLogger(__name__)
_OBSERVERS: Final[list[Callable[[Path], None]]] = []
_TOLD: Final[set[str]] = set()
_NO_ALLOCATION: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    Same folder, so that the rename stays on one device; on an error the temporary file is removed. The new file has
    the permissions that the umask leaves.

    Raises:
        InputError: `path` is a link, a device, a folder: no regular file is lost, and nothing else is replaced.
        StorageError: it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    _check_regular(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        note(path)
        with _cleared(partial):
            mode = _created(partial)
            yield partial
            _finish(partial, path, mode)
    except Exception as error:  # the libraries that write have errors of their own for a full disk
        if reason := _refusal(error):
            raise StorageError(f"{path}: cannot be written ({reason}); make room, or choose another place") from error
        raise


@contextmanager
def sparing(what: str | Path) -> Iterator[None]:
    """What is written in here is not the result: where it fails, the run goes on, and one warning names `what`."""
    try:
        yield
    except Exception as error:
        if str(what) not in _TOLD:
            _TOLD.add(str(what))
            _log.warning("%s is left out, the run goes on without it: %s", what, error)


@contextmanager
def observing(observer: Callable[[Path], None]) -> Iterator[None]:
    """Tell `observer` of each file before it is written."""
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.remove(observer)


def note(path: str | Path) -> None:
    """Tell whoever keeps a journal that `path` is about to be written."""
    for observer in _OBSERVERS:
        observer(Path(path))


def check_output(path: str | Path, force: bool) -> None:
    """For an `--output` of a command, before any work is done.

    Raises:
        InputError: a file is there and `force` is not set; it is no regular file.
    """
    path = Path(path)
    _check_regular(path)
    if path.exists() and not force:
        raise InputError(f"`{path}` exists already; choose another --output, or replace it with --force")


def reserve(path: str | Path, size: int) -> None:
    """Make the file `size` bytes long with room on the disk for all of them: a write to its map then cannot fail.

    Without it a full disk ends the process with SIGBUS.

    Raises:
        StorageError: there is no room.
    """
    try:
        with open(path, "ab") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except (OSError, AttributeError) as error:
                if getattr(error, "errno", None) not in (None, *_NO_ALLOCATION):
                    raise
                missing = size - os.fstat(file.fileno()).st_size
                for start in range(0, missing, 1 << 20):
                    file.write(bytes(min(1 << 20, missing - start)))
            file.truncate(size)
    except OSError as error:
        raise StorageError(
            f"{path}: {size:,} bytes cannot be reserved ({error.strerror or error}); make room, or choose another place"
        ) from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; views and device tensors are copied first where needed."""
    from safetensors.torch import save_file  # here, because it imports torch, which takes seconds

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storages = [tensor.untyped_storage().data_ptr() for tensor in plain.values()]
    shared = len(set(storages)) < len(storages)
    with replacing(path) as partial:
        # safetensors refuses tensors that share a storage, which the views of a flat buffer do.
        save_file({k: v.clone() for k, v in plain.items()} if shared else plain, partial, dict(metadata or {}))


def save_json(path: str | Path, content: Any) -> None:
    """Write JSON, atomically, indented for people; see `strict_json`."""
    save_text(path, strict_json(content, indent=2) + "\n")


def strict_json(content: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON as its standard has it: numbers that are not finite, which it has not, are null; `default` as in `json`."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False, default=default)
    except ValueError:
        plain = _without_nan(json.loads(json.dumps(content, default=default)))
        return json.dumps(plain, indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8, atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def shipped() -> Path:
    """The folder of the recipes and suites that come with the package: in it or, in a checkout, beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _check_regular(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except OSError:  # not there, or its folder cannot be read: writing will say so
        return
    if not stat.S_ISREG(kind):
        name = "a link" if stat.S_ISLNK(kind) else "a folder" if stat.S_ISDIR(kind) else "no regular file"
        raise InputError(f"`{path}` is {name}, and is not replaced; remove it, or choose another place")


@contextmanager
def _cleared(partial: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _created(partial: Path) -> int:
    """Make the file, empty; the permissions that it got."""
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def _finish(partial: Path, path: Path, mode: int) -> None:
    """To the disk, and in place of the old one."""
    with open(partial, "rb+") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:  # safetensors makes a file of its own
            os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no such thing for folders
            os.fsync(folder)
    finally:
        os.close(folder)


def _refusal(error: Exception) -> str | None:
    """Why the system did not take the bytes; None for any other error."""
    if isinstance(error, OSError):
        return None if isinstance(error, StorageError) else error.strerror or str(error) or type(error).__name__
    # safetensors and torch wrap the system's error in one of their own.
    text = str(error)
    return text if type(error).__name__ == "SafetensorError" or "os error" in text else None
