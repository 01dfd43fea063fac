"""Draw the README's pictures from a run: python scripts/make_pictures.py runs/demo"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from adaptive_merge.coefficients.files import load_coefficients
from adaptive_merge.report.coefficient_figures import coefficient_heatmap
from adaptive_merge.report.figures import accuracy_bars

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with results.json and coefficients.json")
    run = parser.parse_args().run
    scores = json.loads((run / "results.json").read_text())["tasks"]
    for row in scores.values():
        if "anchor" in row:  # as people read it: the merge, then the start
            row |= {"initial": row["anchor"], "start": row["initial"]}
    coefficients = load_coefficients(run / "coefficients.json")
    groups = list(next(iter(coefficients.values())))
    values = np.array([[row[group] for group in groups] for row in coefficients.values()])
    IMAGES.mkdir(parents=True, exist_ok=True)
    pictures = {
        "accuracy": accuracy_bars(scores),
        "coefficients": coefficient_heatmap(list(coefficients), groups, values),
    }
    for name, figure in pictures.items():
        # A white ground, because pages show pictures on light and dark alike.
        figure.savefig(IMAGES / f"{name}.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
