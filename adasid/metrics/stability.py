"""Measure how much a table of semantic IDs, and its inputs, differ from an earlier one (methods 8.11)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_FLOOR = 1e-4
"""Smallest share of a bin in the stability index, which bounds the contribution of an empty bin."""


def jensen_shannon(first: ArrayLike, second: ArrayLike) -> float:
    """Compute the Jensen-Shannon divergence (Lin, 1991) in bits of two histograms over the same codes [K]: 0 for equal
    shares, 1 where no code is common. NaN if either is empty."""
    counts = [np.asarray(x, np.float64) for x in (first, second)]
    if min(c.sum() for c in counts) == 0:
        return float("nan")
    p, q = (c / c.sum() for c in counts)
    middle = (p + q) / 2

    def divergence(x: NDArray[np.float64]) -> float:
        positive = x > 0
        return float((x[positive] * np.log2(x[positive] / middle[positive])).sum())

    return (divergence(p) + divergence(q)) / 2


def stability_index(expected: ArrayLike, observed: ArrayLike) -> float:
    """Compute the population stability index ``sum (f - e) ln(f / e)`` of the shares [n] of the same bins; above .25 is
    usually called a large shift. NaN if either is empty."""
    if not np.sum(expected) or not np.sum(observed):
        return float("nan")
    e, f = (np.maximum(np.asarray(x, np.float64), _FLOOR) for x in (expected, observed))
    return float(((f - e) * np.log(f / e)).sum())
