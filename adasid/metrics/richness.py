"""Richness in [0, 1] says how much is known about an item: the norm of its behaviour vector, or its training count.

The Spark pipeline and the Python API share these formulas. Source: ADC-SID (arXiv 2510.25622 v3), eqs 15 and 16;
methods 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adasid.config import Features
from adasid.errors import InputError

_ROUNDING = 1e-3
"""Relative spread of the norms of vectors that were normalized and stored as half floats, at most."""


class RichnessScale(NamedTuple):
    """A fitted scale maps a value to richness, ``(value - low) / (high - low)`` clipped to [0, 1].

    ``source``: value is the norm, or log(1 + count). ``low``, ``high``: bounds in units of that value. ``spearman``:
    rank correlation of norm and count, None where no counts were given. ``mean``: mean richness of the fitted items
    that have behaviour.
    """

    source: Literal["norm", "count"]
    low: float
    high: float
    spearman: float | None
    mean: float

    def richness(self, values: NDArray[Any], present: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Scale ``values`` [n], norms or counts as ``source`` says, to richness [n]; 0 where not ``present`` [n]."""
        plain = values.astype(np.float64)
        raw = plain if self.source == "norm" else np.log1p(plain)
        if self.high > self.low:
            unit = np.clip((raw - self.low) / (self.high - self.low), 0.0, 1.0)
        else:
            unit = np.full(len(raw), 0.5)
        return np.where(present, unit, 0.0).astype(np.float32)


def vector_norms(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the Euclidean norms [n] of ``vectors`` [n, D], summed in double precision from left to right as Spark
    does."""
    squares = np.cumsum(np.square(vectors.astype(np.float64)), axis=1)[:, -1]
    return np.asarray(np.sqrt(squares), np.float32)


def fit_scale(
    norms: NDArray[np.float32],
    counts: NDArray[np.int64] | None,
    features: Features | None = None,
) -> RichnessScale:
    """Fit the scale on the items that have a behaviour vector: ``norms`` [n], training ``counts`` [n] or None.

    The norm is clipped to ``features.norm_percentiles`` and min-max scaled. If counts are given, the norm must be a
    proxy of them: below ``features.proxy_min_spearman`` richness is min-max of log(1 + count) instead.

    Raises InputError for no items or a norm that is not finite.
    """
    features = features or Features()
    n = len(norms)
    if not n:
        raise InputError("richness: no item has a behaviour vector; bring vectors that are neither NaN nor zero")
    ranked = np.sort(norms)
    if not np.isfinite(ranked[-1]):
        raise InputError(f"richness: a norm of the behaviour vectors is {ranked[-1]}; bring vectors of finite norm")
    correlation, equal = None, constant(float(ranked[0]), float(ranked[-1]))
    if counts is not None:
        correlation = 0.0 if equal else _spearman(norms, counts)
    if counts is not None and correlation is not None and correlation < features.proxy_min_spearman:
        low, high = math.log1p(int(counts.min())), math.log1p(int(counts.max()))
        scale = RichnessScale("count", low, high, correlation, 0.0)
        values: NDArray[Any] = counts
    else:
        low, high = quantiles(lambda rank: float(ranked[rank]), quantile_ranks(features.norm_percentiles, n))
        low = high if equal else low
        scale = RichnessScale("norm", low, high, correlation, 0.0)
        values = norms
    mean = scale.richness(values, np.ones(n, bool)).mean(dtype=np.float64)
    return scale._replace(mean=float(mean))


def _spearman(norms: NDArray[np.float32], counts: NDArray[np.int64]) -> float:
    """Compute Spearman(norm, count), where equal values share their mean rank."""
    n, x, y = len(norms), _ranks(norms), _ranks(counts)
    step = max(1, 2**62 // (2 * n) ** 2)  # no sum of 64-bit integers overflows
    starts = range(0, n, step)
    xy, xx, yy = (
        sum(int((a[i : i + step] * b[i : i + step]).sum()) for i in starts) for a, b in ((x, y), (x, x), (y, y))
    )
    return rank_correlation(n, xy, xx, yy)


def _ranks(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return twice the mean rank of each value [n], from 1."""
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (2 * (np.cumsum(sizes) - sizes) + sizes + 1)[inverse]


def rank_correlation(n: int, xy: int, xx: int, yy: int) -> float:
    """Compute Spearman's correlation of ``n`` pairs of mean ranks x and y from exact sums of doubled ranks, of 2x * 2y,
    of (2x)^2 and of (2y)^2; 0 where x or y is constant."""
    centre = n * (n + 1) ** 2
    variances = (xx - centre) * (yy - centre)
    return (xy - centre) / math.sqrt(variances) if variances else 0.0


def constant(least: float, most: float) -> bool:
    """Return whether norms between ``least`` and ``most`` differ by no more than rounding, as those of normalized
    vectors do."""
    return most - least <= _ROUNDING * most


def quantile_ranks(percents: Sequence[float], size: int, first: int = 0) -> list[tuple[int, int, float]]:
    """Return, for each percent, the two neighbouring ranks among ``size`` rows from rank ``first``, and the
    interpolation weight."""
    at = [(size - 1) * percent / 100 for percent in percents]
    return [(first + int(x), first + min(int(x) + 1, size - 1), x - int(x)) for x in at]


def quantiles(value: Callable[[int], float], ranks: Iterable[tuple[int, int, float]]) -> list[float]:
    """Return quantiles, interpolated linearly between the ``value`` of two ranks as in NumPy."""
    return [value(low) * (1 - share) + value(high) * share for low, high, share in ranks]


def unit(value: float, low: float, high: float) -> float:
    """Scale by min and max, clipped to [0, 1]; 0.5 for all if there is no spread."""
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5
