"""Find which items are new, changed or removed, and which SIDs differ from the live generation."""

from __future__ import annotations

from typing import Any

from deltalake import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from adasid.config import Config
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
    feed, now = _fed(spark, lake, since, until) if followed(lake, since, until) else None, features
    if feed is not None:
        published = published.join(feed.select("item_id").distinct(), "item_id", "left_semi")
        now = _latest(feed).select(features.columns)
    rows, now = now, now.select("item_id", F.col("fingerprint").alias("_now"))
    then = published.select("item_id", F.col("fingerprint").alias("_then"))
    why = (
        F.when(F.col("_then").isNull(), "new")
        .when(F.col("_now").isNull(), "removed")
        .when(F.col("_now") != F.col("_then"), "changed")
    )
    found = (
        now.join(then, "item_id", "full")
        .select("item_id", why.alias("why"))
        .filter("why IS NOT NULL")
        .persist(StorageLevel.DISK_ONLY)
    )
    return found, rows.join(found, "item_id", "left_semi"), how(feed is not None)


def _fed(spark: SparkSession, lake: Lake, since: int, until: int) -> DataFrame | None:
    """Return the rows of the change feed; None where its files are gone."""
    feed = (
        spark.read.format("delta")
        .option("readChangeFeed", "true")
        .option("startingVersion", since + 1)
        .option("endingVersion", until)
    )
    try:
        rows = (
            feed.load(lake.path("item_features"))
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


def how(fed: bool) -> str:
    """Name the method by which changes are detected: whether by the change feed."""
    return "change feed" if fed else "fingerprints"


def followed(lake: Lake, since: int, until: int) -> bool:
    """Return whether the change feed has every commit from ``since`` to ``until`` as single rows."""
    table = DeltaTable(lake.path("item_features"))
    if table.metadata().configuration.get("delta.enableChangeDataFeed") != "true" or not since < until:
        return False
    commits = {entry["version"]: entry for entry in table.history(table.version() - since)}
    steps = [commits.get(version) for version in range(since + 1, until + 1)]
    return all(step is not None and (step["operation"] in _GRADUAL or _appended(step)) for step in steps)


def _appended(commit: dict[str, Any]) -> bool:
    return bool(commit["operation"] == "WRITE" and commit.get("operationParameters", {}).get("mode") == "Append")


def moved(old: DataFrame, new: DataFrame, policy: str, every: bool = False) -> DataFrame:
    """Return the rows of ``sid_changes`` without the generation, from SIDs before and after [item_id, codes,
    fingerprint]; ``every``: of all items, as equal codes of other slots are other SIDs."""
    before = old.select("item_id", F.col("codes").alias("old_codes"), F.col("fingerprint").alias("_then"))
    after = new.select("item_id", F.col("codes").alias("new_codes"), F.col("fingerprint").alias("_now"))
    why = (
        F.when(F.col("_then").isNull(), "new")
        .when(F.col("_now").isNull(), "removed")
        .otherwise(F.when(F.col("_now") != F.col("_then"), "changed").otherwise(policy))
    )
    rows = before.join(after, "item_id", "full").select("item_id", "old_codes", "new_codes", why.alias("why"))
    return rows if every else rows.filter("NOT (old_codes <=> new_codes)")


def churn(moves: DataFrame, today: DataFrame, metrics: dict[str, Any], old_items: int) -> dict[str, Any]:
    """Aggregate the rows ``moves`` of :func:`moved` into :func:`churned`. ``today``: the items [item_id, interactions,
    stratum]."""
    slots = len(metrics["slots"])
    differ = [
        F.sum((~F.get("old_codes", F.lit(i)).eqNullSafe(F.get("new_codes", F.lit(i)))).cast("int")).alias(f"s{i}")
        for i in range(slots)
    ]
    placed = moves.join(today.select("item_id", "interactions", "stratum"), "item_id", "left")
    kind = (
        F.when(F.col("old_codes").isNull(), "new")
        .when(F.col("new_codes").isNull(), "removed")
        .otherwise("moved")
        .alias("kind")
    )
    groups = placed.groupBy("stratum", kind).agg(
        F.count("*").alias("items"), F.sum("interactions").alias("events"), *differ
    )
    return churned([row.asDict() for row in groups.collect()], metrics, old_items)


def churned(groups: list[dict[str, Any]], metrics: dict[str, Any], old_items: int) -> dict[str, Any]:
    """Return the share of the items of both generations whose SID changed: overall, by slot, by stratum, and weighted
    by training events; 1 where no live item is left. Slots and strata without such an item are left out. The gates'
    shares are of the ``live`` items, or of the ``kept`` ones, which both generations have, and their ``events``.

    ``groups``: of the items whose SID changed, by ``stratum`` and ``kind`` (new, moved, removed): their number
    ``items``, their ``events``, and how many differ in each slot, ``s0``, ``s1``, ...; ``metrics``: those of
    ``sids.measure`` of the new table.
    """

    def of(name: str, kind: str, stratum: str | None = None) -> int:
        return sum((row[name] or 0) for row in groups if row["kind"] == kind and stratum in (None, row["stratum"]))

    new, moved_items, removed = (of("items", kind) for kind in ("new", "moved", "removed"))
    items, events = metrics["items_by_stratum"], metrics["events_by_stratum"]
    kept, known = old_items - removed, sum(events.values()) - of("events", "new")
    share = moved_items / kept if kept else float(old_items > 0)
    return {
        "live": old_items,
        "kept": kept,
        "events": known,
        "new": new,
        "removed": removed,
        "changed": moved_items,
        "unmoved": old_items - removed - moved_items,
        "churn": share,
        "weighted": of("events", "moved") / known if kept and known else share,
        "by_slot": {name: of(f"s{i}", "moved") / kept for i, name in enumerate(metrics["slots"]) if kept},
        "by_stratum": {
            s: of("items", "moved", s) / old for s, count in items.items() if (old := count - of("items", "new", s))
        },
    }


def gates(cfg: Config, churn: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gates on how much a table may differ from the live one, by its :func:`churned`; ``of``: the
    denominator of each share."""
    limits, kept = cfg.retokenize.gates, f"{churn['kept']} items of both generations"
    events = f"{churn['events']} events of the {kept}"
    shares = (
        ("removed", churn["removed"] / max(1, churn["live"]), limits.max_removed, f"{churn['live']} live items"),
        ("churn", churn["churn"], limits.max_churn, kept),
        ("churn, weighted by events", churn["weighted"], limits.max_weighted_churn, events),
    )
    return [{**gate(name, value, limit), "of": of} for name, value, limit, of in shares]


def gate(name: str, value: float | None, limit: float) -> dict[str, Any]:
    """Return a gate that allows at most ``limit``; it passes where ``value`` is None, a metric over no items."""
    return {"gate": name, "value": value, "threshold": limit, "passed": value is None or bool(value <= limit)}
