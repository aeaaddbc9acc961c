"""Find which items are new, changed or removed since the live generation, on Spark."""

from __future__ import annotations

from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake

_GRADUAL = {"MERGE", "UPDATE", "DELETE", "OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES"}
"""The change feed of these operations is as small as the change. An overwrite's is the whole table twice: then
fingerprints are compared."""


def detect(
    spark: SparkSession, lake: Lake, features: DataFrame, published: DataFrame, since: int, until: int
) -> tuple[DataFrame, DataFrame, str]:
    """Return the items whose vectors differ from those of their live SID, ``item_id`` and ``why`` (new, changed,
    removed); the current rows of those that still exist; and the method of detection.

    The change feed of ``item_features`` since the version that the live generation read is used where it is enabled and
    has single rows, so that no vector of another item is read; otherwise, or where history is gone, the fingerprints of
    ``features`` and ``published`` are compared.
    """
    feed, rows = _read_feed(spark, lake, since, until) if followed(lake, since, until) else None, features
    if feed is not None:
        published = published.join(feed.select("item_id").distinct(), "item_id", "left_semi")
        rows = _latest(feed).select(features.columns)
    now = rows.select("item_id", F.col("fingerprint").alias("_now"))
    then = published.select("item_id", F.col("fingerprint").alias("_then"))
    why = (
        F.when(F.col("_then").isNull(), "new")
        .when(F.col("_now").isNull(), "removed")
        .when(F.col("_now") != F.col("_then"), "changed")
    )
    touched = (
        now.join(then, "item_id", "full")
        .select("item_id", why.alias("why"))
        .filter("why IS NOT NULL")
        .persist(StorageLevel.DISK_ONLY)
    )
    return touched, rows.join(touched, "item_id", "left_semi"), how(feed is not None)


def _read_feed(spark: SparkSession, lake: Lake, since: int, until: int) -> DataFrame | None:
    """Return the rows of the change feed; None where its files are gone."""
    feed = (
        spark.read.format("delta")
        .option("readChangeFeed", "true")
        .option("startingVersion", since + 1)
        .option("endingVersion", until)
    )
    try:
        rows = (
            feed.load(engine.uri(lake.path("item_features")))
            .filter("_change_type <> 'update_preimage'")
            .persist(StorageLevel.DISK_ONLY)
        )
        rows.count()
    except (Py4JJavaError, PySparkException):
        return None
    return rows


def _latest(feed: DataFrame) -> DataFrame:
    """Return the last row of each item of a feed; none for those that were deleted last."""
    order = Window.partitionBy("item_id").orderBy(F.desc("_commit_version"), F.col("_change_type") == "delete")
    return feed.withColumn("_row", F.row_number().over(order)).filter("_row = 1 AND _change_type <> 'delete'")


def how(by_feed: bool) -> str:
    """Name the method by which changes are detected."""
    return "change feed" if by_feed else "fingerprints"


def followed(lake: Lake, since: int, until: int) -> bool:
    """Return whether the change feed has every commit from ``since`` to ``until`` as single rows."""
    table = lake.delta("item_features")
    if table.metadata().configuration.get("delta.enableChangeDataFeed") != "true" or not since < until:
        return False
    commits = {entry["version"]: entry for entry in table.history(table.version() - since)}
    steps = [commits.get(version) for version in range(since + 1, until + 1)]
    return all(step is not None and (step["operation"] in _GRADUAL or _appended(step)) for step in steps)


def _appended(commit: dict[str, Any]) -> bool:
    return bool(commit["operation"] == "WRITE" and commit.get("operationParameters", {}).get("mode") == "Append")
