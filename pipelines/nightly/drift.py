"""How far today's items are from those that the tokenizer knows: norms, quantization error, use of codes, cold items, the proxy of richness."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid.metrics.stability import jensen_shannon, stability_index
from adasid.tokenizers.encode import loaded
from adasid.training.shards import batch_of
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake

_BINS = 10
_ROW = pa.schema([("modality", pa.string()), ("stratum", pa.string()), ("norm", pa.float64()), ("error", pa.float64())])


def sampled(features: DataFrame, items: int, sample: int) -> DataFrame:
    """About ``sample`` of the ``items`` rows, chosen by a hash of the id: the same items every night."""
    return features if items <= sample else features.filter(F.pmod(F.xxhash64("item_id"), F.lit(items // sample)) == 0)


def measure(
    spark: SparkSession,
    lake: Lake,
    sample: DataFrame,
    folder: Path,
    manifest: dict[str, Any],
    batch: int,
    edges: dict[str, list[float]] | None = None,
) -> dict[str, Any]:
    """What is known of a day's items: for every input of the tokenizer the deciles of its norm (or the given ``edges``) and the share of items
    between them, and the mean squared quantization error, by stratum too (none for a method without a decoder); the share of cold items;
    Spearman(norm, count)."""
    weights = spark.sparkContext.broadcast((folder / "weights.safetensors").read_bytes())
    columns = ["item_id", "item_index", "stratum", "richness", *manifest["widths"]]
    rows = sample.select(*columns).mapInArrow(_prober(json.dumps(manifest), weights, batch), engine.struct(_ROW)).persist()
    try:
        deciles = F.percentile_approx("norm", [i / _BINS for i in range(1, _BINS)], 1000).alias("edges")
        edges = edges or {row["modality"]: list(row["edges"]) for row in rows.groupBy("modality").agg(deciles).collect()}
        grouped = rows.groupBy("modality", "stratum").agg(F.avg("error").alias("error"), F.count("*").alias("items")).collect()
        shares = {m: _shares(rows.filter(F.col("modality") == m), list(e)) for m, e in edges.items()}
    finally:
        rows.unpersist()
    error: dict[str, dict[str, float]] = {}
    for row in grouped:
        if row["error"] is not None:
            error.setdefault(row["modality"], {})[row["stratum"]] = row["error"]
    for m, by_stratum in error.items():
        items = {row["stratum"]: row["items"] for row in grouped if row["modality"] == m}
        error[m]["all"] = float(np.average([by_stratum[s] for s in items], weights=list(items.values())))
    strata = {row["stratum"]: row["count"] for row in sample.groupBy("stratum").count().collect()}
    stats = lake.read("catalog_stats").to_pylist()
    return {
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


def _prober(manifest: str, weights: Any, size: int) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The body of ``mapInArrow``: a row of ``_ROW`` for each item and modality that it has."""

    def probe(parts: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        tokenizer = loaded(manifest, weights.value)
        for part in parts:
            for start in range(0, part.num_rows, size):
                rows = part.slice(start, size)
                batch = batch_of(rows, tokenizer.widths)
                decoded = tokenizer.reconstruct(batch)
                for m in tokenizer.widths:
                    there = batch.present[m].numpy()
                    norm = np.round(batch.vectors[m].double().norm(dim=1).numpy()[there], 5)  # so that unit vectors share a bin
                    error = (decoded[m] - batch.vectors[m]).square().sum(1).double().numpy()[there] if m in decoded else None
                    columns = [
                        pa.array([m] * len(norm)),
                        rows.column("stratum").filter(pa.array(there)),
                        pa.array(norm),
                        pa.nulls(len(norm), pa.float64()) if error is None else pa.array(error),
                    ]
                    yield pa.RecordBatch.from_arrays(columns, schema=_ROW)

    return probe
