"""Measure how good the vectors of a content modality are, on a sample of the catalogue."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adasid.metrics.neighbours import nearest


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
    """Measure ``vectors`` [n, D]; ``kinds`` [n]: number of the category, negative where unknown. Vectors of zeros have
    no neighbours and are none."""
    if len(vectors) < 2:
        return Quality(None, None, None, None)
    places, cosines = nearest(vectors, neighbours)
    asked, near = (kinds >= 0) & (places[:, 0] >= 0), cosines[:, 0] >= near_duplicate
    same, compared = (kinds[places] == kinds[:, None]) & (places >= 0), (places >= 0).sum(1)
    counts, others = np.bincount(kinds[asked]), int(vectors.any(1).sum()) - 1
    chance = (counts * (counts - 1)).sum() / max(1, counts.sum() * others)
    return Quality(
        effective_rank(torch.from_numpy(vectors).double()),
        float(near.mean()),
        float((same.sum(1)[asked] / compared[asked]).mean()) if asked.any() else None,
        float(chance) if asked.any() else None,
    )


def effective_rank(vectors: torch.Tensor) -> float | None:
    """Return the effective rank of ``vectors`` [n, D], centred; None where all are equal."""
    values = torch.linalg.svdvals(vectors - vectors.mean(0))
    if float(values.sum()) <= 1e-9 * max(1.0, float(vectors.norm())):
        return None
    share = values / values.sum()
    share = share[share > 0]
    return float((-(share * share.log()).sum()).exp())
