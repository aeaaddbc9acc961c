"""Encode items on Spark, after a check of their columns; find the items whose vectors are faulty."""

from __future__ import annotations

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from adasid import tables
from adasid.errors import InputError
from adasid.files import Location
from adasid.tables import BEHAVIOR
from adasid.tokenizers.artifact import Manifest
from adasid.tokenizers.encode import ENCODED, READ, encoder
from pipelines.engines import spark as engine
from pipelines.publish import drift

_FAULTS = 100
"""At most this many kinds of faults are collected; there is one for each modality, and one for each wrong width."""


def check_features(features: StructType, manifest: Manifest) -> None:
    """Raise InputError unless every column exists in its type, before any task starts. Further columns are ignored."""
    expected = {
        field.name: field.dataType
        for field in engine.struct(tables.item_features([m for m in manifest.widths if m != BEHAVIOR]))
    }
    for column in (*READ, *manifest.widths):
        if column not in features.fieldNames():
            who = f"the tokenizer {manifest.digest}" if column in manifest.widths else "the table of semantic IDs"
            raise InputError(
                f"{who} needs {column!r} but item_features has no such column: run jobs/build_features.py, or train on "
                "these features"
            )
        if features[column].dataType.simpleString() != expected[column].simpleString():
            kind = features[column].dataType.simpleString()
            raise InputError(
                f"item_features.{column} is {kind}, it must be {expected[column].simpleString()}: cast it, or run "
                "jobs/build_features.py"
            )


def encode(
    spark: SparkSession,
    features: DataFrame,
    folder: Location,
    manifest: Manifest,
    batch: int,
    stride: int | None = None,
    previous: tuple[DataFrame, float] | None = None,
) -> DataFrame:
    """Return one row of :data:`ENCODED` for each row of ``features``; the weights are a broadcast of plain bytes.
    ``stride``: of the items sampled for drift (``drift.sampling_stride``), None: no item is sampled; ``previous``:
    published SIDs [item_id, codes] and the tolerance within which items retain them."""
    weights = spark.sparkContext.broadcast((folder / "weights.safetensors").read_bytes())
    sampled = (F.lit(False) if stride is None else drift.in_sample(stride)).alias("sampled")
    text = manifest.json_text()
    rows, tolerance = features.select(*READ, *manifest.widths, sampled), 0.0
    if previous:
        published, tolerance = previous
        rows = rows.join(published.select("item_id", F.col("codes").alias("published")), "item_id", "left")
    return rows.mapInArrow(encoder(text, weights, batch, tolerance), engine.struct(ENCODED))


def faults(encoded: DataFrame, manifest: Manifest) -> int:
    """Count the items with a NaN or an infinity in a vector. Raises InputError where a vector's width is not the one
    that the tokenizer was trained on."""
    kinds = (
        encoded.filter("fault IS NOT NULL")
        .groupBy("fault")
        .agg(F.count("*").alias("items"), F.min("item_id").alias("first"))
        .orderBy("fault")
    )
    rows = kinds.limit(_FAULTS).collect()
    for row in rows:
        if "width" in row["fault"]:
            raise InputError(
                f"item_features.{row['fault']} as the tokenizer {manifest.digest} was trained on (items: "
                f"{row['items']}, first {row['first']!r}): "
                "train it on these features, or mend the embedding"
            )
    return sum(row["items"] for row in rows)
