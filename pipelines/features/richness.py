"""Measure how much is known about an item: its behaviour norm, scaled to [0, 1], or its training count where the two do
not correlate."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from adasid.config import Features
from adasid.errors import InputError
from adasid.metrics.richness import constant, quantile_ranks, quantiles, rank_correlation, unit
from pipelines.features.ranks import Ranked, rank_by, values_at
from pipelines.features.statistics import PERCENTS, curve, wide

_BINS = 30


class Richness(NamedTuple):
    """Richness is given as a ``column`` computed from ``norm`` and ``interactions`` (0 where there is no norm);
    ``fields`` are columns of ``richness_stats``."""

    column: Column
    fields: dict[str, Any]


def measure(measured: DataFrame, features: Features) -> Richness:
    """Compute richness over ``measured``: item_id, interactions and norm of the items that have a behaviour vector.
    Raises InputError if there is none, or a norm that is not finite."""
    ranked = rank_by(measured.select("item_id", "interactions", "norm"), F.asc("norm"), F.asc("item_id"))
    if not ranked.size:
        raise InputError("no item has a behaviour vector: train it again, or fill the column 'behavior' of table items")
    counts = _counts(ranked)
    spearman, least, most = _spearman(ranked, counts)
    where = quantile_ranks((*features.norm_percentiles, *PERCENTS), ranked.size)
    values = values_at(ranked, "norm", (rank for first, second, _ in where for rank in (first, second)))
    if not math.isfinite(values[ranked.size - 1]):
        raise InputError(
            f"a norm of the behaviour vectors is {values[ranked.size - 1]}, not a finite number: train them again, or "
            "mend the column 'behavior' of table items"
        )
    if equal := constant(values[0], values[ranked.size - 1]):
        spearman = 0.0  # their ranks follow rounding and ids alone
    source = "norm" if spearman >= features.proxy_min_spearman else "count"
    low, high, *norms = quantiles(values.__getitem__, where)
    low = high if equal else low
    if source == "norm":
        column = _unit(F.col("norm"), low, high)
        spread = quantiles(lambda rank: unit(values[rank], low, high), where[2:])
    else:
        first, last = math.log1p(least), math.log1p(most)
        column = _unit(F.log1p("interactions"), first, last)
        exact = counts.agg(
            F.percentile(F.log1p("interactions"), [percent / 100 for percent in PERCENTS], F.col("items")).alias("at")
        ).first()
        assert exact is not None
        spread = [unit(value, first, last) for value in exact["at"]]
    fields = {
        "norm_low": low,
        "norm_high": high,
        "norm_quantiles": curve(PERCENTS, norms),
        "norm_by_count": _by_count(ranked, counts, most),
        "spearman": spearman,
        "richness_source": source,
        "richness_quantiles": curve(PERCENTS, spread),
    }
    return Richness(F.when(F.col("norm").isNull(), 0.0).otherwise(column), fields)


def _counts(ranked: Ranked) -> DataFrame:
    """Return interactions, items with that count, and twice their average rank (an integer). One task sums it up: n
    events have at most sqrt(2 n) distinct counts."""
    grouped = ranked.frame.groupBy("interactions").agg(F.count("*").alias("items"))
    before = F.sum("items").over(Window.orderBy("interactions").rowsBetween(Window.unboundedPreceding, -1))
    return grouped.select("*", (2 * F.coalesce(before, F.lit(0)) + F.col("items") + 1).alias("twice")).persist()


def _spearman(ranked: Ranked, counts: DataFrame) -> tuple[float, int, int]:
    """Return Spearman(norm, count), where equal norms share their mean rank, 0 where all counts are equal, with the
    least and the largest count. It is exact: sums of integers, on doubled ranks."""
    y = wide(F.col("twice"))
    norms = (
        ranked.frame.join(F.broadcast(counts), "interactions")
        .groupBy("norm")
        .agg(
            wide(F.min("rank") + F.max("rank") + 2).alias("x"),
            wide(F.count("*")).alias("n"),
            F.sum(y).alias("y"),
            F.sum(y * y).alias("yy"),
            F.min("interactions").alias("least"),
            F.max("interactions").alias("most"),
        )
        .withColumn("xy", F.col("x") * F.col("y").cast("decimal(20,0)"))
    )
    row = norms.agg(
        *(F.sum(name).alias(name) for name in ("xy", "yy")),
        F.sum(F.col("n") * (F.col("x") * F.col("x")).cast("decimal(20,0)")).alias("xx"),
        F.min("least").alias("least"),
        F.max("most").alias("most"),
    ).first()
    assert row is not None
    xy, xx, yy = (int(row[name]) for name in ("xy", "xx", "yy"))
    return rank_correlation(ranked.size, xy, xx, yy), row["least"], row["most"]


def _by_count(ranked: Ranked, counts: DataFrame, most: int) -> list[dict[str, float]]:
    """Return quantiles of the norm within at most 31 bins of the count, log-spaced (and one for 0)."""
    edges = sorted({0, *(round(edge) for edge in np.geomspace(1, most + 1, _BINS + 1))})
    number = sum(((F.col("interactions") >= edge).cast("int") for edge in edges[1:-1]), F.lit(0)).alias("bin")
    sizes = {row["bin"]: row["n"] for row in counts.groupBy(number).agg(F.sum("items").alias("n")).collect()}
    binned = rank_by(ranked.frame.select("item_id", "norm", number), F.asc("bin"), F.asc("norm"), F.asc("item_id"))
    where, start = {}, 0
    for bin_, size in sorted(sizes.items()):
        where[bin_] = quantile_ranks((10, 50, 90), size, start)
        start += size
    values = values_at(
        binned, "norm", (rank for at in where.values() for first, second, _ in at for rank in (first, second))
    )
    return [
        {
            "x": math.sqrt(edges[bin_] * (edges[bin_ + 1] - 1)),
            "items": sizes[bin_],
            **dict(zip(("p10", "p50", "p90"), quantiles(values.__getitem__, at))),
        }
        for bin_, at in where.items()
    ]


def _unit(value: Column, low: float, high: float) -> Column:
    return F.least(F.greatest((value - low) / (high - low), F.lit(0.0)), F.lit(1.0)) if high > low else F.lit(0.5)
