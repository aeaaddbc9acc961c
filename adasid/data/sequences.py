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
from adasid.distributed import Workers
from adasid.ragged import spans

Name = TypeVar("Name", str, None)
Choose = Callable[[NDArray[np.int64]], NDArray[np.bool_]]


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
        """Count the events that a model of ``length`` events trains on, the latest ``length`` + 1 of each history: how
        often each of ``items`` items is among them, and how often after another of them, as a target, [items] each."""
        starts, ends = self.starts[:-1], self.starts[1:]
        first = np.maximum(starts, ends - length - 1)
        events = self.items if (first == starts).all() else self.items[spans(first, ends - first)]
        visits = torch.bincount(torch.from_numpy(events), minlength=items)
        opening = torch.from_numpy(self.items[first[first < ends]])
        return visits, visits - torch.bincount(opening, minlength=items)

    def last(self, users: NDArray[np.int64], length: int | None = None) -> NDArray[np.int64]:
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
    read: Read, lengths: Mapping[Name, int | None], choose: Mapping[Name, Choose] | None = None
) -> dict[Name, Histories]:
    """Read the histories of each split of ``lengths`` in the order of user_index, cut to their latest
    ``lengths[split]`` items (None: all). The split None takes all rows. ``choose``: for some splits, a function from
    the user_index of all its users [n] to whether each is read [n]; the histories of the others need no memory.

    ``read`` streams the columns user_index, split, history and target, twice: the first time the arrays are sized, the
    second time they are filled, so that little more than the result is in memory."""
    splits = {split: _Split(split, length, (choose or {}).get(split)) for split, length in lengths.items()}
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

    def __init__(self, name: str | None, length: int | None, choose: Choose | None) -> None:
        self.name, self.length, self.choose = name, length, choose
        self.parts: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []

    def count(self, rows: pa.RecordBatch) -> None:
        """Take note of the users of a batch and of the lengths of their histories."""
        chosen = self._chosen(rows)
        users, offsets = rows.column("user_index").to_numpy()[chosen], rows.column("history").offsets.to_numpy()
        self.parts.append((users, self._cut(np.diff(offsets)[chosen]).astype(np.int32)))

    def allocate(self) -> None:
        """Allocate the arrays of all chosen users, sorted."""
        users = np.concatenate([np.zeros(0, np.int64), *(users for users, _ in self.parts)])
        counts = np.concatenate([np.zeros(0, np.int32), *(counts for _, counts in self.parts)])
        self.parts.clear()
        if self.choose:
            chosen = self.choose(users)
            users, counts = users[chosen], counts[chosen]
        order = np.argsort(users, kind="stable")
        self.users, self.starts = users[order], np.zeros(len(users) + 1, np.int64)
        np.cumsum(counts[order], out=self.starts[1:])
        del users, counts, order
        self.targets = np.full(len(self.users), -1, np.int64)
        self.items = np.empty(self.starts[-1], np.int32)

    def fill(self, rows: pa.RecordBatch) -> None:
        """Copy the histories and targets of a batch to their places."""
        chosen, history = np.flatnonzero(self._chosen(rows)), rows.column("history")
        users = rows.column("user_index").to_numpy()[chosen]
        place = np.searchsorted(self.users, users)
        if self.choose:
            there = self.users.take(place, mode="clip") == users if len(self.users) else np.zeros(len(users), bool)
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
) -> NDArray[np.int64]:
    """Return the users of each step of epoch ``number`` [steps, share]: this worker's share of ``users`` users per
    step, shuffled. All workers make equally many steps; one with fewer users repeats some."""
    share = max(1, users // workers.world)
    largest = int(workers.gather(torch.tensor([len(histories)], device=device)).max())
    order = np.random.default_rng([seed, number, workers.rank]).permutation(len(histories))
    return np.resize(order, (-(-largest // share), share))


def log_q(targets: Tensor, users: int, workers: Workers, device: torch.device) -> Tensor:
    """Return the log-probability [M] with which a negative is item i, where negatives are drawn from the targets of all
    workers' batches (methods 7.4). Each worker passes the counts ``targets`` [M] of its targets and the number of its
    ``users``: a batch has equally many users of every worker. An item that is no target is as likely as the rarest."""
    share = workers.sum(targets.to(device) / max(1, users))
    share /= share.sum().clamp(min=torch.finfo(share.dtype).tiny)
    found = share[share > 0]
    return share.clamp(min=float(found.min()) if len(found) else 1.0).log().float()
