"""Writing files so that a reader sees the old content or the new one, never a part of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["replacing", "save_json", "save_tensors", "save_text", "shipped", "strict_json"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    Same folder, so that the rename stays on one device; on an error the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
