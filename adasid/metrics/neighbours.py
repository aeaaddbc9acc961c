"""Search the nearest vectors of a sample by cosine, exactly, in blocks of rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK = 1024
"""Rows that are compared with all others at a time."""


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows of norm 1; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)


def nearest(vectors: NDArray[np.float32], number: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the places [n, number] of the rows with the highest cosine to each row of ``vectors`` [n, D], the highest
    first, and the cosines. Rows of zeros have no neighbours and are none; a place is -1 where there are too few."""
    rows = np.flatnonzero(vectors.any(1))
    places = np.full((len(vectors), number), -1, np.int32)
    cosines = np.zeros((len(vectors), number), np.float32)
    scaled, wanted = unit(vectors[rows]), min(number, len(rows) - 1)
    for start in range(0, len(rows) if wanted > 0 else 0, _BLOCK):
        block = scaled[start : start + _BLOCK] @ scaled.T
        mine = np.arange(len(block))
        block[mine, start + mine] = -np.inf
        values, near = torch.topk(torch.from_numpy(block), wanted, dim=1)
        places[rows[start + mine], :wanted] = rows[near.numpy()]
        cosines[rows[start + mine], :wanted] = values.numpy()
    return places, cosines
