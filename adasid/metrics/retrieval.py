"""Recall and NDCG of a single held-out item in one ranked list over the full catalogue (methods 8.6)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CUTOFFS = (5, 10, 20, 50, 100)
DEEPEST = max(CUTOFFS)


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """1-based rank of each row's target. ``scores`` [B, M], ``targets`` [B] (int64) -> [B]. Equal scores rank by index; a target whose
    score is not a number ranks last."""
    own = scores.gather(1, targets[:, None])
    ranks = 1 + (scores > own).sum(1, dtype=torch.int32)
    tied = torch.nonzero((scores >= own).sum(1, dtype=torch.int32) > ranks).flatten()  # rare: another item has exactly the target's score
    before = torch.arange(scores.shape[1], device=scores.device)[None, :] < targets[tied, None]
    ranks[tied] += ((scores[tied] == own[tied]) & before).sum(1)
    return torch.where(own[:, 0].isnan(), scores.shape[1], ranks)


def recall_ndcg(ranks: Tensor, cutoffs: Iterable[int] = CUTOFFS) -> dict[str, float]:
    """``recall@N`` = mean of 1{rank <= N}; ``ndcg@N`` = mean of 1{rank <= N} / log2(rank + 1). ``ranks`` [B], 1-based."""
    counts = rank_histogram(ranks, torch.zeros_like(ranks), 1).numpy()
    return of_histogram(counts[0], cutoffs)


def rank_histogram(ranks: Tensor, kinds: Tensor, number: int, credit: Tensor | None = None) -> Tensor:
    """Targets by kind and rank: [number, DEEPEST + 1] float64, column r holding rank r + 1 and the last one all beyond. It is all that the
    metrics, their strata and their intervals need, and adds up over workers. ``ranks`` [B], ``kinds`` [B] in 0 to number - 1;
    ``credit`` [B]: what a target counts, 1 if not given."""
    cell = kinds.long() * (DEEPEST + 1) + (ranks.long() - 1).clamp(max=DEEPEST)
    weights = torch.ones(len(ranks), dtype=torch.float64, device=ranks.device) if credit is None else credit.double()
    return torch.zeros(number * (DEEPEST + 1), dtype=torch.float64).index_add_(0, cell.cpu(), weights.cpu()).view(number, -1)


def of_histogram(counts: NDArray[np.float64], cutoffs: Iterable[int] = CUTOFFS, users: float | None = None) -> dict[str, float]:
    """Recall and NDCG of one row of :func:`rank_histogram`, or of rows [..., DEEPEST + 1] added. ``users``: the number of targets, if
    ``counts`` are of credit."""
    return {name: float(value) for name, value in _measures(counts.reshape(-1, DEEPEST + 1).sum(0), cutoffs, users).items()}


def intervals(
    counts: NDArray[np.float64], draws: int, seed: int, cutoffs: Iterable[int] = CUTOFFS, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals over users of the metrics of one row of :func:`rank_histogram`: resampling users is drawing its cells."""
    users = int(counts.sum())
    if not users:
        return {}
    drawn = np.random.default_rng(seed).multinomial(users, counts / users, size=draws).astype(np.float64)
    edges = ((1 - level) / 2, (1 + level) / 2)
    return {name: (float(low), float(high)) for name, v in _measures(drawn, cutoffs).items() for low, high in (np.quantile(v, edges),)}


def _measures(counts: NDArray[np.float64], cutoffs: Iterable[int], users: float | None = None) -> dict[str, NDArray[np.float64]]:
    total = np.maximum(counts.sum(-1) if users is None else np.float64(users), 1.0)
    gain = counts[..., :DEEPEST] / np.log2(np.arange(DEEPEST) + 2)
    found = {}
    for n in cutoffs:
        found[f"recall@{n}"] = counts[..., :n].sum(-1) / total
        found[f"ndcg@{n}"] = gain[..., :n].sum(-1) / total
    return found
