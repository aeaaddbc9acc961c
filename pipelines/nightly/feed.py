"""What the change feed of ``item_features`` tells of a few items, read without Spark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from numpy.typing import NDArray

from adasid import tables
from adasid.metrics.tally import RARE
from adasid.tables import BEHAVIOR, SIDS, STRATA
from pipelines.nightly.night import Night

_ROWS = 4
"""Rows of the feed for each of ``retokenize.small_night`` items: an item that changed twice has four."""
LATE = pa.array(["update_postimage", "insert"])
"""Change types of the feed that tell how an item is from then on."""
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Unusual(Exception):
    """Something that only a look at the whole table can judge."""


@dataclass(frozen=True)
class Side:
    """Of items [n], ``stratum``: place in ``tables.STRATA``, -1 where there is no such item; ``events`` of training."""

    stratum: Integers
    events: Integers

    def of(self, chosen: Mask) -> Side:
        """Of some."""
        return Side(self.stratum[chosen], self.events[chosen])

    def rare(self) -> Mask:
        """Which are tail or cold."""
        return np.isin(self.stratum, RARE)


@dataclass(frozen=True)
class Change:
    """Items of the feed, sorted by ``ids`` [n]: ``kind`` (new, changed, removed; same: only its counts differ); the ``version`` that made it what it is;
    how it was ``before`` and is ``after``; its live row of ``published`` (null for none)."""

    ids: pa.Array
    kind: NDArray[np.str_]
    version: pa.Array
    before: Side
    after: Side
    published: pa.Table

    def of(self, *kinds: str) -> Mask:
        """Which are of these kinds."""
        return np.isin(self.kind, kinds)


def fed(night: Night, since: int, columns: list[str], modalities: list[str]) -> Iterator[pa.RecordBatch]:
    """The change feed, some rows at a time, typed as ``tables`` types items with vectors of these ``modalities``."""
    schema = tables.item_features([m for m in modalities if m != BEHAVIOR])
    fields = [schema.field(name).with_nullable(True) for name in columns]
    schema = pa.schema([*fields, ("_change_type", pa.string()), ("_commit_version", pa.int64())])
    feed = DeltaTable(night.lake.path("item_features")).load_cdf(since + 1, night.version, columns=schema.names)
    for part in pa.RecordBatchReader.from_stream(feed):
        yield part.select(schema.names).cast(schema)


def read(night: Night, since: int, modalities: list[str]) -> Change | None:
    """What the feed tells; None for nothing. Raises Unusual for more than ``retokenize.small_night`` items, and where the feed and the published
    rows do not fit together."""
    parts, rows, most = list[pa.RecordBatch](), 0, night.cfg.retokenize.small_night
    for part in fed(night, since, ["item_id", "fingerprint", "stratum", "interactions"], modalities):
        parts.append(part)
        rows += part.num_rows
        if rows > _ROWS * most:
            raise Unusual(f"the change feed has more than {_ROWS * most} rows")
    if not rows:
        return None
    feed = pa.Table.from_batches(parts)
    feed = feed.append_column("_late", pc.is_in(feed["_change_type"], LATE))
    feed = feed.sort_by([("item_id", "ascending"), ("_commit_version", "ascending"), ("_late", "ascending")]).combine_chunks()
    opens = np.append(True, pc.not_equal(feed["item_id"][1:], feed["item_id"][:-1]).to_numpy())
    first, last = (feed.filter(pa.array(chosen)) for chosen in (opens, np.append(opens[1:], True)))
    was, now, ids = ~first["_late"].to_numpy(), last["_late"].to_numpy(), first["item_id"].combine_chunks()
    if len(ids) > most:
        raise Unusual(f"{len(ids)} items differ, more than retokenize.small_night")
    published = _published(night, ids)
    if (published["codes"].is_valid().to_numpy() != was).any():
        raise Unusual("the change feed tells of items that are not those of the live SIDs")
    same = pc.equal(last["fingerprint"], published["fingerprint"]).fill_null(False).to_numpy()
    kind = np.select([was & now & same, was & now, now, was], ["same", "changed", "new", "removed"], "passing")
    sides = list[Side]()
    for there, side in ((was, first), (now, last)):
        stratum = pc.index_in(side["stratum"], pa.array(STRATA)).fill_null(-1).to_numpy()
        if (stratum[there] < 0).any():
            raise Unusual("items without a stratum")
        sides.append(Side(np.where(there, stratum, -1), np.where(there, side["interactions"].to_numpy(), 0)))
    stays = kind != "passing"  # it came and went
    chosen = pa.array(stays)
    version = last["_commit_version"].combine_chunks()
    return Change(ids.filter(chosen), kind[stays], version.filter(chosen), sides[0].of(stays), sides[1].of(stays), published.filter(chosen))


def _published(night: Night, ids: pa.Array) -> pa.Table:
    """The live rows of ``sids`` of these items, in their order."""
    parts = night.lake.batches("sids", night.live["sids_version"], SIDS.names, pc.field("item_id").isin(ids))
    nullable = pa.schema([field.with_nullable(True) for field in SIDS])
    rows = pa.Table.from_batches([part.cast(SIDS) for part in parts], SIDS).cast(nullable).combine_chunks()
    return rows.take(pc.index_in(ids, rows["item_id"].combine_chunks()))
