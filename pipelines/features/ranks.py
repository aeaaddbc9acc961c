"""Compute a global rank, and the values at some ranks, without moving a whole table to one task."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

_ROW_BITS = 33  # monotonically_increasing_id: partition number above these bits, row within the partition below


class Ranked(NamedTuple):
    """A ranked frame has a column ``rank`` (0-based, dense, persisted); ``size``: its number of rows."""

    frame: DataFrame
    size: int


def rank_by(frame: DataFrame, *order: Column) -> Ranked:
    """Rank all rows by ``order``, which must be total for the rank to be deterministic: range partitions, each
    sorted. Spark samples the ranges: ``frame`` is read twice, and computed once."""
    return numbered(frame.persist().repartitionByRange(*order).sortWithinPartitions(*order))


def numbered(frame: DataFrame) -> Ranked:
    """Rank all rows by their partition, then by where they are in it. Other partitions give other ranks, so that they
    are good within one job. Persisted: a second execution could choose other boundaries of ranges."""
    local = frame.select("*", F.monotonically_increasing_id().alias("_at")).persist()
    part = F.shiftright("_at", _ROW_BITS)
    sizes = {row["part"]: row["n"] for row in local.groupBy(part.alias("part")).agg(F.count("*").alias("n")).collect()}
    starts = list(itertools.accumulate((sizes.get(i, 0) for i in range(max(sizes, default=0) + 1)), initial=0))
    start = F.get(F.array(*map(F.lit, starts)), part.cast("int"))
    row = F.col("_at").bitwiseAND(F.lit((1 << _ROW_BITS) - 1))
    return Ranked(local.select(*frame.columns, (start + row).cast("bigint").alias("rank")), starts[-1])


def values_at(ranked: Ranked, column: str, ranks: Iterable[int]) -> dict[int, float]:
    """Return rank -> value of ``column``, for a bounded number of ranks."""
    rows = ranked.frame.filter(F.col("rank").isin(sorted(set(ranks)))).select("rank", column).collect()
    return {row["rank"]: row[column] for row in rows}
