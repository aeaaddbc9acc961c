"""Store the events of users as flat arrays, for a model that scores single events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adasid.data.reading import Read
from adasid.data.samples import mixed
from adasid.tables import RANKING_ONLY, SPLITS

COLUMNS = ["user_index", "position", "item_index", "label", "in_history", "split"]
_TIME = "time"
_NO_TIME = np.iinfo(np.int64).min
_CHUNK = 1 << 17
"""Events that are sorted at a time."""
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Events:
    """``Events`` contains the events of users, by user and time. ``ids`` [U]: user_index of each user, ascending;
    events of user u are those from ``starts[u]`` up to and excluding ``starts[u + 1]``. ``users`` [n] int32: index of
    an event's user in ``ids``; ``items`` [n] int32; ``labels`` [n] int8: 0, 1, or -1 for none; ``splits`` [n] int8:
    index in ``tables.SPLITS``, where ``RANKING_ONLY`` counts as train.

    Items of the events that are in histories are ``visited`` [v] int32, in the same order; each event comes after the
    first ``before`` [n] of them. Events of a user at one time, of which some are in no history, are a slate: nothing
    says in which order they were seen, so that none of them comes after another (its label could be read from the
    history)."""

    ids: Ints
    starts: Ints
    users: NDArray[np.int32]
    items: NDArray[np.int32]
    labels: NDArray[np.int8]
    splits: NDArray[np.int8]
    visited: NDArray[np.int32]
    before: NDArray[Any]

    def __len__(self) -> int:
        return len(self.items)

    def first(self, events: Ints) -> Ints:
        """Return the number of visited items before the first event of the user of each of ``events`` [B]."""
        return self.before[self.starts[self.users[events]]].astype(np.int64)

    def histories(self, events: Ints, length: int) -> Ints:
        """Return at most the latest ``length`` items before each event, padded at the end with -1: [B, longest]."""
        before = self.before[events].astype(np.int64)
        first = np.maximum(self.first(events), before - length)
        width = max(1, int((before - first).max(initial=1)))
        position = first[:, None] + np.arange(width)
        items = self.visited[np.minimum(position, len(self.visited) - 1)]
        return np.where(position < before[:, None], items, -1).astype(np.int64)

    def chosen(self, split: int, label: int | None) -> NDArray[Any]:
        """Return the events of a split that have a history, and the label (None: any of 0 and 1)."""
        found = [np.zeros(0, self.before.dtype)]
        for start in range(0, len(self), _CHUNK):
            part = np.arange(start, min(start + _CHUNK, len(self)))
            labels = self.labels[part]
            mask = (self.splits[part] == split) & (labels >= 0 if label is None else labels == label)
            part = part[mask]
            found.append(part[self.before[part] > self.first(part)].astype(self.before.dtype))
        return np.concatenate(found)

    def uniform(self, events: Ints, number: int) -> NDArray[np.float64]:
        """Return ``number`` random numbers in [0, 1) of each event [B, number], a hash (SplitMix64) of its user_index,
        its position among the user's events and a counter: they do not depend on which other events there are."""
        users = self.users[events]
        key = mixed(mixed(self.ids[users].astype(np.uint64)) + (events - self.starts[users]).astype(np.uint64))
        steps = np.arange(1, number + 1, dtype=np.uint64) * _GAMMA
        drawn: NDArray[np.float64] = (mixed(key[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return drawn


def read_events(read: Read) -> Events:
    """Read the events of ``read(COLUMNS)``, in any order; where some are in no history, their ``time``, too. ``read``
    is called twice: the first time the arrays are sized, the second time they are filled and then sorted in place, by
    chunks, so that little more than the result is in memory."""
    ids, starts, slates = _users(read)
    total = int(starts[-1])
    items, positions = np.empty(total, np.int32), np.empty(total, np.int32)
    labels, splits, visits = np.empty(total, np.int8), np.empty(total, np.int8), np.empty(total, bool)
    times = np.empty(total if slates else 0, np.int64)
    free, names = starts[:-1].copy(), pa.array([*SPLITS, RANKING_ONLY])
    for rows in read([*COLUMNS, _TIME] if slates else COLUMNS):
        users = np.searchsorted(ids, rows.column("user_index").to_numpy())
        order = np.argsort(users, kind="stable")
        distinct, first, counts = np.unique(users[order], return_index=True, return_counts=True)
        place = np.empty(len(users), np.int64)
        place[order] = np.repeat(free[distinct] - first, counts) + np.arange(len(users))
        free[distinct] += counts
        items[place] = rows.column("item_index").to_numpy()
        positions[place] = rows.column("position").to_numpy()
        labels[place] = rows.column("label").fill_null(-1).to_numpy()
        visits[place] = rows.column("in_history").to_numpy(zero_copy_only=False)
        splits[place] = pc.index_in(rows.column("split"), names).to_numpy(zero_copy_only=False) % len(SPLITS)
        if slates:
            times[place] = rows.column(_TIME).cast(pa.int64()).fill_null(_NO_TIME).to_numpy()
    del free
    users = np.repeat(np.arange(len(ids), dtype=np.int32), np.diff(starts))
    _sort([items, labels, visits, splits, *([times] if slates else [])], users, positions, starts)
    del positions
    before: NDArray[Any] = np.cumsum(visits, dtype=np.int32 if total < 2**31 else np.int64)
    np.subtract(before, visits, out=before)
    for part in _chunks(starts) if slates else ():
        before[part] = _before_slates(users[part], times[part], visits[part], before[part])
    del times
    visited = items if visits.all() else items[visits]
    return Events(ids, starts, users, items, labels, splits, visited, before)


def _sort(
    columns: list[NDArray[Any]], users: NDArray[np.int32], positions: NDArray[np.int32], starts: NDArray[np.int64]
) -> None:
    """Sort ``columns`` [n each] in place by user and position."""
    for part in _chunks(starts):
        order = np.lexsort((positions[part], users[part]))
        for column in columns:
            column[part] = column[part][order]


def _before_slates(
    users: NDArray[np.int32], times: Ints, visits: NDArray[np.bool_], before: NDArray[Any]
) -> NDArray[Any]:
    """Return ``before`` [n] with that of the first event for all events of a slate. An event without a time is in
    none."""
    first = np.ones(len(users), bool)
    first[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1]) | (times[1:] == _NO_TIME)
    starts, moment = np.flatnonzero(first), np.cumsum(first) - 1
    slate = np.logical_or.reduceat(~visits, starts)
    return np.where(slate[moment], before[starts][moment], before)


def _users(read: Read) -> tuple[Ints, Ints, bool]:
    """Return the distinct users, ascending [U], the start of the events of each [U + 1], and whether some event is in
    no history."""
    counts, outside = np.zeros(1, np.int32), False
    for rows in read(["user_index", "in_history"]):
        outside |= not pc.all(rows.column("in_history")).as_py()
        distinct, found = np.unique(rows.column("user_index").to_numpy(), return_counts=True)
        if len(distinct) and distinct[-1] >= len(counts):
            counts = np.concatenate([counts, np.zeros(max(int(distinct[-1]) + 1 - len(counts), len(counts)), np.int32)])
        counts[distinct] += found.astype(np.int32)
    ids = np.flatnonzero(counts)
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(counts[ids], out=starts[1:])
    return ids, starts, outside


def _chunks(starts: Ints) -> Iterator[slice]:
    """Yield slices of about ``_CHUNK`` events that hold all events of their users."""
    user = 0
    while user < len(starts) - 1:
        stop = max(user + 1, int(np.searchsorted(starts, starts[user] + _CHUNK, side="right")) - 1)
        yield slice(int(starts[user]), int(starts[stop]))
        user = stop
