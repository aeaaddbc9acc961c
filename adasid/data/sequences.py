"""Store users' histories as flat arrays, and cut batches from them without a loop over rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from adasid.distributed import Workers


class Histories(NamedTuple):
    """``Histories`` contains the histories of users: ``items`` [total] item_index of all histories one after another;
    history u is ``items[starts[u]:starts[u + 1]]``, oldest first; ``targets`` [users]: the held-out item, or -1 in the
    training split."""

    items: NDArray[np.int64]
    starts: NDArray[np.int64]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    @staticmethod
    def from_batches(batches: Iterable[pa.RecordBatch]) -> Histories:
        """Build histories from batches with the columns user_id, history and target, sorted by user_id."""
        parts = [b for b in batches if b.num_rows]
        if not parts:
            return Histories(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64))
        table = pa.Table.from_batches(parts).sort_by("user_id").combine_chunks()
        column = table["history"].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        items = column.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        targets = table["target"].fill_null(-1).to_numpy().astype(np.int64)
        return Histories(items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), targets)

    def part(self, rank: int, world: int) -> Histories:
        """Return every ``world``-th user, starting with ``rank``."""
        users = np.arange(rank, len(self), world)
        lengths = self.starts[users + 1] - self.starts[users]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.arange(starts[-1]) + np.repeat(self.starts[users] - starts[:-1], lengths)
        return Histories(self.items[source], starts, self.targets[users])

    def sample(self, number: int) -> NDArray[np.int64]:
        """Return a fixed random sample of ``number`` users, or all if there are fewer. Ids may be in the order of
        age."""
        if len(self) <= number:
            return np.arange(len(self))
        return np.sort(np.random.default_rng(0).permutation(len(self))[:number])

    def repeats(self) -> int:
        """Count the users whose target is in their (truncated) history."""
        hits = np.append(0, np.cumsum(self.items == np.repeat(self.targets, np.diff(self.starts))))
        return int((hits[self.starts[1:]] > hits[self.starts[:-1]]).sum())

    def last(self, users: NDArray[np.int64], length: int | None = None) -> NDArray[np.int64]:
        """Return at most the last ``length`` items (all, if not given) of each user: [B, longest of them], padded at
        the end with -1."""
        ends = self.starts[users + 1]
        counts = np.minimum(ends - self.starts[users], len(self.items) if length is None else length)
        width = int(counts.max(initial=1))
        columns = np.arange(width)
        source = (ends - counts)[:, None] + columns[None, :]
        inside = columns[None, :] < counts[:, None]
        return np.where(inside, self.items[np.minimum(source, len(self.items) - 1)], -1)


def epoch_batches(
    histories: Histories, users: int, length: int, seed: int, number: int, workers: Workers, device: torch.device
) -> Iterator[NDArray[np.int64]]:
    """Yield the batches of epoch ``number``: this worker's share of ``users`` users per step, shuffled, their last
    ``length`` items (see :meth:`Histories.last`). All workers make equally many steps; one with fewer users repeats
    some."""
    share = max(1, users // workers.world)
    largest = int(workers.gather(torch.tensor([len(histories)], device=device)).max())
    order = np.resize(
        np.random.default_rng([seed, number, workers.rank]).permutation(len(histories)), -(-largest // share) * share
    )
    for start in range(0, len(order), share):
        yield histories.last(order[start : start + share], length)
