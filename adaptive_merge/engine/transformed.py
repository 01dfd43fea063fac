"""What transforms make of a bank: in an order that makes sense, and read from a file where the bank is kept as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from adaptive_merge import transforms as package
from adaptive_merge.engine import identity
from adaptive_merge.errors import InputError
from adaptive_merge.merge.bank_file import code_of, kept_file
from adaptive_merge.merge.outline import is_outline
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform

__all__ = ["check_order", "transformed"]

_NESTED = 12  # transforms in transforms that an identity tells apart


def transformed(bank: TaskVectors, transforms: Sequence[Any]) -> TaskVectors:
    """The bank after all transforms, in order.

    Where the bank is kept in a folder (`kept_bank`), so is the result, and a second run or another process of the
    node reads it from there. The file is named by what it is made of: the bank's fingerprint, the kind and settings of
    each transform, and their source. It is not named by its content, of which the last bits depend on the machine.
    Transforms of a user's own, whose source is not known, are always computed.

    Args:
        bank: the experts.
        transforms: `Transform`s, or other functions of a bank.

    Raises:
        InputError: an order that makes no sense; a file that is damaged.
    """
    check_order(transforms)
    if not transforms:
        return bank
    if is_outline(bank):
        made = bank.with_vectors(bank.vectors)
    elif bank.folder is not None and all(_ships(transform) for transform in transforms):
        made_of = _identity(bank, transforms)
        name = f"transformed-{hashlib.sha256(made_of.encode()).hexdigest()}.safetensors"
        made = kept_file(bank.folder / name, lambda: _apply(bank, transforms), made_of)
    else:
        made = _apply(bank, transforms)
    for transform in transforms:
        made.published = getattr(transform, "published", None) or made.published
    return made


def check_order(transforms: Sequence[Any]) -> None:
    """InputError where a transform gets what it makes no sense of."""
    joint = ""
    for place, transform in enumerate(transforms):
        takes, name = getattr(transform, "takes", "rows"), identity.kind(transform)
        if takes == "experts" and place:
            before = identity.kind(transforms[place - 1])
            raise InputError(
                f"{name} compares a merge with the task vectors that it is made of, but gets what {before} has made of "
                f"them: put {before} inside, `{name}(transform={before}(…))`, and {name} first in the list"
            )
        if takes == "own" and joint:
            raise InputError(
                f"{name} needs what each task has changed, but after {joint} the rows are shares of one merge; keep "
                "one of the two"
            )
        joint = joint or (name if _joint(transform) else "")


def _joint(transform: Any) -> bool:
    inner = getattr(transform, "transform", None)
    return getattr(transform, "joint", False) or (inner is not None and _joint(inner))


def _ships(part: Any) -> bool:
    """Whether a transform, and each inside it, is one of this package's."""
    inside = identity.settings(part).values() if isinstance(part, Transform) else [None]
    return "." not in identity.kind(part) and all(
        isinstance(value, (int, float, str, list, type(None))) or (isinstance(value, Transform) and _ships(value))
        for value in inside
    )


def _identity(bank: TaskVectors, transforms: Sequence[Any]) -> str:
    parts: dict[str, Any] = {"experts": bank.fingerprint, "blocks": bank.layout.pattern}
    for number, transform in enumerate(transforms, 1):
        parts |= identity.of_part(f"transform {number}", transform, _NESTED)
    return json.dumps(parts | {"source": code_of(package)})


def _apply(bank: TaskVectors, transforms: Sequence[Any]) -> TaskVectors:
    bank = bank.dense()  # of factors, for they look at all entries
    for transform in transforms:
        bank = transform(bank)
    return bank
