"""Compare the items of two versions of ``item_features`` without Spark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adasid import tables
from adasid.errors import InputError
from adasid.metrics.tally import RARE
from adasid.tables import BEHAVIOR, SIDS, STRATA
from pipelines.nightly.nightly_run import NightlyRun
from pipelines.nightly.verdict import MEASURED

_COLUMNS_COMPARED = ["fingerprint", "stratum", "interactions"]
"""An item differs if one of these columns does; the first is the fingerprint of its vectors."""
_ROWS = 4
"""The feed may have this many rows for each of ``retokenize.small_night`` items: an item that changed twice has
four."""
LATE = pa.array(["update_postimage", "insert"])
"""These change types of the feed give the state of an item after the change."""
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class NeedsFullRun(Exception):
    """Raised where only the full run on Spark can judge the table."""


class _Long(Exception):
    """Raised where the change feed has too many rows."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison describes items [n]. ``stratum``: index in ``tables.STRATA``, -1 for an absent item;
    ``events``: training events."""

    stratum: Integers
    events: Integers

    def of(self, mask: Mask) -> Side:
        """Return the rows that a boolean mask selects."""
        return Side(self.stratum[mask], self.events[mask])

    def tail_only(self) -> Mask:
        """Return the boolean mask of the tail and cold items."""
        return np.isin(self.stratum, RARE)


@dataclass(frozen=True)
class Change:
    """A change lists the items that differ, sorted by ``ids`` [n]. ``kind``: new, changed, removed, or same (only its
    counts differ); ``before`` and ``after``: both sides; ``published``: the live rows (null for none); ``version``: of
    the feed that wrote each item's current row; None without a feed."""

    ids: pa.Array
    kind: NDArray[np.str_]
    before: Side
    after: Side
    published: pa.Table
    version: pa.Array | None

    def of(self, *kinds: str) -> Mask:
        """Return the boolean mask of the items of these kinds."""
        return np.isin(self.kind, kinds)


@dataclass(frozen=True)
class _Difference:
    """A difference has items [n] sorted by ``ids``, whether each exists before (``was``) and after (``now``), and its
    columns ``_COLUMNS_COMPARED`` on both sides; ``version`` as in :class:`Change`."""

    ids: pa.Array
    was: Mask
    now: Mask
    first: pa.Table
    last: pa.Table
    version: pa.Array | None = None


def _read_feed(nightly: NightlyRun, since: int, columns: list[str], modalities: list[str]) -> Iterator[pa.RecordBatch]:
    """Stream the change feed in batches, typed as ``tables`` types items with vectors of these ``modalities``."""
    schema = pa.schema([*_schema(columns, modalities), ("_change_type", pa.string()), ("_commit_version", pa.int64())])
    feed = nightly.lake.delta("item_features").load_cdf(since + 1, nightly.version, columns=schema.names)
    for part in pa.RecordBatchReader.from_stream(feed):
        yield part.select(schema.names).cast(schema)


def read(nightly: NightlyRun, since: int, fed: bool) -> tuple[Change | None, bool]:
    """Return how the items differ from those of version ``since``, None for not at all, and whether the change feed was
    used. The feed is read where ``fed``, unless it is long (counts of many items changed); otherwise all items are
    compared.

    Raises NeedsFullRun for more than ``retokenize.small_night`` items with other vectors, and where the differences do
    not fit the published rows.
    """
    most = nightly.cfg.retokenize.small_night
    try:
        difference = _by_feed(nightly, since, _ROWS * most) if fed else _by_comparison(nightly, since, most)
    except _Long:
        difference, fed = _by_comparison(nightly, since, most), False
    if difference is None:
        return None, fed
    was, now = difference.was, difference.now
    if difference.ids.null_count or (difference.last["fingerprint"].is_null().to_numpy() & now).any():
        raise NeedsFullRun("items without an id or a fingerprint")
    published = _published(nightly, difference.ids)
    if (published["codes"].is_valid().to_numpy() != was).any():
        raise NeedsFullRun("the changes of item_features do not fit the items of the live SIDs")
    same = pc.equal(difference.last["fingerprint"], published["fingerprint"]).fill_null(False).to_numpy()
    kind = np.select([was & now & same, was & now, now, was], ["same", "changed", "new", "removed"], "passing")
    if (differ := int((kind != "same").sum())) > most:
        raise NeedsFullRun(f"{differ} items have other vectors, more than retokenize.small_night")
    sides = list[Side]()
    for exists, side in ((was, difference.first), (now, difference.last)):
        stratum = pc.index_in(side["stratum"], pa.array(STRATA)).fill_null(-1).to_numpy()
        if (stratum[exists] < 0).any():
            raise NeedsFullRun("items without a stratum")
        sides.append(
            Side(np.where(exists, stratum, -1), np.where(exists, side["interactions"].fill_null(0).to_numpy(), 0))
        )
    stays = kind != "passing"  # inserted and deleted again since
    mask = pa.array(stays)
    version = difference.version.filter(mask) if difference.version is not None else None
    ids, published = difference.ids.filter(mask), published.filter(mask)
    return Change(ids, kind[stays], sides[0].of(stays), sides[1].of(stays), published, version), fed


