"""Which repeated block of a tower each parameter belongs to, by its name; decided here for all that asks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from adaptive_merge.errors import InputError

__all__ = ["blocks_by", "in_depth", "known", "numbered", "numbers", "repeated"]

Names = Mapping[str, frozenset[str]]
"""Block → the names of its tensors inside it."""

_COVERS: Final = 0.8  # share of an outer pattern's tensors that an inner one has to hold, to be the blocks
_ALIKE: Final = 0.6  # share of the names that neighbouring blocks have in common


def repeated(names: Sequence[str], dimensions: Sequence[int] | None = None) -> tuple[str | None, ...]:
    """For each parameter the repeated block that it lies in (`transformer.resblocks.3`, `layer2.1`), or None.

    Blocks are submodules whose names differ in numbers alone (`layer#.#`), and which have submodules themselves: a
    normalisation and a convolution called `bn1` and `conv2` are none, nor are the layers of an MLP inside a block. Of
    all such patterns that which holds the most tensors is taken, and one inside it where it holds nearly as many in
    neighbours that are alike, as the blocks in the stages of a ResNet or a Swin transformer are.

    Args:
        names: of the parameters.
        dimensions: of each. Where they are known, blocks have at least two matrices, if any have.
    """
    stacks = numbered(names)
    matrices = {name for name, rank in zip(names, dimensions or ()) if rank > 1}
    with_parts = {pattern: _real(blocks, matrices, 0) for pattern, blocks in stacks.items()}
    with_matrices = {pattern: _real(blocks, matrices, 2) for pattern, blocks in stacks.items()}
    for real in (with_matrices, with_parts):
        if several := {pattern: blocks for pattern, blocks in real.items() if len(blocks) > 1}:
            return _members(names, several[_innermost(several)])
    return _members(names, _stack(stacks) or max(with_parts.values(), key=_tensors, default={}))


def blocks_by(names: Sequence[str], pattern: str) -> tuple[str | None, ...]:
    """For each parameter the block that it lies in by a pattern of the user's, such as `layer*.*`.

    Raises:
        InputError: no parameter lies in such a block.
    """
    number = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"(?=\.|$)")
    members = tuple(match[0] if (match := number.match(name)) else None for name in names)
    if not any(members):
        raise InputError(
            f"`blocks` {pattern!r}: no parameter lies in such a block, * standing for numbers; {known(names)}"
        )
    return members


def known(names: Sequence[str]) -> str:
    """What is numbered among the names, for messages."""
    patterns = [f"{pattern.replace('#', '*')} ({len(blocks)})" for pattern, blocks in numbered(names).items()]
    listed = ", ".join(patterns[:8]) + ", …" * (len(patterns) > 8)
    return f"there are {listed}" if patterns else "no parameter name has a number"


def in_depth(blocks: Iterable[str | None]) -> tuple[str, ...]:
    """The blocks once each, by their numbers: names may come sorted as text."""
    return tuple(sorted({block: None for block in blocks if block}, key=lambda block: numbers(block)))


def numbered(names: Sequence[str]) -> dict[str, dict[str, frozenset[str]]]:
    """Pattern with # for numbers (`layer#.#`) → what has such a name → the names inside it; outer patterns first."""
    stacks: dict[str, dict[str, set[str]]] = {}
    for name in names:
        parts = name.split(".")
        for end in (place for place, part in enumerate(parts, 1) if part[-1:].isdigit()):
            block = ".".join(parts[:end])
            members = stacks.setdefault(re.sub(r"\d+", "#", block), {})
            members.setdefault(block, set()).add(".".join(parts[end:]))
    return {pattern: {block: frozenset(inner) for block, inner in blocks.items()} for pattern, blocks in stacks.items()}


def _tensors(blocks: Names) -> int:
    return sum(map(len, blocks.values()))


def _real(blocks: Names, matrices: set[str], least: int) -> dict[str, frozenset[str]]:
    """The blocks that have two submodules, and `least` matrices."""
    return {
        block: inner
        for block, inner in blocks.items()
        if len({name.rpartition(".")[0] for name in inner} - {""}) > 1
        and sum(f"{block}.{name}" in matrices for name in inner) >= least
    }


def _innermost(real: Mapping[str, Names]) -> str:
    covers = {pattern: _tensors(blocks) for pattern, blocks in real.items()}
    best = max(covers, key=lambda pattern: covers[pattern])  # of equals the first, which is the outer one
    for pattern, count in covers.items():
        inside = pattern.startswith(f"{best}.")
        if inside and count >= _COVERS * covers[best] and _alike(real[pattern]) >= _ALIKE:
            best = pattern
    return best


def _stack(by_pattern: Mapping[str, Names]) -> Names:
    """Single layers, where few others have a number."""
    stacks = sorted((blocks for blocks in by_pattern.values() if len(blocks) > 1), key=_tensors, reverse=True)
    clear = stacks and (len(stacks) == 1 or _tensors(stacks[0]) >= 2 * _tensors(stacks[1]))
    return stacks[0] if clear else {}


def _alike(blocks: Names) -> float:
    """Mean share of common names of neighbours in the same outer block."""
    ordered = in_depth(blocks)
    pairs = [(a, b) for a, b in zip(ordered, ordered[1:]) if a.rpartition(".")[0] == b.rpartition(".")[0]]
    shares = [len(blocks[a] & blocks[b]) / len(blocks[a] | blocks[b]) for a, b in pairs]
    return sum(shares) / len(shares) if shares else 1.0


def _members(names: Sequence[str], blocks: Names) -> tuple[str | None, ...]:
    owner = {f"{block}.{inner}" if inner else block: block for block, inners in blocks.items() for inner in inners}
    return tuple(owner.get(name) for name in names)


def numbers(block: str) -> list[int]:
    """The numbers in a block's name."""
    return [int(number) for number in re.findall(r"\d+", block)]
