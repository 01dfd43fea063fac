"""Are two methods different? Means, spreads, intervals and tests on pairs, in plain numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

__all__ = [
    "LEVEL",
    "Difference",
    "half_width",
    "independent_images",
    "mean_and_deviation",
    "paired_images",
    "sign_flip_test",
    "wilson",
]

LEVEL = 0.05
"""p below which a difference is called one."""

Scores = Mapping[str, Mapping[str, float]]
"""Task → view → accuracy in [0, 1], and `n` images."""
Verdicts = Mapping[str, np.ndarray]
"""Task → for each image 1 where the model was right, 0 where it was not, or the mean over several runs, [n]."""

_Z = 1.96  # of the normal distribution at 95 %
_EXACT = 16  # up to so many pairs all sign patterns are counted
_DRAWS = 20_000


@dataclass(frozen=True)
class Difference:
    """A difference of two means over tasks and how surely there is one.

    Args:
        difference: second less first, a share in [−1, 1].
        error: standard error of it.
        images: that were compared.
        paired: whether both were asked about the same images, one by one.
    """

    difference: float
    error: float
    images: int
    paired: bool

    @property
    def p(self) -> float:
        """Two-sided, by the normal distribution; 1 where nothing differs."""
        if not self.error:
            return float(self.difference == 0)
        return math.erfc(abs(self.difference) / self.error / math.sqrt(2))

    @property
    def significant(self) -> bool:
        """Whether p is below `LEVEL`."""
        return self.p < LEVEL

    @property
    def words(self) -> str:
        """The test in words."""
        return f"{'paired over' if self.paired else 'binomial,'} {self.images:,} images"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter where there is one value."""
    numbers = np.asarray(values, float)
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None


def wilson(share: float, count: float) -> tuple[float, float]:
    """Ends of the 95 % interval of a binomial share of `count` images (Wilson, 1927)."""
    if count <= 0:
        return share, share
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    reach = _Z * math.sqrt(share * (1 - share) / count + (_Z / (2 * count)) ** 2) / (1 + _Z**2 / count)
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


def half_width(tasks: Scores, view: str) -> float:
    """Half of the 95 % interval of a view's mean over tasks, each a binomial share of its own images."""
    return _Z * math.sqrt(_variance(tasks, view))


def paired_images(first: Verdicts, second: Verdicts, seeds: float = 0.0) -> Difference:
    """Second less first, mean over tasks, with both asked about the same images: a sign-flip test of the pairs.

    Flipping the sign of each image's difference d has the variance Σₜ Σ d² / (T nₜ)²; over hundreds of images its
    distribution is normal. With one task and no ties it is McNemar's test without a correction.

    Args:
        first: task → verdicts.
        second: of the same tasks and images.
        seeds: variance of the difference of the two means over seeds, where there are several.
    """
    gaps = [np.asarray(second[task], float) - np.asarray(first[task], float) for task in first]
    variance = sum(float((gap**2).sum()) / len(gap) ** 2 for gap in gaps) / len(gaps) ** 2
    mean = float(np.mean([gap.mean() for gap in gaps]))
    return Difference(mean, math.sqrt(variance + seeds), sum(map(len, gaps)), True)


def independent_images(first: Scores, second: Scores, view: str = "adapted", seeds: float = 0.0) -> Difference:
    """The same from accuracies alone, as if the images were others: it finds less."""
    difference = float(np.mean([row[view] for row in second.values()]) - np.mean([row[view] for row in first.values()]))
    error = math.sqrt(_variance(first, view) + _variance(second, view) + seeds)
    return Difference(difference, error, int(sum(row["n"] for row in second.values())), False)


def sign_flip_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of paired differences under "their signs are chance" (Fisher's randomisation test).

    Exact up to 16 pairs, beyond that from 20,000 fixed draws. n pairs cannot give less than 2/2ⁿ. None for
    fewer than two pairs.

    Example:
        >>> sign_flip_test([0.1, 0.2, 0.1, 0.3])
        0.125
    """
    values = np.asarray(differences, float)
    if len(values) < 2:
        return None
    if len(values) <= _EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), (_DRAWS, len(values)))
        signs[0] = 1.0
    reached = np.abs(signs @ values) >= abs(values.sum()) - 1e-12
    return float(reached.mean())


def _variance(tasks: Scores, view: str) -> float:
    """Of the mean over tasks; with Agresti and Coull's two more of either kind, so that 0 and 1 have one as well."""
    shares = [((row[view] * row["n"] + 2) / (row["n"] + 4), row["n"] + 4) for row in tasks.values()]
    return sum(share * (1 - share) / count for share, count in shares) / len(shares) ** 2
