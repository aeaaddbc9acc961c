"""Compute recall and NDCG of a single held-out item in one ranked list over the full catalogue (methods 8.6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Gains = Mapping[str, NDArray[np.float64]]

CUTOFFS = (5, 10, 20, 50, 100)
DEEPEST = max(CUTOFFS)


def item_order(items: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the rank of each of ``items`` items among items of equal scores [items] int32: a fixed random order. Ties
    are not broken by index, because it follows popularity: a model with constant scores would look like a popularity
    model."""
    return torch.randperm(items, generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(device)


def tie_order(group: Tensor) -> Tensor:
    """Return the rank [M] int32 of each item among items of equal scores: SIDs, the ``group`` [M] of an item, in the
    order of :func:`item_order`, the items of one SID by index."""
    order = item_order(int(group.max()) + 1 if len(group) else 0, group.device)[group].argsort(stable=True)
    ranks = torch.empty(len(order), dtype=torch.int32, device=group.device)
    ranks[order] = torch.arange(len(order), dtype=torch.int32, device=group.device)
    return ranks


def target_ranks(scores: Tensor, targets: Tensor, places: Tensor | None = None) -> Tensor:
    """Return the 1-based rank of each row's target. ``scores`` [B, M], ``targets`` [B] (int64) -> [B].

    Equal scores rank by ``places`` [M] (:func:`tie_order`; :func:`item_order` if not given); a target with a NaN score
    is beyond all cut-offs.
    """
    items = scores.shape[1]
    target_scores = scores.gather(1, targets[:, None])
    ranks = 1 + (scores > target_scores).sum(1, dtype=torch.int32)
    tied = torch.nonzero((scores >= target_scores).sum(1, dtype=torch.int32) > ranks).flatten()
    if len(tied):
        places = item_order(items, scores.device) if places is None else places
        before = places[None, :] < places[targets[tied], None]
        ranks[tied] += ((scores[tied] == target_scores[tied]) & before).sum(1)
    return torch.where(target_scores[:, 0].isnan(), items + DEEPEST + 1, ranks)


def recall_ndcg(ranks: Tensor, cutoffs: Iterable[int] = CUTOFFS) -> dict[str, float]:
    """Compute ``recall@N`` = mean of 1{rank <= N}; ``ndcg@N`` = mean of 1{rank <= N} / log2(rank + 1). ``ranks`` [B],
    1-based."""
    return averages(rank_histogram(ranks, torch.zeros_like(ranks), 1).numpy()[0], gains(cutoffs))


def rank_histogram(ranks: Tensor, kinds: Tensor, number: int) -> Tensor:
    """Count targets by kind and rank: [number, DEEPEST + 1] float64, where column r is rank r + 1 and the last column
    all ranks beyond. The metrics, their strata and their intervals follow from it, and it can be summed over workers.
    ``ranks`` [B], ``kinds`` [B] in 0 to number - 1."""
    cell = (kinds.long() * (DEEPEST + 1) + (ranks.long() - 1).clamp(max=DEEPEST)).cpu()
    return torch.bincount(cell, minlength=number * (DEEPEST + 1)).double().view(number, DEEPEST + 1)


def gains(cutoffs: Iterable[int] = CUTOFFS) -> Gains:
    """Return the contribution of a target in each column of :func:`rank_histogram` to each metric, [DEEPEST + 1]."""
    rank = np.arange(1, DEEPEST + 2)
    return {
        f"{name}@{n}": (rank <= n) * gain
        for n in cutoffs
        for name, gain in (("recall", np.ones(len(rank))), ("ndcg", 1 / np.log2(rank + 1)))
    }


def shared_gains(sizes: NDArray[np.int64], cutoffs: Iterable[int] = CUTOFFS) -> Gains:
    """Return the contribution [S, DEEPEST + 1] of a target whose SID has ``sizes`` [S] items: in column r the first
    item of the SID has rank r + 1, and the gain is the mean over the ranks of the SID's items (methods 8.6: the
    arbitrary order within a SID gives no credit)."""
    first = np.arange(DEEPEST + 1)
    last = np.minimum(first + sizes[:, None], DEEPEST + 1)
    sums = {name: np.concatenate([[0.0], gain.cumsum()]) for name, gain in gains(cutoffs).items()}
    return {f"corrected_{name}": (total[last] - total[first]) / sizes[:, None] for name, total in sums.items()}


def averages(counts: NDArray[np.float64], of: Gains) -> dict[str, float]:
    """Return the metrics of the targets in ``counts`` (any shape that ends in the gains'); empty without targets."""
    users = float(counts.sum())
    return {name: float((counts * gain).sum() / users) for name, gain in of.items()} if users else {}


def intervals(
    counts: NDArray[np.float64], of: Gains, draws: int, seed: int, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Compute bootstrap intervals over users of the metrics of :func:`averages`; resampling users is equivalent to
    drawing cells of ``counts`` (the gains' shape). Empty for one user, who says nothing of the spread."""
    users, nonzero = int(counts.sum()), counts > 0
    if users < 2:
        return {}
    drawn = np.random.default_rng(seed).multinomial(users, counts[nonzero] / users, size=draws)
    edges = ((1 - level) / 2, (1 + level) / 2)
    return {
        name: (float(low), float(high))
        for name, gain in of.items()
        for low, high in (np.quantile(drawn @ gain[nonzero] / users, edges),)
    }
