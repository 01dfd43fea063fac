"""MAP's Pareto front of the coefficients of two or three tasks: what one of them costs the others.

    python scripts/coefficient_front.py --tasks fashion surface
    python scripts/coefficient_front.py --tasks fashion surface animal --samples 60 --figure front.png

MAP (Li et al., 2024, arXiv 2406.07529): merges of coefficients drawn at random are measured, a quadratic function of
the coefficients is fitted to each task's accuracy (to its logit, so that no fit leaves 0 to 100 %), and the front is
that of the functions, which cost nothing to evaluate. Embedded suite, task-wise coefficients in [0, 1]; accuracies are
fitted on one half of the test images, with their labels, and merges on the front are measured on the other half. Prints
Markdown and writes the figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import adaptive_merge as am
from adaptive_merge.report.style import MUTED, SEQUENTIAL, canvas, colour, legend, styled, tune

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
CHECKED = 7  # merges on the front that are measured
EDGE = 0.002  # of an accuracy: one image of 500
RESERVED = 5  # every fifth sample is kept out of the fit, to say how good it is


def terms(coefficients: np.ndarray) -> np.ndarray:
    """1, λᵢ and λᵢλⱼ (i ≤ j) of coefficients [n, T]: [n, (T + 1)(T + 2) / 2]."""
    count, tasks = coefficients.shape
    pairs = [coefficients[:, i] * coefficients[:, j] for i in range(tasks) for j in range(i, tasks)]
    return np.column_stack([np.ones(count), coefficients, *pairs])


def fit(coefficients: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares of each task's function, [terms, T] from [n, T] and accuracies in percent [n, T]."""
    shares = np.clip(values / 100, EDGE, 1 - EDGE)
    return np.linalg.lstsq(terms(coefficients), np.log(shares / (1 - shares)), rcond=None)[0]


def predict(coefficients: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Accuracies in percent, [n, T]."""
    return 100 / (1 + np.exp(-(terms(coefficients) @ weights)))


def explained(coefficients: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """R² of each task, [T]."""
    rest = ((values - predict(coefficients, weights)) ** 2).sum(0)
    return 1 - rest / ((values - values.mean(0)) ** 2).sum(0)


def front(values: np.ndarray) -> np.ndarray:
    """Indices of the rows of [n, T] that no other row equals or beats everywhere and beats somewhere, by the first."""
    kept: list[int] = []
    for row in np.lexsort(-values.T[::-1]):
        beaten = any((values[one] >= values[row]).all() for one in kept)
        if not beaten:
            kept.append(int(row))
    return np.array(kept)


class Merges:
    """Accuracies of task-wise merges on either half of the test images."""

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        self.suite = am.load_suite("embedded", tasks=list(tasks))
        self.backbone = self.suite.backbone.eval()
        protocol = am.Holdout(seed=seed)
        sources = self.suite.images
        self.halves = [
            {task: self._images(task, choose(task, len(sources[task]))) for task in tasks}
            for choose in (protocol.adapted, protocol.scored)
        ]

    def _images(self, task: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(one).view(-1, 1, 1) for one in (self.backbone.image_mean, self.backbone.image_std))
        source = self.suite.images[task]
        return (source.take(rows).float() / 255 - mean) / std, source.labels[rows]

    @torch.inference_mode()
    def measure(self, coefficients: np.ndarray, half: int) -> np.ndarray:
        """Accuracy in percent of every task, [n, T] from coefficients [n, T]."""
        return np.array([[self._accuracy(row, task, half) for task in self.halves[half]] for row in coefficients])

    def _accuracy(self, row: np.ndarray, task: str, half: int) -> float:
        bank = self.suite.task_vectors
        weights = bank.layout.unflatten(bank.pretrained + torch.tensor(row, dtype=torch.float32) @ bank.vectors)
        images, labels = self.halves[half][task]
        parts = [torch.func.functional_call(self.backbone, weights, (part,)) for part in images.split(128)]
        logits = nn.functional.normalize(torch.cat(parts), dim=-1) @ self.suite.heads[task].T
        return 100 * float((logits.argmax(-1) == labels).float().mean())


def grid(tasks: int) -> np.ndarray:
    """Coefficients in [0, 1] in even steps, [n, T]."""
    ticks = np.linspace(0, 1, 101 if tasks == 2 else 26)
    return np.stack(np.meshgrid(*[ticks] * tasks, indexing="ij"), -1).reshape(-1, tasks)


@styled
def picture(tasks: Sequence[str], sampled: np.ndarray, best: np.ndarray, checked: np.ndarray) -> Figure:
    """Accuracies of the samples, of the fitted front, and of the merges on it on the other half: a panel a pair.

    With three tasks the front is a surface, coloured by the task that a panel has no axis of.
    """
    pairs = list(combinations(range(len(tasks)), 2))
    figure, panels = canvas(4.8 * len(pairs), 4.0, columns=len(pairs))
    for axes, (x, y) in zip(panels, pairs):
        axes.scatter(sampled[:, x], sampled[:, y], 14, color=MUTED, alpha=0.6, label="drawn at random")
        rest = [task for task in range(len(tasks)) if task not in (x, y)]
        shade = {"c": best[:, rest[0]], "cmap": SEQUENTIAL} if rest else {"color": colour(0)}
        dots = axes.scatter(best[:, x], best[:, y], 6, label="front of the fit", zorder=1, **shade)
        axes.scatter(checked[:, x], checked[:, y], 34, color=colour(1), marker="D", label="on it, other half")
        tune(axes, x=f"{tasks[x]}: accuracy in %", y=f"{tasks[y]}: accuracy in %")
        if rest:
            figure.colorbar(dots, ax=axes, pad=0.02, fraction=0.04).set_label(f"{tasks[rest[0]]}: accuracy in %")
    legend(panels[0])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["fashion", "surface"], help="two or three of the embedded suite")
    parser.add_argument("--samples", type=int, default=40, help="merges that are measured for the fit")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the halves")
    parser.add_argument("--figure", type=Path, default=IMAGES / "coefficient_front.png")
    options = parser.parse_args()
    if len(options.tasks) not in (2, 3):
        parser.error("--tasks: give two or three")
    torch.set_num_threads(1)
    merges, random = Merges(options.tasks, options.seed), np.random.default_rng(options.seed)
    drawn = random.random((options.samples, len(options.tasks)))
    sampled = merges.measure(drawn, half=0)
    apart = np.arange(options.samples) % RESERVED == 0
    quality = explained(drawn[apart], sampled[apart], fit(drawn[~apart], sampled[~apart]))
    weights, points = fit(drawn, sampled), grid(len(options.tasks))
    predicted = predict(points, weights)
    best = front(predicted)
    shown = best[np.linspace(0, len(best) - 1, CHECKED).round().astype(int)]
    checked = merges.measure(points[shown], half=1)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    # A white ground, because pages show pictures on light and dark alike.
    picture(options.tasks, sampled, predicted[best], checked).savefig(options.figure, dpi=110, facecolor="white")
    told = ", ".join(f"{task} {value:.2f}" for task, value in zip(options.tasks, quality))
    print(f"R² on the {apart.sum()} samples kept out of the fit: {told}\n")
    print(f"| {' | '.join(f'λ {task}' for task in options.tasks)} | fit, % | other half, % |")
    print("|" + "---|" * (len(options.tasks) + 2))
    for point, guess, value in zip(points[shown], predicted[shown], checked):
        cells = [f"{one:.2f}" for one in point] + [" / ".join(f"{one:.1f}" for one in row) for row in (guess, value)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
