"""How far today's items are from those that the tokenizer knows: norms, quantization error, use of codes, cold items, the proxy of richness.

Norms and errors are those that encoding left in ``gauges``, so no vector is read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
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
    the share of cold items; Spearman(norm, count). ``one_of``: see :func:`every`."""
    rows = sids.select("stratum", F.inline("gauges")).persist()
    try:
        deciles = F.percentile_approx("norm", [i / _BINS for i in range(1, _BINS)], 1000).alias("edges")
        edges = edges or {row["modality"]: list(row["edges"]) for row in rows.groupBy("modality").agg(deciles).collect()}
        shares = {m: _shares(rows.filter(F.col("modality") == m), list(inner)) for m, inner in edges.items()}
        grouped = rows.groupBy("modality", "stratum").agg(F.avg("error").alias("error"), F.count("*").alias("items")).collect()
    finally:
        rows.unpersist()
    error: dict[str, dict[str, float]] = {}
    for row in grouped:
        if row["error"] is not None:
            error.setdefault(row["modality"], {})[row["stratum"]] = row["error"]
    for m, by_stratum in error.items():
        items = {row["stratum"]: row["items"] for row in grouped if row["modality"] == m}
        error[m]["all"] = float(np.average([by_stratum[s] for s in items], weights=list(items.values())))
    strata = {row["stratum"]: row["count"] for row in sids.groupBy("stratum").count().collect()}
    stats = lake.read("catalog_stats").to_pylist()
    return {
        "every": one_of,
        "edges": edges,
        "shares": shares,
        "error": error,
        "cold": strata.get("cold", 0) / max(1, sum(strata.values())),
        "spearman": stats[0]["spearman"] if stats else None,
    }


def against(baseline: dict[str, Any], day: dict[str, Any]) -> dict[str, Any]:
    """Today's items (measured as ``day`` with the baseline's ``edges``) against those of ``baseline``: for each modality the stability index of its
    norms, in the bins of the baseline's deciles, and the ratio of quantization errors, of all and by stratum."""
    norms = {m: stability_index(shares, day["shares"][m]) for m, shares in baseline["shares"].items() if m in day["shares"]}
    ratios = {
        m: {s: value / baseline["error"][m][s] for s, value in by_stratum.items() if baseline["error"].get(m, {}).get(s)}
        for m, by_stratum in day["error"].items()
    }
    return {"norms": norms, "error_ratio": ratios, "cold": day["cold"], "spearman": day["spearman"]}


def usage(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Jensen-Shannon divergence in bits of the use of each slot's codes, from the code metrics of two generations; empty where slots differ."""
    if before["slots"] != after["slots"]:
        return {}
    return {name: jensen_shannon(p, q) for name, p, q in zip(after["slots"], before["codes"], after["codes"]) if len(p) == len(q)}


def _shares(norms: DataFrame, edges: list[float]) -> list[float]:
    """Share of ``norms`` in each bin between ``edges``."""
    row = norms.agg(*(F.avg((F.col("norm") <= edge).cast("double")).alias(f"e{i}") for i, edge in enumerate(edges))).first()
    below = [row[f"e{i}"] or 0.0 for i in range(len(edges))] if row else [0.0] * len(edges)
    return [float(share) for share in np.diff([0.0, *below, 1.0])]
