"""Rank targets in a catalogue that is scored in blocks of items, so that memory does not grow with the catalogue.

The ranks are those of :func:`adasid.metrics.retrieval.target_ranks`; the items may be divided among workers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from adasid.distributed import Workers
from adasid.metrics.retrieval import DEEPEST

Scores = Callable[[Tensor], Tensor]
"""This function returns the scores [b, m] of users [b], positions in a batch, for the items of a block."""

_ONE = Workers()
ITEMS, USERS = 1 << 14, 256
"""Items and users of a block on a CPU: their scores fit a cache."""
GPU_ITEMS, GPU_USERS = 1 << 17, 1024
"""The same on a GPU, which prefers few large blocks."""


class _Counts:
    """``_Counts`` has the running counts of a batch of B users."""

    def __init__(self, targets: Tensor, seen: Tensor | None, items: int, workers: Workers) -> None:
        world, rank = workers.world, workers.rank
        self.targets, self.seen, self.workers = targets, seen, workers
        self.own = len(range(rank, items, world))
        self.local = torch.where(targets % world == rank, targets // world, -1)
        self.score = torch.zeros(len(targets), device=targets.device)
        self.ahead = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
        self.seen_ahead = torch.zeros_like(self.ahead)

    def find(self, scores: Tensor, users: Tensor, first: int) -> None:
        """Store the scores of those targets that are in the block that begins with item ``first``."""
        local = self.local[users]
        inside = torch.nonzero((local >= first) & (local < first + scores.shape[1])).flatten()
        self.score[users[inside]] = scores[inside, local[inside] - first].float()

    def add(self, scores: Tensor, users: Tensor, first: int, places: Callable[[], Tensor]) -> None:
        """Count the items of the block that rank before each target."""
        last, local, target = first + scores.shape[1], self.local[users], self.score[users][:, None]
        better = _count(scores > target)
        inside = ((local >= first) & (local < last) & ~target[:, 0].isnan()).long()
        tied = torch.nonzero(_count(scores >= target) - better > inside).flatten()
        self.ahead[users] += better
        if len(tied):
            equal = scores[tied] == target[tied]
            before = self._before(slice(first, last), users[tied], places)
            self.ahead[users[tied]] += (equal & before).sum(1)
        if self.seen is not None:
            seen = self.seen[users]
            row, column = torch.nonzero((seen >= first) & (seen < last), as_tuple=True)
            item = seen[row, column]
            theirs, mine = scores[row, item - first], target[row, 0]
            ahead = theirs > mine
            if bool((equals := theirs == mine).any()):
                ahead |= equals & (places()[item] < places()[self.targets[users[row]]])
            self.seen_ahead.index_add_(0, users[row], ahead.long())

    def _before(self, block: slice, users: Tensor, places: Callable[[], Tensor]) -> Tensor:
        """Return which items of the block are placed before the targets of ``users`` [n], [n, m]."""
        mine = places()[self.workers.rank :: self.workers.world][block]
        return mine[None, :] < places()[self.targets[users]][:, None]


def blocked_ranks(
    block: Callable[[int, int], Scores],
    targets: Tensor,
    items: int,
    places: Callable[[], Tensor],
    seen: Tensor | None = None,
    workers: Workers = _ONE,
    size: int = ITEMS,
) -> tuple[Tensor, Tensor]:
    """Return the 1-based ranks [B] of ``targets`` [B] (int64) among ``items`` items without the ``seen`` [B, S]
    (distinct, padded with -1; one worker only), and among all.

    ``block(first, last)`` returns the scores of those of this worker's items: item i is number i // world of worker i
    modulo world. All workers pass the same targets and get the same ranks. ``places()`` [items]: order of equal scores.
    ``size``: items of a block on a CPU. Each block is requested twice: for the scores of the targets in it, then to
    count; once, if there is but one."""
    counts = _Counts(targets, seen, items, workers)
    order = targets.argsort(stable=True)  # targets of adjacent users are in few blocks
    size, users_at_once = (GPU_ITEMS, GPU_USERS) if targets.is_cuda else (size, USERS)
    batches, local = order.split(users_at_once), counts.local[order].cpu().numpy()
    starts = range(0, counts.own, size)
    single = len(starts) == 1 and workers.world == 1
    for first in () if single else starts:
        wanted = np.unique(np.flatnonzero((local >= first) & (local < first + size)) // users_at_once)
        score = block(first, min(first + size, counts.own)) if len(wanted) else None
        for number in wanted:
            assert score is not None
            counts.find(score(batches[number]), batches[number], first)
    counts.score = workers.sum(counts.score)
    for first in starts:
        score = block(first, min(first + size, counts.own))
        for users in batches:
            scores = score(users)
            if single:
                counts.find(scores, users, first)
            counts.add(scores, users, first, places)
            del scores  # before the next are computed
    everywhere = 1 + workers.sum(counts.ahead)
    beyond = counts.score.isnan()
    ranks = (everywhere - counts.seen_ahead).masked_fill(beyond, items + DEEPEST + 1)
    return ranks, everywhere.masked_fill(beyond, items + DEEPEST + 1)


def _count(mask: Tensor) -> Tensor:
    """Count the true values of each row, [B, m] -> [B]. On a CPU numpy is six times as fast as torch."""
    if mask.is_cuda:
        return mask.sum(1)
    return torch.tensor([np.count_nonzero(row) for row in mask.numpy()], dtype=torch.int64)
