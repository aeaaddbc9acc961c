"""Compute AUC over all samples and GAUC, its mean over users weighted by their samples (DIN, arXiv 1706.06978; methods
8.8), with bootstrap intervals over users."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def auc(scores: Floats, labels: NDArray[np.int64], weights: Floats | None = None) -> float:
    """Compute the probability that a positive scores higher than a negative, where ties count half (Mann-Whitney); NaN
    with one class only. ``scores``, ``labels`` (0 or 1) and ``weights`` [n]."""
    return _auc(*_sorted(scores), labels, np.ones(len(scores)) if weights is None else weights)


def _sorted(scores: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the order of the scores, and for each score in that order the index of its group of ties."""
    order = np.argsort(scores, kind="stable")
    return order, np.cumsum(np.concatenate([[0], np.diff(scores[order]) > 0])) if len(scores) else np.zeros(0, np.int64)


def _auc(order: NDArray[np.int64], group: NDArray[np.int64], labels: NDArray[np.int64], w: Floats) -> float:
    positive = np.bincount(group, w[order] * labels[order], minlength=1)
    negative = np.bincount(group, w[order] * (1 - labels[order]), minlength=1)
    pairs = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs > 0 else float("nan")


def user_auc(users: NDArray[np.int64], scores: Floats, labels: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the AUC of each user that has both classes, and its number of samples: [u], [u]. Ties count half."""
    order = np.lexsort((scores, users))
    u, s, y = users[order], scores[order], labels[order].astype(np.float64)
    if not len(u):
        return np.zeros(0), np.zeros(0)
    first = np.concatenate([[True], u[1:] != u[:-1]])
    owner = np.cumsum(first) - 1
    tie = np.cumsum(first | np.concatenate([[True], s[1:] != s[:-1]])) - 1
    below_all = np.cumsum(1 - y) - (1 - y)
    starts = np.flatnonzero(first)
    tie_start = np.flatnonzero(np.concatenate([[True], tie[1:] != tie[:-1]]))
    below = below_all[tie_start][tie] - below_all[starts][owner]
    level = np.bincount(tie, 1 - y)[tie]
    wins = np.bincount(owner, y * (below + level / 2))
    positives, negatives, size = np.bincount(owner, y), np.bincount(owner, 1 - y), np.bincount(owner).astype(np.float64)
    both = (positives > 0) & (negatives > 0)
    return wins[both] / (positives * negatives)[both], size[both]


def ranking_metrics(
    users: NDArray[np.int64], scores: Floats, labels: NDArray[np.int64], draws: int = 0, seed: int = 0
) -> dict[str, float | list[float]]:
    """Compute ``auc``, ``gauc``, ``gauc_users`` (those with both classes), ``samples``; with ``draws`` the 95 %
    bootstrap intervals ``auc_interval`` and ``gauc_interval`` over users, of at least two. Metrics that are undefined
    with one class are omitted."""
    aucs, size = user_auc(users, scores, labels)
    result: dict[str, float | list[float]] = {"gauc_users": float(len(aucs)), "samples": float(len(scores))}
    if not 0 < labels.sum() < len(labels):
        return result
    result["auc"] = auc(scores, labels)
    if len(aucs):
        result["gauc"] = float((aucs * size).sum() / size.sum())
    if draws and len(np.unique(users)) > 1:
        rng = np.random.default_rng(seed)
        user_index = np.unique(users, return_inverse=True)[1].reshape(-1)
        everyone, ties = user_index.max() + 1, _sorted(scores)
        drawn = [_auc(*ties, labels, _times(rng, everyone)[user_index]) for _ in range(draws)]
        result["auc_interval"] = [float(x) for x in np.nanquantile(drawn, (0.025, 0.975))]
        if len(aucs) > 1:
            gauc = [np.average(aucs, weights=size * _times(rng, len(aucs))) for _ in range(draws)]
            result["gauc_interval"] = [float(x) for x in np.quantile(gauc, (0.025, 0.975))]
    return result


def _times(rng: np.random.Generator, users: int) -> Floats:
    """Draw how often each user is in a bootstrap sample."""
    return np.bincount(rng.integers(0, users, users), minlength=users).astype(np.float64)
