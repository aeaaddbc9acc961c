"""Rename the slots and codes of a retrained tokenizer so that codes preserve their published meaning.

Training from scratch permutes the clusters and, where slots are parallel, the slots. Both are undone by the
assignment of new names to old ones under which most items preserve their codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.sid import Codes, PreviousCodes, Slot
from adasid.tables import PAD
from adasid.tokenizers.base import Tokenizer


class Relabelled(Tokenizer):
    """``Relabelled`` is ``inner`` with other names: slot l shows the inner slot ``order[l]``, whose code c is called
    ``names[l, c]``."""

    def __init__(self, inner: Tokenizer) -> None:
        super().__init__(inner.settings, inner.widths, inner.slots)
        self.inner = inner
        self.register_buffer("order", torch.arange(len(self.slots)))
        self.register_buffer("names", torch.arange(max(slot.size for slot in self.slots)).repeat(len(self.slots), 1))
        self.order: Tensor
        self.names: Tensor

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Prepare the inner tokenizer."""
        self.inner.prepare(shard, workers)

    def unfreeze(self) -> None:
        """Let the inner tokenizer be trained."""
        self.inner.unfreeze()

    def _inner(self, batch: Batch) -> Batch:
        """Return ``batch`` with the previous codes under their inner names."""
        if batch.previous is None:
            return batch
        codes, slots = batch.previous.codes, torch.arange(len(self.slots), device=batch.previous.codes.device)
        codes_before = torch.where(codes < 0, codes, self.names.argsort(dim=1)[slots, codes.clamp(min=0)])
        return replace(batch, previous=PreviousCodes(codes_before[:, self.order.argsort()], batch.previous.slack))

    def encode(self, batch: Batch) -> Codes:
        """Encode with the inner tokenizer and rename the codes."""
        codes, weights, active = (part[:, self.order] for part in self.inner.encode(self._inner(batch)))
        slots = torch.arange(len(self.slots), device=codes.device)
        named = self.names[slots, codes.long().clamp(min=0)].to(codes.dtype)
        return Codes(torch.where(codes == PAD, PAD, named), weights, active)

    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruct with the inner tokenizer."""
        return self.inner.reconstruct(self._inner(batch))

    def rename(self, published: NDArray[np.int32], current: NDArray[np.int32]) -> None:
        """Choose the names under which the inner codes ``current`` [n, L] of most items equal their ``published`` codes
        [n, L]."""
        order, names = match(published, current, self.slots, self.inner.settings.parallel)
        self.order.copy_(torch.from_numpy(order))
        self.names.copy_(torch.from_numpy(names))


def match(
    published: NDArray[np.int32], current: NDArray[np.int32], slots: Sequence[Slot], parallel: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ``order`` [L] and ``names`` [L, K] of :class:`Relabelled`, optimal assignments (Kuhn, 1955) by the number
    of items that agree: of codes within each pair of slots of one kind and size, then, if ``parallel``, of
    slots. PAD stays PAD."""
    length, size = len(slots), max(slot.size for slot in slots)
    order, names = np.arange(length), np.tile(np.arange(size), (length, 1))
    for kind in dict.fromkeys((slot.kind, slot.size) for slot in slots):
        slots_of_kind = [index for index, slot in enumerate(slots) if (slot.kind, slot.size) == kind]
        kept, given = np.zeros((len(slots_of_kind), len(slots_of_kind))), {}
        for i, old in enumerate(slots_of_kind):
            for j, new in enumerate(slots_of_kind):
                counts = np.zeros((kind[1], kind[1]), np.int64)
                both = (published[:, old] != PAD) & (current[:, new] != PAD)
                np.add.at(counts, (current[both, new], published[both, old]), 1)
                ties = np.eye(kind[1], dtype=np.int64)  # a code without items keeps its name
                rows, columns = linear_sum_assignment(counts * (kind[1] + 1) + ties, maximize=True)
                kept[i, j], given[i, j] = counts[rows, columns].sum(), columns
        for i, j in (
            zip(*linear_sum_assignment(kept, maximize=True))
            if parallel
            else ((i, i) for i in range(len(slots_of_kind)))
        ):
            order[slots_of_kind[i]] = slots_of_kind[j]
            names[slots_of_kind[i], : kind[1]] = given[i, j]
    return order, names
