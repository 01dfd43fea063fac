"""Where each parameter lives in a flat buffer, and which repeated block it belongs to."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

__all__ = ["Layout"]

# The first numbered part of a name: `transformer.resblocks.` and `3` of `transformer.resblocks.3.ln_1.weight`.
_NUMBERED = re.compile(r"^((?:.*?\.)?)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Layout:
    """Where each named parameter lives in a flat buffer of P entries: parameter after parameter.

    Args:
        names: parameter names, in `named_parameters()` order.
        shapes: their shapes, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The part of the flat buffer that each parameter occupies."""
        ends, end = [], 0
        for shape in self.shapes:
            ends.append((end, end := end + math.prod(shape)))
        return tuple(slice(*bounds) for bounds in ends)

    @property
    def numel(self) -> int:
        """P, the number of entries."""
        return self.slices[-1].stop if self.slices else 0

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The parameters as views of `flat` [P]; nothing is copied."""
        return tuple(flat[part].view(shape) for part, shape in zip(self.slices, self.shapes))

    @cached_property
    def blocks(self) -> tuple[str | None, ...]:
        """For each parameter the repeated block it belongs to (`transformer.resblocks.3`), or None.

        The blocks are the numbered children of the container that holds the most tensors, so that the three
        convolutions of a stem are not taken for transformer blocks.
        """
        numbered = [_NUMBERED.match(name) for name in self.names]
        if not any(numbered):
            return (None,) * len(self.names)
        container, _ = Counter(found[1] for found in numbered if found).most_common(1)[0]
        return tuple(f"{container}{found[2]}" if found and found[1] == container else None for found in numbered)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Name → parameter, as views of `flat` [P]."""
        return dict(zip(self.names, self.views(flat)))
