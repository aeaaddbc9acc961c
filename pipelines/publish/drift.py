"""Measure how far the current items are from the tokenizer's training data: norms, quantization error, use of codes,
the proxy of richness.

Norms and errors are those that encoding wrote to ``gauges``, so no vector is read again.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from adasid.metrics.stability import jensen_shannon, stability_index
from pipelines.engines.lake import Lake
from pipelines.features.items import richness

Values = NDArray[np.float64]
Counts = dict[str, dict[str, Any]]
"""Maps modality -> stratum -> ``bins``: items whose norm is in each bin; ``error``: sum of squared errors; ``decoded``:
vectors that have an error."""
_BINS = 10


def sampling_stride(items: int, sample: int) -> int:
    """Return the sampling stride with which about ``sample`` of ``items`` are sampled for drift."""
    return max(1, items // sample)


def sampled(features: DataFrame, stride: int) -> DataFrame:
    """Return the items that are sampled for drift: the same ones in every nightly run, by a hash of the id."""
    return features if stride == 1 else features.filter(in_sample(stride))


def in_sample(stride: int) -> Column:
    """Return whether an item is sampled for drift."""
    return F.pmod(F.crc32(F.col("item_id").cast("binary")), F.lit(stride)) == 0


def in_sample_rows(item_ids: pa.Array, stride: int) -> pa.Array:
    """Return the boolean mask of the ids that :func:`in_sample` selects."""
    if stride == 1:
        return pa.repeat(True, len(item_ids))
    return pa.array(
        np.fromiter(map(zlib.crc32, item_ids.cast(pa.binary()).to_pylist()), np.int64, len(item_ids)) % stride == 0
    )


def measure(lake: Lake, sids: DataFrame, stride: int, edges: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """Measure the items of ``sids`` [stratum, gauges], in the format of :func:`described`; bins end at the deciles of
    norms, or at the given ``edges``. ``stride``: of :func:`sampling_stride`."""
    rows = sids.select("stratum", F.inline("gauges"))
    if edges is None:
        deciles = F.percentile_approx("norm", [i / _BINS for i in range(1, _BINS)], 1000).alias("edges")
        edges = {row["modality"]: list(row["edges"]) for row in rows.groupBy("modality").agg(deciles).collect()}
    if not edges:  # a tokenizer that reads no vectors
        return described(lake, {}, stride, edges)
    above = F.create_map(*(part for m, values in edges.items() for part in (F.lit(m), F.array(*map(F.lit, values)))))
    bin = F.size(F.filter(above[F.col("modality")], lambda edge: F.col("norm") > edge)).alias("bin")
    totals = F.count("*").alias("items"), F.sum("error").alias("error"), F.count("error").alias("decoded")
    counts = dict[str, Counts]()
    for row in rows.groupBy("modality", "stratum", bin).agg(*totals).collect():
        if row["modality"] in edges and row["stratum"]:
            count = counts.setdefault(row["modality"], {}).setdefault(
                row["stratum"], {"bins": [0] * _BINS, "error": 0.0, "decoded": 0}
            )
            count["bins"][row["bin"]] = row["items"]
            count["error"] += row["error"] or 0.0
            count["decoded"] += row["decoded"]
    return described(lake, counts, stride, edges)


def counted(
    modality: NDArray[np.object_],
    stratum: NDArray[np.object_],
    norm: Values,
    error: Values,
    edges: dict[str, list[float]],
) -> dict[str, Counts]:
    """Return the counts of :func:`measure` from columns: of each sampled vector its modality, the stratum of its item,
    its norm, and its error (NaN for none)."""
    counts = dict[str, Counts]()
    for m, ends in edges.items():
        for s in sorted(set(stratum[modality == m])):
            mask = (modality == m) & (stratum == s)
            bins = np.bincount(np.searchsorted(ends, norm[mask], side="left"), minlength=_BINS).tolist()
            counts.setdefault(m, {})[s] = {
                "bins": bins,
                "error": float(np.nansum(error[mask])),
                "decoded": int(np.isfinite(error[mask]).sum()),
            }
    return counts


def changed(known: dict[str, Counts], before: dict[str, Counts], after: dict[str, Counts]) -> dict[str, Counts]:
    """Return ``known`` with the items of ``before`` replaced by those of ``after``."""
    none, counts = {"bins": [0] * _BINS, "error": 0.0, "decoded": 0}, dict[str, Counts]()
    for m in sorted({*known, *after}):
        for s in sorted({*known.get(m, {}), *after.get(m, {})}):
            parts = [side.get(m, {}).get(s, none) for side in (known, before, after)]
            bins = [a - b + c for a, b, c in zip(*(part["bins"] for part in parts))]
            if any(bins):
                sums = {name: parts[0][name] - parts[1][name] + parts[2][name] for name in ("error", "decoded")}
                counts.setdefault(m, {})[s] = {"bins": bins, **sums}
    return counts


def described(lake: Lake, counts: dict[str, Counts], stride: int, edges: dict[str, list[float]]) -> dict[str, Any]:
    """Describe a set of items: for every input of the tokenizer the share whose norm is in each bin, and the mean
    squared quantization error, by stratum too (none for a method without a decoder); Spearman(norm, count); the
    ``counts`` themselves."""
    shares, error = dict[str, list[float]](), dict[str, dict[str, float]]()
    for m in edges:
        parts = counts.get(m, {})
        bins = np.array([part["bins"] for part in parts.values()] or [[0] * _BINS]).sum(0)
        shares[m] = (bins / max(1, bins.sum())).tolist()
        sums = {s: (part["error"], part["decoded"]) for s, part in parts.items()}
        sums["all"] = sum(total for total, _ in sums.values()), sum(number for _, number in sums.values())
        if sums["all"][1]:
            error[m] = {name: total / number for name, (total, number) in sums.items() if number}
    statistics = richness(lake)
    return {
        "every": stride,
        "edges": edges,
        "counts": counts,
        "shares": shares,
        "error": error,
        "spearman": statistics["spearman"] if statistics else None,
    }


def against(baseline: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Compare the current items (``current``, measured with the baseline's ``edges``) with those of ``baseline``: for
    each modality the stability index of its norms, in the bins of the baseline's deciles, and the ratio of quantization
    errors, overall and by stratum."""
    norms = _defined(
        {m: stability_index(shares, current["shares"].get(m, ())) for m, shares in baseline["shares"].items()}
    )
    ratios = {
        m: {
            s: value / baseline["error"][m][s] for s, value in by_stratum.items() if baseline["error"].get(m, {}).get(s)
        }
        for m, by_stratum in current["error"].items()
    }
    return {"norms": norms, "error_ratio": ratios, "spearman": current["spearman"]}


def usage(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Return the Jensen-Shannon divergence in bits of the use of each slot's codes, from the code metrics of two
    generations; empty where slots differ."""
    if before["slots"] != after["slots"]:
        return {}
    slots = zip(after["slots"], before["codes"], after["codes"])
    return _defined({name: jensen_shannon(p, q) for name, p, q in slots if len(p) == len(q)})


def _defined(values: dict[str, float]) -> dict[str, float]:
    """Drop undefined values, which would count as no drift."""
    return {name: value for name, value in values.items() if np.isfinite(value)}
