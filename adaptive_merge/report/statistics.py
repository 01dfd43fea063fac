"""Are two methods different? Means, spreads and an exact test on pairs, in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

__all__ = ["mean_and_deviation", "sign_flip_test"]

_EXACT = 16  # up to so many pairs all sign patterns are counted
_DRAWS = 20_000


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter where there is one value."""
    numbers = np.asarray(values, float)
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None


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
