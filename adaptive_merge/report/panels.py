"""Figures with captions under headings: planned first, drawn one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from adaptive_merge.report.style import to_svg

__all__ = ["Panel", "Plan", "Section", "draw"]

_log = logging.getLogger(__name__)
Plan = tuple[str, str, Callable[[], Figure], bool]  # title, caption, how to draw it, whether it is wide


@dataclass(frozen=True)
class Panel:
    """A figure in a page."""

    title: str
    caption: str
    svg: str
    wide: bool = False

    @property
    def width(self) -> float:
        """Width of the drawing in its own units; at one CSS pixel each, its text is just readable."""
        return float(self.svg.split('viewBox="', 1)[1].split()[2])


@dataclass
class Section:
    """A heading with figures under it."""

    title: str
    panels: list[Panel] = field(default_factory=list)


def draw(plans: Iterator[Plan], prefix: str, notes: list[str]) -> list[Panel]:
    """Draw what was planned; a failure leaves a note in place of the figure."""
    panels = []
    for number, (title, caption, make, wide) in enumerate(plans):
        try:
            panels.append(Panel(title, caption, to_svg(make(), f"{prefix}-{number}"), wide))
        except Exception as error:  # a report with a hole is better than none
            _log.warning("the figure %r could not be drawn: %r", title, error)
            notes.append(f"The figure “{title}” could not be drawn ({type(error).__name__}).")
    return panels
