"""How well codes use their space (methods 8.2 to 8.5). PAD is left out of every distribution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class CodeUse(NamedTuple):
    """Of one slot: ``entropy`` in nats (cap ln K), ``utilisation`` in [0, 1], ``perplexity`` = exp(entropy), ``top1``: share of the most frequent code."""

    entropy: float
    utilisation: float
    perplexity: float
    top1: float


def code_use(counts: NDArray[np.int64]) -> CodeUse:
    """From the number of items with each of the K codes, [K]."""
    total = counts.sum()
    if not total:
        return CodeUse(0.0, 0.0, 1.0, 0.0)
    p = counts[counts > 0] / total
    entropy = float(-(p * np.log(p)).sum()) + 0.0
    return CodeUse(entropy, len(p) / len(counts), float(np.exp(entropy)), float(p.max()))


def group_metrics(sizes: NDArray[np.int64], groups: NDArray[np.int64]) -> dict[str, float]:
    """Collisions from a histogram: ``groups[i]`` SIDs are shared by ``sizes[i]`` items each.

    ``collision_distinct`` = (M - distinct) / M; ``collision_items`` = share of items whose SID is not unique;
    ``sid_entropy``: of complete SIDs, in nats (cap ln M).
    """
    items, distinct = int((sizes * groups).sum()), int(groups.sum())
    if not items:
        return {"items": 0, "distinct": 0, "collision_distinct": 0.0, "collision_items": 0.0, "largest_group": 0, "sid_entropy": 0.0}
    share = sizes / items
    return {
        "items": items,
        "distinct": distinct,
        "collision_distinct": (items - distinct) / items,
        "collision_items": float((sizes * groups)[sizes > 1].sum()) / items,
        "largest_group": int(sizes.max()),
        "sid_entropy": float(-(groups * share * np.log(share)).sum()) + 0.0,
    }
