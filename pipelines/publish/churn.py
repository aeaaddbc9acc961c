"""Find which SIDs differ from those of the live generation, and measure their churn."""

from __future__ import annotations

from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.publish.gates import Metrics


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


def measure_churn(moves: DataFrame, current: DataFrame, metrics: Metrics, old_items: int) -> Metrics:
    """Aggregate the rows ``moves`` of :func:`moved` into :func:`churned`. ``current``: the items [item_id,
    interactions, stratum]."""
    slots = len(metrics["slots"])
    differ = [
        F.sum((~F.get("old_codes", F.lit(i)).eqNullSafe(F.get("new_codes", F.lit(i)))).cast("int")).alias(f"s{i}")
        for i in range(slots)
    ]
    with_stratum = moves.join(current.select("item_id", "interactions", "stratum"), "item_id", "left")
    kind = (
        F.when(F.col("old_codes").isNull(), "new")
        .when(F.col("new_codes").isNull(), "removed")
        .otherwise("moved")
        .alias("kind")
    )
    groups = with_stratum.groupBy("stratum", kind).agg(
        F.count("*").alias("items"), F.sum("interactions").alias("events"), *differ
    )
    return churned([row.asDict() for row in groups.collect()], metrics, old_items)


def churned(groups: list[dict[str, Any]], metrics: Metrics, old_items: int) -> Metrics:
    """Return the share of the items of both generations whose SID changed: overall, by slot, by stratum, and weighted
    by training events; 1 where no live item is left. Slots and strata without such an item are left out. The gates'
    shares are of the ``live`` items, or of the ``kept`` ones, which both generations have, and their ``events``.

    ``groups``: of the items whose SID changed, by ``stratum`` and ``kind`` (new, moved, removed): their number
    ``items``, their ``events``, and how many differ in each slot, ``s0``, ``s1``, ...; ``metrics``: those of
    :func:`pipelines.publish.measure.measure` of the new table.
    """

    def total(name: str, kind: str, stratum: str | None = None) -> int:
        return sum((row[name] or 0) for row in groups if row["kind"] == kind and stratum in (None, row["stratum"]))

    new, moved_items, removed = (total("items", kind) for kind in ("new", "moved", "removed"))
    items, events = metrics["items_by_stratum"], metrics["events_by_stratum"]
    in_both, events_of_both = old_items - removed, sum(events.values()) - total("events", "new")
    share = moved_items / in_both if in_both else float(old_items > 0)
    return {
        "live": old_items,
        "kept": in_both,
        "events": events_of_both,
        "new": new,
        "removed": removed,
        "changed": moved_items,
        "unmoved": old_items - removed - moved_items,
        "churn": share,
        "weighted": total("events", "moved") / events_of_both if in_both and events_of_both else share,
        "by_slot": {name: total(f"s{i}", "moved") / in_both for i, name in enumerate(metrics["slots"]) if in_both},
        "by_stratum": {
            stratum: total("items", "moved", stratum) / old
            for stratum, count in items.items()
            if (old := count - total("items", "new", stratum))
        },
    }
