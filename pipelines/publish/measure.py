"""Measure a table of semantic IDs on Spark: use of codes, collisions, strata."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from adasid import tables
from adasid.metrics.tally import Tally
from adasid.sid import Slot
from adasid.tables import BEHAVIOR, PAD
from pipelines.publish.gates import Metrics


def measure(encoded: DataFrame, slots: list[Slot]) -> Metrics:
    """Return the metrics of a :class:`Tally`, as JSON data. Collects L x K rows and small histograms only."""
    tally = Tally.none(slots)
    for row in encoded.select(F.posexplode("codes").alias("slot", "code")).groupBy("slot", "code").count().collect():
        if row["code"] == PAD:
            tally.pad[row["slot"]] = row["count"]
        else:
            tally.codes[row["slot"], row["code"]] = row["count"]
    behavior = [index for index, slot in enumerate(slots) if slot.kind == BEHAVIOR]
    sums = [F.sum(F.col("weights")[i].cast("double")).alias(f"w{i}") for i in range(len(slots))]
    sums += [F.sum(F.col("active")[i].cast("int")).alias(f"a{i}") for i in range(len(slots))]
    slots_on = sum((F.col("active")[i].cast("int") for i in behavior), F.lit(0))
    sums += [F.sum((slots_on == n).cast("int")).alias(f"n{n}") for n in range(len(behavior) + 1)]
    totals = F.count("*").alias("items"), F.sum("interactions").alias("events")
    for row in encoded.filter("stratum IS NOT NULL").groupBy("stratum").agg(*totals, *sums).collect():
        stratum = tables.STRATA.index(row["stratum"])
        tally.items[stratum], tally.events[stratum] = row["items"], row["events"]
        tally.weights[stratum] = [row[f"w{i}"] for i in range(len(slots))]
        tally.active[stratum] = [row[f"a{i}"] for i in range(len(slots))]
        tally.slots_on[stratum] = [row[f"n{n}"] for n in range(len(behavior) + 1)]
    tail = F.col("stratum").isin("tail", "cold").cast("int")
    by_size = (
        encoded.groupBy("codes")
        .agg(F.count("*").alias("size"), F.coalesce(F.sum(tail), F.lit(0)).alias("tail"))
        .groupBy("size", "tail")
    )
    groups, tail_only, shared = Counter[int](), Counter[int](), 0
    for row in by_size.agg(F.count("*").alias("number")).collect():  # one row for each distinct (size, tail)
        groups[row["size"]] += row["number"]
        if row["tail"]:
            tail_only[row["tail"]] += row["number"]
            shared += row["tail"] * row["number"] * (row["size"] > 1)
    return replace(tally, groups=groups, tail_only=tail_only, shared=shared).metrics(slots)
