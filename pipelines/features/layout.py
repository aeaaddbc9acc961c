"""Divide users and their events into buckets, so that a training worker reads only the files of its own users.

The events of a user are in one bucket, and are processed in one partition from the first exchange to the last write: a
bucket has one partition, or several where the data is large.
"""

from __future__ import annotations

from typing import NamedTuple

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid.errors import InputError
from pipelines.engines.lake import Lake
from pipelines.features.ranks import Ranked, rank_by

PART = "_part"
"""This column determines the partition of a user's rows."""
USER = ("user_index", PART)
"""These columns identify a user in windows and groups, which then need no exchange: one integer orders users faster
than their ids do."""
BUCKET = "bucket"
ROW = "_row"
"""This column numbers events; another execution gives other numbers."""
ITEM = "_item"
"""This column has an integer for each item_id, which is faster to move, to sort and to join."""


class Layout(NamedTuple):
    """A layout has ``buckets``, and for each partition the value of ``_part`` that Spark's hash partitioning sends
    there; their number is a multiple of ``buckets``."""

    buckets: int
    keys: tuple[int, ...]

    def part(self) -> Column:
        """Return the value of ``_part`` of a row's ``user_id``."""
        return F.get(F.array(*map(F.lit, self.keys)), _modulo(len(self.keys)))

    def bucket(self) -> Column:
        """Return the ``bucket`` of a row's ``user_id``."""
        return _modulo(self.buckets)

    def place(self, frame: DataFrame) -> DataFrame:
        """Move the rows of ``frame``, which has ``_part``, to their partitions."""
        return frame.repartition(len(self.keys), PART)

    def indexed(self, events: DataFrame, users: Ranked) -> DataFrame:
        """Add ``user_index`` to ``events``, which stay in their partitions. ``users``: of :func:`rank_users`."""
        index = self.place(users.frame.select("user_id", PART, F.col("rank").alias("user_index")))
        return events.join(index.hint("shuffle_hash"), [PART, "user_id"])


def layout(spark: SparkSession, buckets: int) -> Layout:
    """Return a layout of about as many partitions as ``spark.sql.shuffle.partitions`` says, at least one a bucket."""
    return Layout(buckets, _keys(spark, buckets * -(-_partitions(spark) // buckets)))


def by_index(frame: DataFrame, size: int, *order: Column) -> DataFrame:
    """Sort ``frame`` by ``item_index``, which is below ``size``, then by ``order``: every partition has one range of
    the index, and all are equally long. Ranges of Spark's would be sampled, which computes the frame twice."""
    spark = frame.sparkSession
    keys = _keys(spark, min(_partitions(spark), max(size, 1)))
    part = F.get(F.array(*map(F.lit, keys)), F.expr(f"int(item_index * {len(keys)} div {max(size, 1)})"))
    return frame.repartition(len(keys), part).sortWithinPartitions("item_index", *order)


def _partitions(spark: SparkSession) -> int:
    return int(spark.conf.get("spark.sql.shuffle.partitions") or 1)


def _keys(spark: SparkSession, number: int) -> tuple[int, ...]:
    """Return for each of ``number`` partitions an integer that Spark's hash partitioning sends there."""
    # with 16 candidates for each partition nearly every one gets a key; one without stays empty
    candidates = spark.range(16 * number + 64, numPartitions=1).select(F.col("id").cast("int").alias("key"))
    rows = candidates.groupBy(F.expr(f"pmod(hash(key), {number})").alias("part")).agg(F.min("key").alias("key"))
    keys = {row["part"]: row["key"] for row in rows.collect()}
    return tuple(keys.get(part, part) for part in range(number))


def rank_users(events: DataFrame) -> Ranked:
    """Rank the users of ``events`` by user_id. The frame has user_id, ``_part`` and ``events``, their number."""
    return rank_by(events.groupBy("user_id", PART).agg(F.count("*").alias("events")), F.asc("user_id"))


def check(lake: Lake, *tables: str) -> None:
    """Raise InputError where one of ``tables`` is of a version of adasid that wrote no buckets."""
    for table in tables:
        if not {BUCKET, "user_index"} <= {*lake.schema(table).names}:
            raise InputError(
                f"{table} has no columns 'bucket' and 'user_index', so that it is of another version of adasid: run "
                "jobs/build_features.py again"
            )


def _modulo(number: int) -> Column:
    return F.pmod(F.xxhash64("user_id"), F.lit(number)).cast("int")
