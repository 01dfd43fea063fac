"""Where each parameter lives in a flat buffer, and which repeated block it belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.blocks import blocks_by, in_depth, known, repeated

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Where each named parameter lives in a flat buffer of P entries: parameter after parameter.

    Args:
        names: parameter names, in `named_parameters()` order.
        shapes: their shapes, in the same order.
        pattern: of the repeated blocks' names, with * for numbers (`layer*.*`); None: see `repeated`.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    pattern: str | None = None

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
        """For each parameter the repeated block that it belongs to (`transformer.resblocks.3`), or None."""
        if self.pattern is not None:
            return blocks_by(self.names, self.pattern)
        return repeated(self.names, [len(shape) for shape in self.shapes])

    def depth(self, what: str) -> tuple[str, ...]:
        """The repeated blocks, front to back.

        Args:
            what: needs them, for the message.

        Raises:
            InputError: there are none, or none that can be told by their names.
        """
        ordered = in_depth(self.blocks)
        if not ordered:
            raise InputError(
                f"{what} works on the repeated blocks of the backbone, but {known(self.names)}; name its blocks "
                "with `blocks`, such as 'layer*.*'"
            )
        return ordered

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Name → parameter, as views of `flat` [P]."""
        return dict(zip(self.names, self.views(flat)))
