"""Measure how good the vectors of a content modality are, on a sample of the catalogue."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_CHUNK = 512


class Quality(NamedTuple):
    """The quality of vectors. ``effective_rank``: exp of the entropy of the singular values of the centred vectors,
    scaled to sum 1 (Roy & Vetterli, 2007); ``near_duplicates``: share of vectors with another of at least a given
    cosine; ``agreement``: mean share of the nearest vectors that are of the same category; ``chance``: the same of any
    other vectors. None where not defined."""

    effective_rank: float | None
    near_duplicates: float | None
    agreement: float | None
    chance: float | None


def quality(
    vectors: NDArray[np.float32], kinds: NDArray[np.int64], neighbours: int = 10, near_duplicate: float = 0.95
) -> Quality:
    """Measure ``vectors`` [n, D]; ``kinds`` [n]: number of the category, negative where unknown. Of vectors that tie at
    the last place those that come first count."""
    if len(vectors) < 2:
        return Quality(None, None, None, None)
    x = torch.from_numpy(vectors).double()
    unit = torch.nn.functional.normalize(x, dim=1).float()
    kind = torch.from_numpy(kinds)
    near, same, asked = 0, 0.0, 0
    neighbours = min(neighbours, len(x) - 1)
    for first in range(0, len(x), _CHUNK):
        rows = torch.arange(first, min(first + _CHUNK, len(x)))
        cosine = unit[rows] @ unit.T
        cosine[torch.arange(len(rows)), rows] = -2.0
        best, nearest = cosine.topk(neighbours, dim=1)
        near += int((best[:, 0] >= near_duplicate).sum())
        known = kind[rows] >= 0
        asked += int(known.sum())
        same += float((kind[nearest] == kind[rows][:, None])[known].double().mean(1).sum())
    counts = np.bincount(kinds[kinds >= 0])
    others = (counts * (counts - 1)).sum() / max(1, counts.sum() * (len(x) - 1))
    return Quality(
        effective_rank(x),
        near / len(x),
        same / asked if asked else None,
        float(others) if asked else None,
    )


def effective_rank(vectors: torch.Tensor) -> float | None:
    """Return the effective rank of ``vectors`` [n, D], centred; None where all are equal."""
    values = torch.linalg.svdvals(vectors - vectors.mean(0))
    if float(values.sum()) <= 1e-9 * max(1.0, float(vectors.norm())):
        return None
    share = values / values.sum()
    share = share[share > 0]
    return float((-(share * share.log()).sum()).exp())
