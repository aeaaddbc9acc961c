"""Compute the rank correlation that checks whether a norm measures popularity (methods 7.4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def average_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks from 1; equal values get their mean rank. [n] -> [n]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Compute Spearman's rank correlation of two vectors [n]; NaN if one is constant or n < 2."""
    if len(x) < 2:
        return float("nan")
    a, b = average_ranks(x), average_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")
