"""Checkpoints and adapter files of version 0.1.0 in today's words.

They named a part by the module that its class lived in, took every public attribute for a setting, and counted the
recipe's label. What they keep beyond a constructor's arguments follows from these, and is left aside.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from adaptive_merge.adapters.heads import Head

__all__ = ["upgraded", "upgraded_adapters"]

# The path of a module of this package, up to the first name that is not another module's.
_HOME: Final = re.compile(r"adaptive_merge\.(?:[a-z0-9_]+\.)*(?=\w)")
# Attribute → the argument that it held.
_ARGUMENT: Final = {"needs_blocks": "blocks", "filters": "confident", "unseen": "tasks"}
_FUNCTION: Final = "builtins.function"  # of a transform; what it did shows in the task vectors


def upgraded(recorded: Mapping[Any, Any], current: Mapping[str, Any]) -> dict[Any, Any]:
    """An old identity in today's words, to be compared with `current`; values stay unchecked."""
    # A setting that was not recorded, such as one behind a property, cannot be compared.
    entries = {name: value for name, value in current.items() if ": " in name or name == "experts"}
    for name, value in recorded.items():
        part, colon, setting = str(name).rpartition(": ")
        if colon and name not in current:
            name = f"{part}: {_ARGUMENT.get(setting, setting)}"
        if name in current or not (colon or name == "recipe"):
            entries[name] = _renamed(value, current.get(name))
    return entries


def upgraded_adapters(
    manifest: Mapping[str, Any], current: Mapping[str, Any], heads: Mapping[str, Head]
) -> dict[str, Any]:
    """The identity in the manifest of an adapter file of version 1, to be compared with `current`.

    Args:
        manifest: named rank, layer and depth of adapters, and bounds and granularity of coefficients.
        current: of the module that the file is for.
        heads: of that module; their digests were made in another way.
    """
    unnamed = {name: value for name, value in current.items() if re.match(r"transform \d|coefficients$", name)}
    experts = {f"expert {task!r}": print_ for task, print_ in manifest["experts"].items() if task != "pretrained"}
    entries = unnamed | experts | {name: manifest[name] for name in ("tasks", "task vectors")}
    entries |= {"pre-trained model": manifest["experts"]["pretrained"], "coefficients: bounds": manifest["bounds"]}
    for number, adapter in enumerate(manifest["adapters"], 1):
        named = {f"adapter {number}: {name}": value for name, value in adapter.items() if name != "kind"}
        entries |= {f"adapter {number}": adapter["kind"]} | named
    for task, print_ in manifest["heads"].items():
        name, head = f"head of task {task!r}", heads[task].bare() if task in heads else None
        same = isinstance(head, Tensor) and print_ == _old_digest(head)
        entries[name] = current.get(name) if same else print_
    return upgraded(entries, current)


def _renamed(value: Any, current: Any) -> Any:
    if not isinstance(value, str) or value == current:
        return value
    return current if value == _FUNCTION else _HOME.sub("", value, count=1) if _HOME.match(value) else value


def _old_digest(head: Tensor) -> str:
    flat = head.detach().cpu().contiguous().float()
    return hashlib.sha256(str(tuple(flat.shape)).encode() + flat.numpy().tobytes()).hexdigest()
