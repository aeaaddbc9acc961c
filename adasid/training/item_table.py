"""Divide an embedding table among the workers, and train it with row-wise Adagrad (methods 7.4)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adasid.distributed import Workers

_EPSILON = 1e-8
_DEVIATION = 0.02
_ROWS = 1 << 16
"""Rows of the table that are drawn or read at a time."""


class Request(NamedTuple):
    """A request contains what :meth:`ItemTable.fetch` sent: ``order`` [n], the positions of the ids in the order of
    their owners; ``sent`` and ``received``, numbers of ids to and from each worker; ``local``, the rows of this
    worker's part that others and itself asked for."""

    order: Tensor
    sent: list[int]
    received: list[int]
    local: Tensor


class ItemTable:
    """``ItemTable`` has this worker's rows of a table [items, width]: row r belongs to worker r modulo their number,
    and is number r // world of its ``rows`` [own, width]. ``squares`` [own]: Adagrad's accumulator of each row.

    item_index follows popularity: modulo, every worker gets as many requests as any other, while of contiguous ranges
    the first would get most. The first values depend on the seed only, not on the number of workers."""

    def __init__(
        self, items: int, width: int, seed: int, lr: float, workers: Workers, device: torch.device | str = "cpu"
    ) -> None:
        self.items, self.lr, self.workers = items, lr, workers
        own = len(range(workers.rank, items, workers.world))
        self.rows = torch.empty(own, width, device=device)
        self.squares = torch.zeros(own, device=device)
        generator = torch.Generator().manual_seed(seed)
        for first in range(0, items, _ROWS):
            drawn = torch.randn(min(_ROWS, items - first), width, generator=generator) * _DEVIATION
            mine = drawn[(workers.rank - first) % workers.world :: workers.world]
            start = len(range(workers.rank, first, workers.world))
            self.rows[start : start + len(mine)] = mine.to(device)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Request]:
        """Return the rows of distinct ``ids`` [n] from their owners, [n, width], and the request, with which
        :meth:`update` returns gradients. All workers call it together."""
        world = self.workers.world
        if world == 1:
            return self.rows.index_select(0, ids), Request(ids, [], [], ids)
        owner = ids % world
        order = owner.argsort(stable=True)
        sizes = torch.bincount(owner, minlength=world)
        sent, received = sizes.tolist(), self.workers.exchange(sizes, [1] * world, [1] * world).tolist()
        local = self.workers.exchange(ids[order] // world, sent, received)
        rows = self.rows.new_empty(len(ids), self.rows.shape[1])
        rows[order] = self.workers.exchange(self.rows.index_select(0, local), received, sent)
        return rows, Request(order, sent, received, local)

    def update(self, request: Request, gradient: Tensor) -> None:
        """Take a step of row-wise Adagrad with the mean over workers of their ``gradient`` [n, width] of the rows that
        each fetched: the accumulator of a row grows by the mean of its squared gradient, and the row moves by ``lr *
        gradient / (sqrt(accumulator) + 1e-8)`` (EXACT_ROWWISE_ADAGRAD of FBGEMM)."""
        ids = request.local
        if self.workers.world > 1:
            received = self.workers.exchange(gradient[request.order], request.sent, request.received)
            ids, inverse = torch.unique(ids, return_inverse=True)
            gradient = received.new_zeros(len(ids), received.shape[1]).index_add_(0, inverse, received)
            gradient /= self.workers.world
        squares = self.squares[ids] + gradient.square().mean(1)
        self.squares[ids] = squares
        steps = gradient * (self.lr / (squares.sqrt() + _EPSILON))[:, None]
        self.rows.index_copy_(0, ids, self.rows.index_select(0, ids) - steps)

    def norms(self, items: Tensor) -> Tensor:
        """Return the norms of the rows of ``items`` [n], of all workers, [n]. All workers pass the same items."""
        mine = torch.nonzero(items % self.workers.world == self.workers.rank).flatten()
        norms = self.rows.new_zeros(len(items))
        for part in mine.split(_ROWS):
            norms[part] = self.rows[items[part] // self.workers.world].norm(dim=1)
        return self.workers.sum(norms)

    def index(self) -> Tensor:
        """Return the item_index of each of this worker's rows, [own]."""
        return torch.from_numpy(np.arange(self.workers.rank, self.items, self.workers.world))
