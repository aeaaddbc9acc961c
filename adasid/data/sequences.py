"""Store users' histories as flat arrays, and cut batches from them without a loop over rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid.data.reading import Read
from adasid.data.samples import Sample, shuffled
from adasid.distributed import Workers
from adasid.ragged import spans

Name = TypeVar("Name", str, None)
_USERS = 1 << 13
"""Users whose events are counted at a time."""


class Histories(NamedTuple):
    """``Histories`` contains the histories of users: ``items`` [total] int32: item_index of all histories one after
    another; history u is ``items[starts[u]:starts[u + 1]]``, oldest first; ``targets`` [users]: the held-out item, or
    -1 in the training split."""

    items: NDArray[np.int32]
    starts: NDArray[np.int64]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    @staticmethod
    def from_batches(batches: Iterable[pa.RecordBatch], length: int | None = None) -> Histories:
        """Build histories from batches with the columns user_index, history and target; see :func:`read_histories`."""
        parts = list(batches)
        return read_histories(lambda columns: parts, {None: length})[None]

    def part(self, rank: int, world: int) -> Histories:
        """Return every ``world``-th user, starting with ``rank``."""
        users = np.arange(rank, len(self), world)
        lengths = self.starts[users + 1] - self.starts[users]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Histories(self.items[spans(self.starts[users], lengths)], starts, self.targets[users])

    def counts(self, items: int, length: int) -> tuple[Tensor, Tensor]:
        """Count the events that a model of ``length`` events trains on, the latest ``length`` + 1 of each history:
        whether each of ``items`` items is among them [items] bool, and how often it comes after another of them, as a
        target, [items] int32."""
        visited, targets = torch.zeros(items, dtype=torch.bool), torch.zeros(items, dtype=torch.int32)
        one = torch.ones((), dtype=torch.int32)
        for start in range(0, len(self), _USERS):
            ends = self.starts[start + 1 : start + _USERS + 1]
            first = np.maximum(self.starts[start : start + len(ends)], ends - length - 1)
            events = torch.from_numpy(self.items[spans(first, ends - first)]).long()
            opening = torch.from_numpy(self.items[first[first < ends]]).long()
            visited[events] = True
            targets.scatter_add_(0, events, one.expand(len(events)))
            targets.scatter_add_(0, opening, -one.expand(len(opening)))
        return visited, targets

    def last(self, users: NDArray[np.integer], length: int | None = None) -> NDArray[np.int64]:
        """Return at most the last ``length`` items (all, if not given) of each user: [B, longest of them], padded at
        the end with -1."""
        ends = self.starts[users + 1]
        counts = np.minimum(ends - self.starts[users], len(self.items) if length is None else length)
        width = int(counts.max(initial=1))
        columns = np.arange(width)
        source = (ends - counts)[:, None] + columns[None, :]
        inside = columns[None, :] < counts[:, None]
        return np.where(inside, self.items[np.minimum(source, len(self.items) - 1)], -1).astype(np.int64)


def read_histories(
    read: Read, lengths: Mapping[Name, int | None], samples: Mapping[Name, Sample] | None = None
) -> dict[Name, Histories]:
    """Read the histories of each split of ``lengths`` in the order of user_index, cut to their latest
    ``lengths[split]`` items (None: all). The split None takes all rows. ``samples``: for some splits, the users that
    are read; the others need no memory.

    ``read`` streams the columns user_index, split, history and target, twice: the first time the arrays are sized, the
    second time they are filled, so that little more than the result is in memory."""
    splits = {split: _Split(split, length, (samples or {}).get(split)) for split, length in lengths.items()}
    named: list[str] = [] if None in lengths else ["split"]
    for rows in read(["user_index", *named, "history"]):
        for part in splits.values():
            part.count(rows)
    for part in splits.values():
        part.allocate()
    for rows in read(["user_index", *named, "history", "target"]):
        for part in splits.values():
            part.fill(rows)
    return {split: Histories(part.items, part.starts, part.targets) for split, part in splits.items()}


class _Split:
    """The histories of one split while they are read."""

    def __init__(self, name: str | None, length: int | None, sample: Sample | None) -> None:
        self.name, self.length, self.sample = name, length, sample
        self.users, self.counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        self.number = 0

    def count(self, rows: pa.RecordBatch) -> None:
        """Take note of the users of a batch and of the lengths of their histories."""
        chosen = self._chosen(rows)
        users, offsets = rows.column("user_index").to_numpy()[chosen], rows.column("history").offsets.to_numpy()
        self.users.append(users)
        self.counts.append(self._cut(np.diff(offsets)[chosen]).astype(np.int32))
        self.number += len(users)
        if self.sample and self.number > 2 * self.sample.number:
            self._keep(self.sample.possible)

    def _keep(self, choose: Callable[[NDArray[np.int64]], NDArray[np.bool_]]) -> None:
        users, counts = np.concatenate(self.users), np.concatenate(self.counts)
        chosen = choose(users)
        self.users, self.counts, self.number = [users[chosen]], [counts[chosen]], int(chosen.sum())

    def allocate(self) -> None:
        """Allocate the arrays of all users, sorted."""
        if self.sample:
            self._keep(self.sample.chosen)
        self.sorted, self.starts = np.concatenate(self.users), np.zeros(self.number + 1, np.int64)
        self.users.clear()
        counts = np.concatenate(self.counts)
        self.counts.clear()
        np.cumsum(counts[np.argsort(self.sorted, kind="stable")], out=self.starts[1:])
        del counts
        self.sorted.sort()
        self.targets = np.full(self.number, -1, np.int64)
        self.items = np.empty(self.starts[-1], np.int32)

    def fill(self, rows: pa.RecordBatch) -> None:
        """Copy the histories and targets of a batch to their places."""
        chosen, history = np.flatnonzero(self._chosen(rows)), rows.column("history")
        users = rows.column("user_index").to_numpy()[chosen]
        place = np.searchsorted(self.sorted, users)
        if self.sample:
            there = self.sorted.take(place, mode="clip") == users if self.number else np.zeros(len(users), bool)
            chosen, place = chosen[there], place[there]
        offsets = history.offsets.to_numpy()
        lengths = self._cut(np.diff(offsets)[chosen])
        source = spans(offsets[1:][chosen] - lengths, lengths)
        self.items[spans(self.starts[place], lengths)] = history.values.to_numpy()[source]
        self.targets[place] = rows.column("target").fill_null(-1).to_numpy()[chosen]

    def _cut(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return lengths if self.length is None else np.minimum(lengths, self.length)

    def _chosen(self, rows: pa.RecordBatch) -> NDArray[np.bool_]:
        if self.name is None:
            return np.ones(rows.num_rows, bool)
        mask: NDArray[np.bool_] = pc.equal(rows.column("split"), self.name).to_numpy(zero_copy_only=False)
        return mask


def epoch_users(
    histories: Histories, users: int, seed: int, number: int, workers: Workers, device: torch.device
) -> NDArray[np.int32]:
    """Return the users of each step of epoch ``number`` [steps, share]: this worker's share of ``users`` users per
    step, shuffled. All workers make equally many steps; one with fewer users repeats some."""
    share = max(1, users // workers.world)
    largest = int(workers.gather(torch.tensor([len(histories)], device=device)).max())
    steps = -(-largest // share)
    return shuffled(np.random.default_rng([seed, number, workers.rank]), len(histories), steps * share).reshape(
        steps, share
    )


def log_q(targets: Tensor, users: int, workers: Workers, device: torch.device) -> Tensor:
    """Return the log-probability [M] with which a negative is item i, where negatives are drawn from the targets of all
    workers' batches (methods 7.4). Each worker passes the counts ``targets`` [M] of its targets and the number of its
    ``users``: a batch has equally many users of every worker. An item that is no target is as likely as the rarest."""
    share = workers.sum(targets.to(device) / max(1, users))
    share /= share.sum().clamp(min=torch.finfo(share.dtype).tiny)
    least = float(share.masked_fill(share == 0, torch.inf).min()) if len(share) else 1.0
    return share.clamp_(min=min(least, 1.0)).log_()
