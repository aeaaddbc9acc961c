"""Probe what codes say about an item, in the same way for every tokenizer: how much of each modality can be predicted
from them, and whether items that share codes are of one kind (methods 8.10). PAD never counts as shared."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid.tables import PAD

HELD_OUT = 5
"""Every fifth item is held out to evaluate the readout."""
_RIDGE = 1e-4
_CHUNK = 256


class Readout:
    """``Readout`` is a linear regression of each modality on the codes: an embedding per code of each slot, fitted by
    least squares on four fifths of the items and evaluated on the rest. It is a common measure for methods that decode
    in different ways, or not at all (methods 8.1).

    Items stream through :meth:`add`; memory is (L (K+1))^2 + L (K+1) D.
    """

    def __init__(self, slots: int, size: int, widths: dict[str, int]) -> None:
        self.slots, self.size = slots, size
        columns = slots * (size + 1)
        self._codes = {m: torch.zeros(2, columns, columns, dtype=torch.float64) for m in widths}
        self._cross = {m: torch.zeros(2, columns, width, dtype=torch.float64) for m, width in widths.items()}
        self._sums = {m: torch.zeros(2, width, dtype=torch.float64) for m, width in widths.items()}
        self._squares = {m: torch.zeros(2, dtype=torch.float64) for m in widths}
        self._items = {m: torch.zeros(2, dtype=torch.float64) for m in widths}

    @staticmethod
    def bytes(slots: int, size: int, widths: Mapping[str, int]) -> int:
        """Return the bytes that a readout of ``slots`` slots of ``size`` codes takes."""
        columns = slots * (size + 1)
        return sum(16 * columns * (columns + width) for width in widths.values())

    def add(self, codes: Tensor, place: Tensor, vectors: dict[str, Tensor], present: dict[str, Tensor]) -> None:
        """Add a batch of items. ``codes`` [B, L], ``place`` [B]: index of the item in the sample, ``vectors`` modality
        -> [B, D], ``present`` modality -> [B] bool."""
        column = torch.where(codes == PAD, self.size, codes).long() + torch.arange(self.slots) * (self.size + 1)
        hot = torch.zeros(len(codes), self.slots * (self.size + 1)).scatter_(1, column, 1.0)
        for m in self._codes:
            for part, rows in enumerate((place % HELD_OUT != 0, place % HELD_OUT == 0)):
                keep = rows & present[m]
                x, y = hot[keep], vectors[m][keep].double()
                self._codes[m][part] += (x.T @ x).double()
                self._cross[m][part] += x.T.double() @ y
                self._sums[m][part] += y.sum(0)
                self._squares[m][part] += (y**2).sum()
                self._items[m][part] += len(y)

    def unexplained(self) -> dict[str, float]:
        """Return the fraction of variance unexplained by the readout, by modality; 1 is no better than the mean. NaN if
        one part has no item with the modality, or all held-out items equal the mean."""
        return {m: self._unexplained(m) for m in self._codes}

    def _unexplained(self, m: str) -> float:
        fit, test = 0, 1
        if not self._items[m].all():
            return float("nan")
        mean = self._sums[m][fit] / self._items[m][fit]
        codes, cross, squares = [], [], []
        for part in (fit, test):
            count = self._codes[m][part].diagonal()
            codes.append(self._codes[m][part])
            cross.append(self._cross[m][part] - count[:, None] * mean)
            squares.append(self._squares[m][part] - 2 * mean @ self._sums[m][part] + self._items[m][part] * mean @ mean)
        ridge = _RIDGE * self._items[m][fit] / self.size
        table = torch.linalg.solve(codes[fit] + ridge * torch.eye(len(codes[fit]), dtype=torch.float64), cross[fit])
        left = squares[test] - 2 * (table * cross[test]).sum() + (table * (codes[test] @ table)).sum()
        spread = float(squares[test])
        return float(left) / spread if spread > 1e-12 * float(self._squares[m][test]) else float("nan")


def agreement(codes: NDArray[np.int32], kinds: NDArray[np.int64], queries: NDArray[np.int64], neighbours: int) -> float:
    """Compute the mean share of an item's ``neighbours`` nearest items, by number of shared codes, that are of its
    kind.

    ``codes`` [M, L], ``kinds`` [M] (negative: unknown, such items are excluded), ``queries``: positions of the query
    items. Items tied at the last rank count in equal parts, so that the order of rows does not matter. NaN without
    queries or with one item only."""
    known = kinds >= 0
    table, kind = torch.from_numpy(codes[known]), torch.from_numpy(kinds[known])
    index = np.cumsum(known) - 1
    rows = torch.from_numpy(index[queries[known[queries]]])
    total, neighbours = 0.0, min(neighbours, len(table) - 1)
    if neighbours < 1:
        return float("nan")
    for part in rows.split(_CHUNK):
        shared = torch.zeros(len(part), len(table), dtype=torch.int16)
        for slot in table.T:
            mine = slot[part]
            shared += (mine[:, None] == slot[None, :]) & (mine != PAD)[:, None]
        shared[torch.arange(len(part)), part] = -1
        last = shared.float().topk(neighbours, dim=1).values[:, -1:]
        above, tied = shared > last, shared == last
        room = (neighbours - above.sum(1, keepdim=True)).clamp(min=0) / tied.sum(1, keepdim=True)
        same = kind[part][:, None] == kind[None, :]
        total += float(((above + tied * room) * same).sum()) / neighbours
    return total / len(rows) if len(rows) else float("nan")


def duplicates_kept(
    codes: NDArray[np.int32], vectors: NDArray[np.float32], queries: NDArray[np.int64], least: float
) -> float:
    """Compute the share of near-duplicates that have the same SID, among the pairs of an item of ``queries`` and
    another with a cosine of at least ``least``. NaN if there are none. ``codes`` [M, L], ``vectors`` [M, D] of unit
    norm."""
    pairs, kept = 0, 0
    for part in np.array_split(queries, max(1, -(-len(queries) // _CHUNK))):
        row, other = np.nonzero(vectors[part] @ vectors.T >= least)
        apart = part[row] != other
        same = (codes[part[row[apart]]] == codes[other[apart]]).all(1)
        pairs, kept = pairs + len(same), kept + int(same.sum())
    return kept / pairs if pairs else float("nan")


def shared_cosine(codes: NDArray[np.int32], vectors: NDArray[np.float32]) -> float:
    """Compute the mean cosine of the pairs of items that share all codes; NaN if no two do. ``codes`` [M, L],
    ``vectors`` [M, D] of unit norm, or zero for an item without a vector, which is in no pair.

    The unit vectors of a group of n sum to S; its n (n - 1) ordered pairs have |S|^2 - n as the sum of their cosines.
    """
    there = vectors.any(1)
    codes, vectors = codes[there], vectors[there]
    group = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    size = np.bincount(group)
    crowded = np.flatnonzero(size[group] > 1)
    if not len(crowded):
        return float("nan")
    groups, index = np.unique(group[crowded], return_inverse=True)
    sums = np.zeros((len(groups), vectors.shape[1]))
    np.add.at(sums, index, vectors[crowded])
    n = size[groups].astype(np.float64)
    return float(((sums**2).sum(1) - n).sum() / (n * (n - 1)).sum())
