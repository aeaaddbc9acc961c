"""How far today's items are from those that the tokenizer knows: norms, quantization error, use of codes, the proxy of richness.

Norms and errors are those that encoding left in ``gauges``, so no vector is read again.
"""

from __future__ import annotations

from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from adasid.metrics.stability import jensen_shannon, stability_index
from pipelines.engines.lake import Lake

_BINS = 10


def every(items: int, sample: int) -> int:
    """Of how many items one is gauged, so that about ``sample`` of ``items`` are."""
    return max(1, items // sample)


def sampled(features: DataFrame, one_of: int) -> DataFrame:
    """The items that are gauged: the same ones every night, by a hash of the id."""
    return features if one_of == 1 else features.filter(gauged(one_of))


def gauged(one_of: int) -> Column:
    """Whether an item is gauged."""
    return F.pmod(F.xxhash64("item_id"), F.lit(one_of)) == 0


def measure(lake: Lake, sids: DataFrame, one_of: int, edges: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """What is known of a day's items, from ``sids`` [stratum, gauges]: for every input of the tokenizer the deciles of its norm (or the given
    ``edges``) and the share of items between them, and the mean squared quantization error, by stratum too (none for a method without a decoder);
    Spearman(norm, count). ``one_of``: see :func:`every`."""
    rows = sids.select("stratum", F.inline("gauges"))
    if edges is None:
        deciles = F.percentile_approx("norm", [i / _BINS for i in range(1, _BINS)], 1000).alias("edges")
        edges = {row["modality"]: list(row["edges"]) for row in rows.groupBy("modality").agg(deciles).collect()}
    above = F.create_map(*(part for m, values in edges.items() for part in (F.lit(m), F.array(*map(F.lit, values)))))
    bin = F.size(F.filter(above[F.col("modality")], lambda edge: F.col("norm") > edge)).alias("bin")
    number = F.count("*").alias("items"), F.sum("error").alias("error"), F.count("error").alias("decoded")
    found = rows.groupBy("modality", "stratum", bin).agg(*number).collect()
    shares, error = dict[str, list[float]](), dict[str, dict[str, float]]()
    for m in edges:
        own = [row for row in found if row["modality"] == m]
        items = max(1, sum(row["items"] for row in own))
        shares[m] = [sum(row["items"] for row in own if row["bin"] == i) / items for i in range(_BINS)]
        parts = {stratum: [row for row in own if row["stratum"] == stratum] for stratum in {row["stratum"] for row in own}}
        sums = {name: (sum(row["error"] or 0.0 for row in part), sum(row["decoded"] for row in part)) for name, part in {**parts, "all": own}.items()}
        if sums["all"][1]:
            error[m] = {name: total / count for name, (total, count) in sums.items() if count}
    stats = lake.read("catalog_stats").to_pylist()
    return {"every": one_of, "edges": edges, "shares": shares, "error": error, "spearman": stats[0]["spearman"] if stats else None}


def against(baseline: dict[str, Any], day: dict[str, Any]) -> dict[str, Any]:
    """Today's items (measured as ``day`` with the baseline's ``edges``) against those of ``baseline``: for each modality the stability index of its
    norms, in the bins of the baseline's deciles, and the ratio of quantization errors, of all and by stratum."""
    norms = {m: stability_index(shares, day["shares"][m]) for m, shares in baseline["shares"].items() if m in day["shares"]}
    ratios = {
        m: {s: value / baseline["error"][m][s] for s, value in by_stratum.items() if baseline["error"].get(m, {}).get(s)}
        for m, by_stratum in day["error"].items()
    }
    return {"norms": norms, "error_ratio": ratios, "spearman": day["spearman"]}


def usage(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Jensen-Shannon divergence in bits of the use of each slot's codes, from the code metrics of two generations; empty where slots differ."""
    if before["slots"] != after["slots"]:
        return {}
    return {name: jensen_shannon(p, q) for name, p, q in zip(after["slots"], before["codes"], after["codes"]) if len(p) == len(q)}