def vectors(nightly: NightlyRun, since: int, change: Change, columns: list[str], modalities: list[str]) -> pa.Table:
    """Return the current ``columns`` and vectors of the new and changed items, in the order of ``change``. Raises
    NeedsFullRun where one is missing or occurs twice."""
    mask = pa.array(change.of("new", "changed"))
    ids, names, parts = change.ids.filter(mask), [*columns, *modalities], list[pa.RecordBatch]()
    schema = _schema(names, modalities)
    if change.version is None:
        batches = nightly.lake.batches("item_features", nightly.version, names, pc.field("item_id").isin(ids))
        parts += [part.select(names).cast(schema) for part in batches]
    else:
        version = change.version.filter(mask)
        for part in _read_feed(nightly, since, names, modalities):
            newest = pc.equal(part["_commit_version"], version.take(pc.index_in(part["item_id"], ids))).fill_null(False)
            parts.append(part.filter(pc.and_(newest, pc.is_in(part["_change_type"], LATE))).select(names))
    rows = pa.Table.from_batches(parts, schema)
    index = pc.index_in(ids, rows["item_id"].combine_chunks())
    if index.null_count or rows.num_rows != len(ids):
        raise NeedsFullRun("the vectors of an item are missing or occur twice")
    return rows.take(index)


def _schema(columns: list[str], modalities: list[str]) -> pa.Schema:
    """Return the schema of ``columns`` as ``tables`` types items with vectors of these ``modalities``, all nullable."""
    schema = tables.item_features([m for m in modalities if m != BEHAVIOR])
    return pa.schema([schema.field(name).with_nullable(True) for name in columns])


def _by_feed(nightly: NightlyRun, since: int, most: int) -> _Difference | None:
    """Return the differences in the feed, None for none. Raises _Long where it has more rows than ``most``."""
    parts, rows = list[pa.RecordBatch](), 0
    for part in _read_feed(nightly, since, ["item_id", *_COLUMNS_COMPARED], []):
        parts.append(part)
        rows += part.num_rows
        if rows > most:
            raise _Long
    if not rows:
        return None
    feed = pa.Table.from_batches(parts)
    feed = feed.append_column("_late", pc.is_in(feed["_change_type"], LATE))
    feed = feed.sort_by(
        [("item_id", "ascending"), ("_commit_version", "ascending"), ("_late", "ascending")]
    ).combine_chunks()
    opens = np.append(True, pc.not_equal(feed["item_id"][1:], feed["item_id"][:-1]).to_numpy())
    first, last = (feed.filter(pa.array(mask)) for mask in (opens, np.append(opens[1:], True)))
    was, now = ~first["_late"].to_numpy(), last["_late"].to_numpy()
    return _Difference(
        first["item_id"].combine_chunks(), was, now, first, last, last["_commit_version"].combine_chunks()
    )


def _by_comparison(nightly: NightlyRun, since: int, most: int) -> _Difference | None:
    """Compare every row of ``item_features`` with the one from which its live SID was computed. Returns None where no
    vectors differ. Raises NeedsFullRun where those of more than ``most`` items do, where an item has two rows or none,
    and where version ``since`` is gone."""
    lake, live, schema = nightly.lake, nightly.live, _schema(["item_id", *_COLUMNS_COMPARED], [])
    try:
        counts = _columns(
            lake.batches("item_features", since, ["item_id", *_COLUMNS_COMPARED[1:]]),
            _schema(["item_id", *_COLUMNS_COMPARED[1:]], []),
        )
    except InputError as error:
        raise NeedsFullRun(f"item_features has no version {since} any more") from error
    then = _columns(
        lake.batches("sids", live.sids_version, ["item_id", _COLUMNS_COMPARED[0]]),
        _schema(["item_id", _COLUMNS_COMPARED[0]], []),
    )
    now = _columns(lake.batches("item_features", nightly.version, schema.names), schema)
    if any(side[name].null_count for side in (then, now) for name in ("item_id", _COLUMNS_COMPARED[0])):
        raise NeedsFullRun("items without an id or a fingerprint")
    then = then.join(counts, "item_id", join_type="left outer")
    both = then.join(now, "item_id", join_type="full outer", left_suffix=" then", right_suffix=" now")
    alike = [pc.equal(both[f"{name} then"], both[f"{name} now"]).fill_null(False) for name in _COLUMNS_COMPARED]
    differ = both.num_rows - pc.sum(alike[0]).as_py() if both.num_rows else 0
    if not differ:
        return None
    if differ > most:
        raise NeedsFullRun(f"{differ} items have other vectors, more than retokenize.small_night")
    rows = both.filter(pc.invert(reduce(pc.and_, alike))).sort_by("item_id").combine_chunks()
    ids = rows["item_id"].combine_chunks()
    if pc.any(pc.equal(ids[1:], ids[:-1])).as_py():
        raise NeedsFullRun("an item has two rows in item_features")
    first, last = (
        rows.select([f"{name} {side}" for name in _COLUMNS_COMPARED]).rename_columns(_COLUMNS_COMPARED)
        for side in ("then", "now")
    )
    exists_before, exists_now = (side[_COLUMNS_COMPARED[0]].is_valid().to_numpy() for side in (first, last))
    return _Difference(ids, exists_before, exists_now, first, last)


def _columns(parts: Iterator[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches([part.select(schema.names).cast(schema) for part in parts], schema)


def _published(nightly: NightlyRun, ids: pa.Array) -> pa.Table:
    """Return the live rows of ``sids`` of these items, in their order."""
    names = ["item_id", "fingerprint", *MEASURED]
    schema = pa.schema([SIDS.field(name).with_nullable(True) for name in names])
    parts = nightly.lake.batches("sids", nightly.live.sids_version, names, pc.field("item_id").isin(ids))
    rows = _columns(parts, schema).combine_chunks()
    return rows.take(pc.index_in(ids, rows["item_id"].combine_chunks()))
