"""Measure how evenly codes are used (methods 8.2 to 8.5). PAD is excluded from every distribution."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class CodeUse(NamedTuple):
    """``CodeUse`` describes the use of one slot's codes. ``utilisation``: share of its K codes that items have; of the
    items that have a code: ``entropy`` in nats (at most ln K), ``perplexity`` = exp(entropy), ``top1``: share of the
    most frequent code; None without items.
    """

    entropy: float | None
    utilisation: float
    perplexity: float | None
    top1: float | None


def code_use(counts: NDArray[np.int64]) -> CodeUse:
    """Compute the use from the number of items with each of the K codes, [K]."""
    total = counts.sum()
    if not total:
        return CodeUse(None, 0.0, None, None)
    p = counts[counts > 0] / total
    entropy = float(-(p * np.log(p)).sum()) + 0.0
    return CodeUse(entropy, len(p) / len(counts), float(np.exp(entropy)), float(p.max()))


def group_metrics(sizes: NDArray[np.int64], groups: NDArray[np.int64]) -> dict[str, Any]:
    """Compute collision metrics from a histogram: ``groups[i]`` SIDs are shared by ``sizes[i]`` items each.

    ``collision_distinct`` = (M - distinct) / M; ``collision_items`` = share of items whose SID is not unique;
    ``sid_entropy``: of complete SIDs, in nats (at most ln M). Shares and entropy are None without items.
    """
    items, distinct = int((sizes * groups).sum()), int(groups.sum())
    if not items:
        nothing = dict.fromkeys(("collision_distinct", "collision_items", "sid_entropy"))
        return {"items": 0, "distinct": 0, "largest_group": 0, **nothing}
    share = sizes / items
    return {
        "items": items,
        "distinct": distinct,
        "collision_distinct": (items - distinct) / items,
        "collision_items": float((sizes * groups)[sizes > 1].sum()) / items,
        "largest_group": int(sizes.max()),
        "sid_entropy": float(-(groups * share * np.log(share)).sum()) + 0.0,
    }
