"""Put the figures of `scripts/benchmark.py --device cuda --json FILE` into the table of docs/gpu.md, a row a setting.

    python scripts/gpu_table.py FILE [--card NAME] [--page docs/gpu.md]

Rows of the same card, model, tasks and images are replaced; the others stay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLUMNS = ("card", "torch", "tower", "T", "images a task", "floor, ms", "ours, ms", "naive, ms", "peak of each, GiB")
CONTENDERS = ("floor", "ours", "naive")
KEY = (0, 2, 3, 4)


def table(page: str, figures: dict, card: str) -> str:
    """The page with the rows of these figures."""
    above, begin, rest = page.partition(BEGIN)
    old, end, below = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"gpu_table: the page has no lines {BEGIN} and {END}; nothing was written")
    measured = [cells for cells in map(split, old.splitlines()) if len(cells) == len(COLUMNS)][2:]
    rows = {key(cells): cells for cells in measured}
    rows |= {key(cells): cells for cells in (row(one, figures["torch"], card) for one in figures["rows"])}
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(rows[one] for one in sorted(rows, key=order))]
    return f"{above}{begin}\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n{end}{below}"


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def key(cells: list[str]) -> tuple[str, ...]:
    return tuple(cells[place] for place in KEY)


def order(one: tuple[str, ...]) -> tuple[str, str, int, int]:
    card, tower, tasks, images = one
    return card, tower, int(tasks), int(images)


def row(one: dict, version: str, card: str) -> list[str]:
    seconds, peaks = one["seconds"], one["peak_bytes"]
    times = [f"{1e3 * seconds[name]:.1f}" if name in seconds else "none" for name in CONTENDERS]
    memory = " / ".join(f"{peaks[name] / 2**30:.2f}" if peaks.get(name) else "none" for name in CONTENDERS)
    return [card, version, one["model"], str(one["tasks"]), str(one["images"]), *times, memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--card", help="default: what CUDA calls the first device")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "gpu.md")
    options = parser.parse_args()
    figures = json.loads(options.file.read_text())
    options.page.write_text(table(options.page.read_text(), figures, options.card or first_device()))


def first_device() -> str:
    import torch  # here, because it takes seconds and a card may be named

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
