"""Regroup the items that share a SID, where a nightly run without Spark changes a few of them: collision ranks and
sizes of groups."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adasid.metrics.tally import RARE
from adasid.tables import PAD, STRATA
from pipelines.nightly.differences import Change, Integers, Mask, NeedsFullRun
from pipelines.nightly.nightly_run import NightlyRun

Sizes = dict[int, int]
"""Maps the size of a group to the number of groups of that size."""


class Groups(NamedTuple):
    """Groups of items with the same SID, after a nightly run. ``ranks``: collision ranks of the encoded rows; ``sizes``
    of all groups over all items, and ``tail_sizes`` over the tail and cold ones; ``shared``: the increase of the number
    of tail and cold items in groups of several items."""

    ranks: pa.Array
    sizes: Sizes
    tail_sizes: Sizes
    shared: int


def code_matrix(rows: pa.Table | pa.RecordBatch, length: int) -> Integers:
    """Return the codes [n, L] of rows of ``sids``."""
    return np.asarray(pc.list_flatten(rows["codes"]).to_numpy().reshape(-1, length), np.int64)


def regroup(nightly: NightlyRun, change: Change, codes: Integers, encoded: pa.Table) -> Groups:
    """Regroup the SIDs that gain, lose or recount an item. ``codes``: of the rows ``encoded``, whose ranks follow
    :func:`pipelines.publish.collisions.ranked`."""
    live, length = nightly.live, codes.shape[1]
    leaving = code_matrix(change.published.filter(pa.array(~change.of("new"))), length)
    distinct = np.unique(np.concatenate([codes, leaving]), axis=0)
    order = _hashes(distinct).argsort()
    distinct, hashes = distinct[order], _hashes(distinct)[order]
    if (hashes[1:] == hashes[:-1]).any():
        raise NeedsFullRun("two SIDs have the same hash")

    def group(rows: Integers) -> Integers:
        """Return the index of each row of codes in ``distinct``; -1 for none."""
        index = np.minimum(np.searchsorted(hashes, _hashes(rows)), len(hashes) - 1)
        return np.where((distinct[index] == rows).all(1), index, -1)

    member_ids, member_groups, member_ranks = list[pa.Array](), list[Integers](), list[Integers]()
    for part in nightly.lake.batches("sids", live.sids_version, ["item_id", "codes", "collision_rank"]):
        index = group(code_matrix(part, length))
        mask = index >= 0
        member_ids.append(part["item_id"].filter(pa.array(mask)))
        member_groups.append(index[mask])
        member_ranks.append(part["collision_rank"].to_numpy()[mask])
    members = pa.chunked_array(member_ids, pa.string()).combine_chunks()
    group_of_member, ranks = np.concatenate(member_groups), np.concatenate(member_ranks)
    tail_before, tail_after = _tail_only(nightly, change, members)
    touched = change.ids.filter(pa.array(change.of("changed", "removed")))
    stays = ~pc.is_in(members, touched).to_numpy(zero_copy_only=False)
    group_of_row, tail_rows = group(codes), change.after.of(change.of("new", "changed")).tail_only()
    n = len(hashes)
    sizes = (
        np.bincount(group_of_member, minlength=n),
        np.bincount(group_of_member[stays], minlength=n) + np.bincount(group_of_row, minlength=n),
    )
    tail_sizes = (
        np.bincount(group_of_member, tail_before, n),
        np.bincount(group_of_member[stays], tail_after[stays], n) + np.bincount(group_of_row, tail_rows, n),
    )
    shared = tail_sizes[1][sizes[1] > 1].sum() - tail_sizes[0][sizes[0] > 1].sum()
    member = pc.index_in(encoded["item_id"].combine_chunks(), members).fill_null(-1).to_numpy()
    same_group = np.append(group_of_member, -1)[member] == group_of_row
    previous = np.where(same_group, np.append(ranks, -1)[member], -1)
    first = np.zeros(n, np.int64)
    np.maximum.at(first, group_of_member[stays], ranks[stays] + 1)
    np.maximum.at(first, group_of_row, previous + 1)
    return Groups(
        _ranks(group_of_row, first, previous, encoded),
        _resized(live.metrics["group_sizes"], *sizes),
        _resized(live.metrics["tail_group_sizes"], *tail_sizes),
        int(shared),
    )


def _hashes(codes: Integers) -> NDArray[np.uint64]:
    """Hash each row of codes [n, L] to an integer; equal rows have equal hashes."""
    factors = np.random.default_rng(0).integers(1, 2**63, codes.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    hashes: NDArray[np.uint64] = ((codes - PAD).astype(np.uint64) * factors).sum(1, dtype=np.uint64)
    return hashes


def _resized(known: list[list[int]], before: NDArray[Any], after: NDArray[Any]) -> Sizes:
    """Return size -> number of groups, where some of the ``known`` groups have another size."""
    groups = Counter({size: number for size, number in known})
    groups.subtract(before.astype(np.int64).tolist())
    groups.update(after.astype(np.int64).tolist())
    return {size: number for size, number in groups.items() if size and number}


def _tail_only(nightly: NightlyRun, change: Change, members: pa.Array) -> tuple[Mask, Mask]:
    """Return the boolean masks of ``members`` that are tail or cold, before and after."""
    parts = nightly.lake.batches(
        "item_features", nightly.version, ["item_id", "stratum"], pc.field("item_id").isin(members)
    )
    schema = pa.schema([("item_id", pa.string()), ("stratum", pa.string())])
    rows = pa.Table.from_batches([part.cast(schema) for part in parts], schema)
    item_ids = rows["item_id"].combine_chunks()
    after = pc.is_in(
        rows["stratum"].take(pc.index_in(members, item_ids)), pa.array([STRATA[index] for index in RARE])
    ).to_numpy()
    index = pc.index_in(members, change.ids).fill_null(-1).to_numpy()
    exists = pc.is_in(members, item_ids).to_numpy(zero_copy_only=False)
    if (~exists & (index < 0)).any():
        raise NeedsFullRun("a published item is not in item_features, and was not when it got its SID")
    return np.where(index < 0, after, change.before.tail_only()[index]), after


def _ranks(groups: Integers, first: Integers, previous: Integers, encoded: pa.Table) -> pa.Array:
    """Return the rank of each row in its group of ``groups`` [n]: ``previous`` [n] where that is not -1; else by
    (events desc, item_id), starting at ``first`` of the group."""
    rows = pa.table(
        {
            "group": groups,
            "interactions": encoded["interactions"],
            "item_id": encoded["item_id"],
            "row": np.arange(len(groups)),
        }
    )
    rows = rows.filter(pa.array(previous < 0)).sort_by(
        [("group", "ascending"), ("interactions", "descending"), ("item_id", "ascending")]
    )
    group = rows["group"].to_numpy()
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1])) if len(group) else np.zeros(0, np.int64)
    ranks = previous.copy()
    ranks[rows["row"].to_numpy()] = (
        first[group] + np.arange(len(group)) - np.repeat(starts, np.diff(np.append(starts, len(group))))
    )
    return pa.array(ranks, pa.int32())
