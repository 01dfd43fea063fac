"""How all figures look: colours that colour-blind readers tell apart, safe labels, SVG for light and dark pages."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from adaptive_merge.errors import printable

__all__ = [
    "DIVERGING",
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "PRINT",
    "SEQUENTIAL",
    "SERIES",
    "VIEW_COLOURS",
    "VIEW_NAMES",
    "canvas",
    "colour",
    "contrasting",
    "label",
    "legend",
    "matrix",
    "luminance",
    "short",
    "span",
    "styled",
    "to_array",
    "to_svg",
    "tune",
]

# Text and lines of a figure. In SVG these become CSS variables, so that a page can give them two schemes.
INK, MUTED, GRID = "#1f2a37", "#64707d", "#d5dbe2"
# Print on coloured cells is the same in both schemes; of these two, one reads on any colour (4.5 to 1).
PAPER, PRINT = "#ffffff", "#000000"
# Okabe & Ito's palette for colour-blind readers, without its black and yellow, which one of the two grounds hides.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#8a7a5c")
VIEW_NAMES = {
    **{"pretrained": "pre-trained", "initial": "merged", "start": "start"},
    **{"adapted": "adapted", "individual": "individual"},
}
VIEW_COLOURS = {
    **{"pretrained": "#7b8794", "initial": "#e69f00", "start": "#cc79a7"},
    **{"adapted": "#0072b2", "individual": "#009e73"},
}
SEQUENTIAL = LinearSegmentedColormap.from_list("merge", ["#f3efe4", "#f2c14e", "#d9622b", "#8c1c4e", "#2d0b3a"])
DIVERGING = LinearSegmentedColormap.from_list("sides", ["#0b5394", "#7fb2d9", "#f4f4f2", "#efa36b", "#a8400a"])

_VARIABLES: Mapping[str, str] = {INK: "ink", MUTED: "muted", GRID: "grid"} | {
    value: f"series-{index}" for index, value in enumerate(SERIES)
}
_SETTINGS = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.2,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "adaptive_merge",
    "lines.linewidth": 1.7,
}

_ROW, _HANDLE = 64, 6  # characters that fit above a plot, and what the handle of an entry takes of them

# Decorator of every function that makes a figure; nothing of the caller's matplotlib settings is used or changed.
styled = matplotlib.rc_context(_SETTINGS)


def canvas(width: float = 4.8, height: float = 3.0, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of one row of axes in inches; nothing of pyplot's state is touched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def tune(axes: Axes, title: str = "", x: str = "", y: str = "", grid: str | None = "y") -> Axes:
    """Titles of the axes and hair lines along one direction."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.7)
    return axes


def legend(axes: Axes) -> None:
    """A legend above the plot, where it hides no data, in as many columns as its longest entry allows."""
    handles, names = axes.get_legend_handles_labels()
    longest = max((len(name) for name in names), default=0)
    one_row = sum(len(name) + _HANDLE for name in names) <= _ROW
    axes.figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=len(names) if one_row else max(1, min(4, len(names), _ROW // (longest + _HANDLE))),
        handlelength=1.1,
        columnspacing=1.2,
        borderaxespad=0.2,
        labelcolor=INK,
    )


def matrix(
    columns: Sequence[str],
    values: np.ndarray,
    form: str,
    colours: LinearSegmentedColormap,
    limits: tuple[float, float] | None = None,
    rows: Sequence[str] | None = None,
) -> Figure:
    """Colours with a number in each cell; the rows are called as the columns where they have no names of their own.

    Args:
        columns: C names.
        values: [R, C]; cells of NaN stay empty.
        form: of a number.
        colours: from the least to the largest.
        limits: of the colours; default: of the values that are there.
        rows: R names.
    """
    rows = columns if rows is None else rows
    low, high = limits or span(values)
    figure, (axes,) = canvas(4.8, 1.35 + 0.33 * max(len(rows), 3))
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    names = [label(name, 14) for name in columns]
    axes.set_xticks(range(len(columns)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [label(name, 20) for name in rows])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = form.format(value).replace("-0.00", "0.00")
            ink = contrasting(colours((value - low) / (high - low)))
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    axes.spines[:].set_visible(False)
    return tune(axes, grid=None).figure


def span(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest of the finite values, never the same."""
    known = np.asarray(values, float)[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 1e-6, high + 1e-6)


def contrasting(ground: Sequence[float]) -> str:
    """The print that is read best on a colour, RGB in [0, 1]."""
    return PRINT if luminance(ground) > 0.179 else PAPER


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of RGB in [0, 1] (WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def colour(index: int) -> str:
    """The colour of series number `index`; they repeat after eight."""
    return SERIES[index % len(SERIES)]


def short(name: object, limit: int = 22) -> str:
    """A name from outside as short, single-line text: control characters are written out."""
    text = " ".join(printable(str(name)).split()) or "(no name)"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def label(name: object, limit: int = 22) -> str:
    """The same for a figure, where `$` would start mathematics."""
    return short(name, limit).replace("$", r"\$")


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page that defines `--ink`, `--muted`, `--grid` and `--series-N`.

    Args:
        figure: any figure of this package; its ground stays transparent.
        name: prefix of all ids, so that several figures can live in one page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A script that the font lacks is no matter: the browser draws the text.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*|.*does not support.*")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    return re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", svg).strip()


def to_array(figure: Figure, dpi: int = 110) -> np.ndarray:
    """The figure as pixels uint8 [H, W, 3] on white, for loggers."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*|.*does not support.*")
        figure.set_facecolor("white")
        figure.set_dpi(dpi)
        drawn = FigureCanvasAgg(figure)
        drawn.draw()
        return np.asarray(drawn.buffer_rgba())[..., :3].copy()
