"""Read one worker's part of the tables.

``sequences`` and ``ranking_samples`` are partitioned by a hash of the user (``bucket``): worker r of w reads the
buckets b with b % w = r, and no row is read by two workers. Tables of items are ordered by item_index: a worker reads
the row groups of some ranges of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adasid.config import Config
from adasid.data.reading import Read
from adasid.distributed import Workers
from adasid.errors import InputError
from pipelines.engines.lake import Lake

BUCKET = "bucket"
_ROWS = 2048
_BUFFER = 1 << 22
"""A column's pages are read so many bytes at a time, so that no row group is in memory as a whole."""
_LAST = np.iinfo(np.int64).max
_BLOCKS = (16, 8, 4)
"""Ranges of a worker, the most that the row groups allow. The catalogue is ordered by popularity: a worker with one
range would hold only popular items or only cold ones, while samples of all workers take equally many of each."""
_GROUPS = 4
"""The ends of ranges are moved to those of row groups where a range has at least so many of them. In a smaller table
neighbours both read the row group in which their ranges meet."""


@dataclass(frozen=True)
class ItemPart:
    """``ItemPart`` has the items of one worker: those from ``starts`` [n] up to and excluding ``stops`` [n]; ``all``:
    whether these are all items."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    all: bool = False

    def mask(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which item indices [n] are in this part [n]."""
        place = np.searchsorted(self.starts, index, side="right") - 1
        inside: NDArray[np.bool_] = (place >= 0) & (index < self.stops[place])
        return inside

    def overlaps(self, least: int, largest: int) -> bool:
        """Return whether an index from ``least`` to ``largest`` may be in this part."""
        return bool(((self.starts <= largest) & (self.stops > least)).any())


def rows(
    lake: Lake,
    table: str,
    version: int,
    columns: list[str],
    buckets: list[int] | None = None,
    items: ItemPart | None = None,
    size: int = _ROWS,
) -> Iterator[pa.RecordBatch]:
    """Stream the rows of one version, ``size`` at a time, with little more than these in memory: those of the
    ``buckets`` (None: all) and of the part ``items`` (None: all). Files of other buckets are not opened, and row groups
    without an item of the part are not read."""
    dataset = lake.open(table, version).to_pyarrow_dataset()
    part = None if items is None or items.all else items
    wanted = columns if part is None or "item_index" in columns else [*columns, "item_index"]
    schema = pa.schema([dataset.schema.field(name) for name in wanted])
    for fragment, groups in _chosen(dataset, buckets, part):
        with pq.ParquetFile(fragment.open(), metadata=fragment.metadata, buffer_size=_BUFFER, pre_buffer=False) as file:
            for batch in file.iter_batches(size, groups, wanted, use_threads=False):
                found = batch.select(wanted).cast(schema)
                if part is not None:
                    found = found.filter(pa.array(part.mask(found.column("item_index").to_numpy()))).select(columns)
                if found.num_rows:
                    yield found


def _chosen(
    dataset: ds.Dataset, buckets: list[int] | None, part: ItemPart | None
) -> Iterator[tuple[ds.ParquetFileFragment, list[int]]]:
    """Yield the files of these buckets and items, and of each the row groups to read."""
    for fragment in dataset.get_fragments(None if buckets is None else pc.field(BUCKET).isin(buckets)):
        groups = [g.id for g in fragment.row_groups if part is None or part.overlaps(*span(g))]
        if groups:
            yield fragment, groups


def reader(
    lake: Lake, table: str, version: int, buckets: list[int] | None = None, items: ItemPart | None = None
) -> Read:
    """Return :func:`rows` as a function of the columns."""
    return lambda columns: rows(lake, table, version, columns, buckets, items)


def buckets_of(lake: Lake, table: str, version: int, cfg: Config, workers: Workers) -> list[int]:
    """Return the buckets of a table of users that this worker reads. Raises InputError if there are fewer buckets than
    workers."""
    number = cfg.features.user_buckets
    if number < workers.world:
        raise InputError(
            f"features.user_buckets is {number}, fewer than the {workers.world} workers, each of which reads whole "
            "buckets: raise it, best to a multiple of ray.workers, and run jobs/build_features.py again, or lower "
            "ray.workers"
        )
    present = {int(values[BUCKET]) for values in lake.open(table, version).partitions()}
    return sorted(bucket for bucket in present if bucket % workers.world == workers.rank)


def item_part(lake: Lake, table: str, version: int, workers: Workers) -> ItemPart:
    """Return the items of ``table`` that this worker reads: every ``world``-th of ranges of equal length, in turn from
    the first worker to the last and back, each moved to the nearest ends of row groups where there are enough."""
    if workers.world == 1:
        return ItemPart(np.zeros(1, np.int64), np.full(1, _LAST), True)
    fragments = lake.open(table, version).to_pyarrow_dataset().get_fragments()
    groups = [g for fragment in fragments for g in fragment.row_groups]
    spans = np.array(sorted(map(span, groups)), np.int64).reshape(-1, 2)
    items = sum(g.num_rows for g in groups)
    ordered = bool((spans[1:, 0] > spans[:-1, 1]).all())
    snapped = [n for n in _BLOCKS if ordered and len(spans) >= _GROUPS * n * workers.world]
    turns = (snapped or _BLOCKS[-1:])[0]
    ends = np.arange(turns * workers.world + 1) * items // (turns * workers.world)
    if snapped:
        later = np.searchsorted(spans[:, 0], ends[1:-1])
        before, after = spans[later - 1, 0], spans[np.minimum(later, len(spans) - 1), 0]
        ends[1:-1] = np.where(ends[1:-1] - before < after - ends[1:-1], before, after)
    ends[-1] = _LAST
    turn = np.arange(turns)
    mine = turn * workers.world + np.where(turn % 2 == 0, workers.rank, workers.world - 1 - workers.rank)
    return ItemPart(ends[mine], ends[mine + 1])


def span(group: ds.RowGroupInfo) -> tuple[int, int]:
    """Return the least and the largest item_index of a row group, or bounds of all where it has no statistics."""
    found = (group.statistics or {}).get("item_index")
    return (int(found["min"]), int(found["max"])) if found else (0, _LAST)
