"""Compute long-tail statistics of the catalogue: training counts and strata of items, Gini, Lorenz and popularity
curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from adasid.config import Features
from adasid.tables import STRATA
from pipelines.features.layout import ITEM
from pipelines.features.ranks import Ranked, rank_by, values_at

PERCENTS = tuple(range(101))
_RANKS = 100


def trained(events: DataFrame, by: Sequence[str]) -> DataFrame:
    """Return by, user_id, ``events`` (the items of the training events, as ``_item`` numbers them) and ``items`` (how
    many different ones) of every user with training events; persisted. A partition in the order of ``by`` is not sorted
    again."""
    listed = F.first("user_id").alias("user_id"), F.collect_list(ITEM).alias("events")
    users = events.filter("split = 'train'").groupBy(*by).agg(*listed)
    return users.select("*", F.size(F.array_distinct("events")).alias("items")).persist()


def user_stats(users: DataFrame) -> DataFrame:
    """Return the rows of ``user_stats``. ``users``: of :func:`trained`."""
    return users.withColumn("interactions", F.size("events"))


def item_stats(accepted: DataFrame, users: DataFrame, features: Features) -> Ranked:
    """Return a row of ``item_stats``, with ``_item``, for every accepted item; its rank is its index. ``accepted``:
    item_id and ``_item``; ``users``: of :func:`trained`."""
    repeats = F.size("events") > F.col("items")
    every = users.select(
        F.explode("events").alias(ITEM), F.lit(1).alias("events"), (~repeats).cast("int").alias("users")
    )
    once = users.filter(repeats).select(F.explode(F.array_distinct("events")).alias(ITEM), F.lit(0), F.lit(1))
    sums = F.sum("events").alias("interactions"), F.sum("users").alias("users")
    counts = every.union(once).groupBy(ITEM).agg(*sums)
    ranked = rank_by(
        accepted.join(counts, ITEM, "left").fillna(0, ["interactions", "users"]),
        F.desc("interactions"),
        F.asc("item_id"),
    )
    head, tail = round(features.head_share * ranked.size), ranked.size - round(features.tail_share * ranked.size)
    stratum = (
        F.when(F.col("interactions") == 0, "cold")
        .when(F.col("rank") < head, "head")
        .when(F.col("rank") >= tail, "tail")
        .otherwise("mid")
    )
    return Ranked(ranked.frame.select("*", F.col("rank").alias("item_index"), stratum.alias("stratum")), ranked.size)


def popularity(stats: Ranked) -> dict[str, Any]:
    """Compute the fields of ``catalog_stats`` that follow from ``item_stats``, by one aggregate of 100 rows. All sums
    are of integers, hence exact.

    Gini = 2 sum(i x_i) / (n sum(x)) - (n + 1) / n with x ascending and i from 1.
    """
    n, count = stats.size, F.col("interactions")
    ascending = F.lit(n) - F.col("rank")
    head = F.sum(F.when(F.col("stratum") == "head", count).otherwise(0))
    sums = [F.sum(count).alias("all"), F.sum(wide(ascending) * wide(count)).alias("weighted"), head.alias("head")]
    sizes = [F.count_if(F.col("stratum") == name).alias(f"n_{name}") for name in STRATA]
    rows = (
        stats.frame.groupBy(F.expr(f"int((({n} - rank - 1) * 100) div {n})").alias("part")).agg(*sums, *sizes).collect()
    )
    whole = {
        key: sum(int(row[key]) for row in rows)
        for key in ("all", "weighted", "head", *(f"n_{name}" for name in STRATA))
    }
    part = {row["part"]: row["all"] for row in rows}
    reached = np.cumsum([0, *(part.get(i, 0) for i in range(100))])
    ranks = sorted({round(rank) for rank in np.geomspace(1, n, _RANKS)})
    counts = values_at(stats, "interactions", (rank - 1 for rank in ranks))
    return {
        "items": n,
        "train_interactions": whole["all"],
        "strata": [(name, whole[f"n_{name}"]) for name in STRATA],
        "gini": 2 * whole["weighted"] / (n * whole["all"]) - (n + 1) / n,
        "head_interactions": whole["head"] / whole["all"],
        "popularity": curve(ranks, (counts[rank - 1] for rank in ranks)),
        "lorenz": curve((-(-i * n // 100) / n for i in PERCENTS), (int(y) / whole["all"] for y in reached)),
    }


def curve(x: Iterable[float], y: Iterable[float]) -> list[dict[str, float]]:
    """Return the points of a curve in the format of ``catalog_stats``."""
    return [{"x": float(a), "y": float(b)} for a, b in zip(x, y)]


def wide(column: Column) -> Column:
    """Cast an integer so that products and sums do not overflow and do not depend on the order of rows."""
    return column.cast("decimal(18,0)")
