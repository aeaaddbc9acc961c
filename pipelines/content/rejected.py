"""Write the contents that could not be encoded to ``rejected_rows``, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import reduce

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.encoders.base import ABSENT
from pipelines.content import vectors
from pipelines.content.vectors import EMBEDDINGS
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.stage import Inputs

PREFIX = "content_"
"""Reasons of rejected contents begin with it in ``rejected_rows``."""
_SHOWN = 200
"""Of a content that could not be encoded so many characters are in its rejected row."""


def write(
    spark: SparkSession, inputs: Inputs, context: StageContext, items: DataFrame, digests: Mapping[str, str]
) -> int:
    """Write a row of ``rejected_rows`` for each item whose content could not be encoded; return the version."""
    lake, frames = Lake(inputs.lake.root, {}), list[DataFrame]()
    for modality, encoder in inputs.cfg.content.encoders.items():
        made = vectors.made_by(engine.read(spark, lake, EMBEDDINGS), modality, digests[modality])
        faults = made.filter(f"reason IS NOT NULL AND reason != '{ABSENT}'").select("fingerprint", "reason")
        if faults.isEmpty():
            continue
        content = _masked(F.col(f"`{encoder.field}`.path")) if encoder.field else vectors.text(encoder)
        shown = F.substring(content, 1, _SHOWN).alias("content")
        rows = items.select("item_id", vectors.fingerprint(encoder).alias("fingerprint"), shown)
        row = F.to_json(F.struct("item_id", F.lit(modality).alias("modality"), "content"))
        bad = rows.join(faults, "fingerprint")
        named = bad.select(F.concat(F.lit(PREFIX), "reason").alias("reason"), row.alias("row"))
        frames.append(named.groupBy("reason", "row").agg(F.count("*").alias("copies")))
    schema = tables.REJECTED_ROWS
    if not frames:
        if not lake.exists("rejected_rows"):
            return lake.write_rows("rejected_rows", schema, [], inputs.hash)
        return lake.version("rejected_rows")
    added = {"input_hash": F.lit(inputs.hash), "table": F.lit("items"), "row_hash": F.sha2("row", 256)}
    refused = reduce(DataFrame.unionByName, frames).withColumns(added).persist()
    totals = refused.groupBy("reason").agg(F.sum("copies").alias("items")).collect()
    counts = Counter({found["reason"].removeprefix(PREFIX): found["items"] for found in totals})
    listed = ", ".join(f"{reason} {number:,}" for reason, number in counts.most_common())
    context.note(f"items without a modality because of their content: {listed}")
    context.facts["refused contents"] = counts.total()
    where = f"input_hash = '{inputs.hash}'"
    version = engine.write(refused, inputs.lake, "rejected_rows", schema, inputs.hash, replace=where)
    refused.unpersist()
    return version


def _masked(address: Column) -> Column:
    """Return an address without user, password and query, which may be secrets."""
    return F.regexp_replace(F.regexp_replace(address, r"(?<=://)[^/@]*@", ""), r"(?<=://)([^?#]*)[?#].*", "$1")
