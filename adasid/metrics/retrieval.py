"""Recall and NDCG of a single held-out item in one ranked list over the full catalogue (methods 8.6)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CUTOFFS = (5, 10, 20, 50, 100)


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """1-based rank of each row's target. ``scores`` [B, M], ``targets`` [B] (int64) -> [B]. Equal scores rank by index."""
    own = scores.gather(1, targets[:, None])
    ranks = 1 + (scores > own).sum(1, dtype=torch.int32)
    tied = torch.nonzero((scores >= own).sum(1, dtype=torch.int32) > ranks).flatten()  # rare: another item has exactly the target's score
    before = torch.arange(scores.shape[1], device=scores.device)[None, :] < targets[tied, None]
    ranks[tied] += ((scores[tied] == own[tied]) & before).sum(1)
    return ranks


def recall_ndcg(ranks: Tensor, cutoffs: Iterable[int] = CUTOFFS) -> dict[str, float]:
    """``recall@N`` = mean of 1{rank <= N}; ``ndcg@N`` = mean of 1{rank <= N} / log2(rank + 1). ``ranks`` [B], 1-based."""
    ranks = ranks.double()
    gain = 1.0 / torch.log2(ranks + 1)
    result: dict[str, float] = {}
    for n in cutoffs:
        hit = (ranks <= n).double()
        result[f"recall@{n}"] = hit.mean().item() if len(ranks) else 0.0
        result[f"ndcg@{n}"] = (hit * gain).mean().item() if len(ranks) else 0.0
    return result
