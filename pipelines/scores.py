"""Compute AUC and GAUC of more scores than fit one machine, by Spark: the metrics of ``adasid/metrics/ranking.py``.

Sums are of integers or decimals, so they do not depend on partitions or the order of rows. Only totals are collected.
"""

from __future__ import annotations

from itertools import accumulate
from math import sqrt
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from pipelines.features.statistics import wide

_NORMAL = 1.959963984540054
"""This is the 97.5 % quantile of the normal distribution."""

_BOTH = "p > 0 AND n > 0"
_OWN = "double(own) / nullif(2 * double(p) * double(n), 0)"
"""SQL of one user's AUC; it is null with one class only."""


def ranking_metrics(scores: DataFrame) -> dict[str, dict[str, Any]]:
    """Return stratum, and ``all``, -> the metrics that ``adasid.metrics.ranking.ranking_metrics`` computes. ``scores``:
    ``tables.RANKING_SCORES``.

    AUC counts for every positive the negatives below it, and half of those with the same score. The intervals are the
    normal ones of the variance over users (for AUC: Obuchowski, Biometrics 53, 1997), to which the bootstrap converges
    with many users.
    """
    rows = scores.select("user", "label", "score", F.explode(F.array(F.lit("all"), F.col("stratum"))).alias("part"))
    counts = (F.sum("label").cast("bigint").alias("p"), F.sum(1 - F.col("label")).cast("bigint").alias("n"))
    ties = rows.groupBy("part", "user", "score").agg(*counts).persist()
    levels = ties.groupBy("part", "score").agg(F.sum("p").alias("all_p"), F.sum("n").alias("all_n"))
    # persisted, as a second execution could choose other range boundaries
    ranges = levels.repartitionByRange("part", "score").select("*", F.spark_partition_id().alias("_range")).persist()
    users = _users(ties, _below(ranges)).persist()
    totals = [_total(row.asDict()) for row in _sums(users).collect()]
    spread = {row["part"]: row.asDict() for row in _spread(users, totals).collect()} if totals else {}
    for frame in (users, ranges, ties):
        frame.unpersist()
    return {total["part"]: _figures(total, spread.get(total["part"])) for total in totals}


def _below(local: DataFrame) -> DataFrame:
    """Return part, score, all_p, all_n (positives and negatives of this score), p_below, n_below (of lower scores):
    sums within range partitions, plus those of the partitions before."""
    sums = (
        local.groupBy("part", "_range")
        .agg(F.sum("all_p").alias("p"), F.sum("all_n").alias("n"))
        .orderBy("part", "_range")
        .collect()
    )
    starts = []
    for part in sorted({row["part"] for row in sums}):
        ranges = [row for row in sums if row["part"] == part]
        before = [list(accumulate([row[name] for row in ranges], initial=0)) for name in ("p", "n")]
        starts += [(part, row["_range"], p, n) for row, p, n in zip(ranges, *before)]
    offsets = local.sparkSession.createDataFrame(starts, "part string, _range int, _p bigint, _n bigint")
    lower = Window.partitionBy("part", "_range").orderBy("score").rowsBetween(Window.unboundedPreceding, -1)
    below = (
        (F.coalesce(F.sum(f"all_{c}").over(lower), F.lit(0)) + F.col(f"_{c}")).cast("bigint").alias(f"{c}_below")
        for c in ("p", "n")
    )
    return local.join(F.broadcast(offsets), ["part", "_range"]).select("part", "score", "all_p", "all_n", *below)


def _users(ties: DataFrame, levels: DataFrame) -> DataFrame:
    """Return part, user, p, n; ``own``: twice the pairs that the user's positives win against the user's negatives (a
    tie: once); ``wins``: against all users' negatives; ``behind``: twice the pairs that all users' positives lose
    against the user's negatives (a tie: once)."""
    lower = Window.partitionBy("part", "user").orderBy("score").rowsBetween(Window.unboundedPreceding, -1)
    placed = ties.select("*", F.coalesce(F.sum("n").over(lower), F.lit(0)).alias("own_below")).join(
        levels, ["part", "score"]
    )

    def pairs(mine: str, below: str, level: str) -> Column:
        return F.sum(wide(F.col(mine)) * wide(2 * F.col(below) + F.col(level)))

    won = (
        pairs("p", "own_below", "n").alias("own"),
        pairs("p", "n_below", "all_n").alias("wins"),
        pairs("n", "p_below", "all_p").alias("behind"),
    )
    return placed.groupBy("part", "user").agg(F.sum("p").alias("p"), F.sum("n").alias("n"), *won)


def _sums(users: DataFrame) -> DataFrame:
    """Return a row a part: users, p, n, wins; of the users with both classes: their number, samples, and AUC times
    samples."""
    both = [F.count_if(F.expr(_BOTH)).alias("both"), F.sum(F.expr(f"IF({_BOTH}, p + n, 0)")).alias("size")]
    gained = _exact(F.expr(f"coalesce((p + n) * {_OWN}, 0)")).alias("gained")
    return users.groupBy("part").agg(
        F.count("*").alias("users"), *(F.sum(name).alias(name) for name in ("p", "n", "wins")), *both, gained
    )


def _total(row: dict[str, Any]) -> dict[str, Any]:
    """Add ``auc`` and ``gauc`` to a row, None where they are not defined."""
    pairs = 2 * row["p"] * row["n"]
    auc = int(row.pop("wins")) / pairs if pairs else None
    return {**row, "auc": auc, "gauc": float(row.pop("gained")) / row["size"] if row["both"] else None}


def _spread(users: DataFrame, totals: list[dict[str, Any]]) -> DataFrame:
    """Return part, auc, gauc: the users' mean squared weight in each metric, times their number."""
    kinds = "part string, users bigint, p bigint, n bigint, both bigint, size bigint, auc double, gauc double"
    names = [kind.split()[0] for kind in kinds.split(", ")]
    wholes = users.sparkSession.createDataFrame([tuple(total[name] for name in names) for total in totals], kinds)
    wholes = wholes.select("part", *(F.col(name).alias(f"t_{name}") for name in names[1:]))
    joined = users.join(F.broadcast(wholes.filter("t_auc IS NOT NULL")), "part")
    of_auc = "t_users * ((wins / (2D * t_n) - t_auc * p) / t_p + (n - behind / (2D * t_p) - t_auc * n) / t_n)"
    of_gauc = f"t_both * coalesce((p + n) * ({_OWN} - t_gauc), 0) / nullif(t_size, 0)"
    return joined.groupBy("part").agg(
        *(_exact(F.pow(F.expr(text), 2)).alias(name) for name, text in (("auc", of_auc), ("gauc", of_gauc)))
    )


def _figures(total: dict[str, Any], spread: dict[str, Any] | None) -> dict[str, Any]:
    result: dict[str, Any] = {"gauc_users": float(total["both"]), "samples": float(total["p"] + total["n"])}
    if spread is None:
        return result
    for name, users in (("auc", "users"), ("gauc", "both")):
        if total[name] is not None:
            result[name] = total[name]
            if total[users] > 1:
                half = _NORMAL * sqrt(spread[name]) / total[users]
                result[f"{name}_interval"] = [max(0.0, total[name] - half), min(1.0, total[name] + half)]
    return result


def _exact(column: Column) -> Column:
    """Sum a column in decimals."""
    return F.sum(column.cast("decimal(38,18)"))
