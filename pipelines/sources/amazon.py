"""Read the public Amazon review files of 2014, 2018 and 2023: JSON lines, or Python literals. Fields that differ in
name between releases are merged."""

from __future__ import annotations

from functools import partial

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from adasid import tables
from adasid.config import AmazonSource
from adasid.datasets import literals
from adasid.errors import InputError
from pipelines.engines import spark as engine

_REVIEW = ("reviewerID", "user_id", "parent_asin", "asin", "unixReviewTime", "timestamp", "overall", "rating")
_ADDRESSES = ("images", "imageURLHighRes", "imageURL", "imUrl", "image")
_PRODUCT = ("parent_asin", "asin", "title", "brand", "store", "categories", "category", "description", *_ADDRESSES)
PICTURE = "image"
"""Name of the picture of a product."""
_LARGE = ("hi_res", "large", "thumb")
"""Sizes of a picture in the release of 2023, best first."""


def read(
    spark: SparkSession,
    source: AmazonSource,
    paths: dict[str, str],
    raw: tuple[tuple[str, ...], tuple[str, ...]],
    input_hash: str,
) -> dict[str, DataFrame]:
    """Return ``items`` with the ``raw`` fields, ``interactions``, and ``rejected_rows`` for lines that are neither JSON
    nor a Python literal. Raises InputError for a file of another kind."""
    reviews, products = (
        _lines(spark, f"source.amazon.{name}", paths[name], fields)
        for name, fields in (("reviews", _REVIEW), ("metadata", _PRODUCT))
    )
    item = F.coalesce("parent_asin", "asin")
    events = reviews.filter("broken is null").select(
        F.coalesce("reviewerID", "user_id").alias("user_id"),
        item.alias("item_id"),
        F.coalesce("unixReviewTime", "timestamp").alias("timestamp"),
        F.lit(None).alias("pos"),
        F.coalesce("overall", "rating").try_cast("float").alias("rating"),
        F.lit(None).alias("label"),
    )
    contents = {
        "title": F.col("title"),
        "brand": F.coalesce("brand", "store"),
        "categories": _joined(F.coalesce("categories", "category"), " > "),
        "description": _joined(F.col("description"), " "),
        PICTURE: _picture(downloaded=source.pictures is not None),
    }
    chosen = dict.fromkeys(("title", *(name for names in raw for name in names)))
    items = products.filter("broken is null").select(
        item.alias("item_id"), *(contents[name].alias(name) for name in chosen)
    )
    checks = {
        "reviews": (events, "reviewerID or user_id, with asin or parent_asin", ["user_id", "item_id"]),
        "metadata": (items, "asin or parent_asin", ["item_id"]),
    }
    for name, (frame, fields, keys) in checks.items():
        if frame.dropna(subset=keys).isEmpty():
            raise InputError(
                f"source.amazon.{name} {paths[name]}: no line has {fields}; give the {name} file as downloaded, JSON "
                "lines"
            )
    refused = [
        frame.filter("broken is not null").select(F.lit(table).alias("table"), "broken")
        for table, frame in (("interactions", reviews), ("items", products))
    ]
    return {
        "items": items,
        "interactions": events,
        "rejected_rows": _rejected(refused[0].union(refused[1]), input_hash),
    }


def _lines(spark: SparkSession, key: str, path: str, names: tuple[str, ...]) -> DataFrame:
    """Return ``names`` as text and ``broken``, the whole line where it is neither JSON nor a Python literal. Blank
    lines are skipped.

    The schema is text throughout, so that a number, a nested list and a value of an unexpected type are all read
    verbatim.
    """
    whole = spark.read.text(engine.escaped(path, key)).select(F.regexp_replace("value", "^\ufeff", "").alias("line"))
    lines = whole.filter(F.trim("line") != "")
    first = lines.select(F.trim("line").alias("line")).first()
    if first and first["line"].startswith("["):
        raise InputError(
            f"{key} {path}: is one JSON array; give one product or review a line (jq -c '.[]' FILE writes them)"
        )
    schema = T.StructType([T.StructField(name, T.StringType()) for name in (*names, "broken")])
    strict = {
        "mode": "PERMISSIVE",
        "columnNameOfCorruptRecord": "broken",
        "allowSingleQuotes": "false",  # a Python literal, which Spark would read almost right
        "allowBackslashEscapingAnyCharacter": "true",
    }
    parsed = lines.select(F.from_json("line", schema, strict).alias("row")).select("row.*")
    text = pa.schema([(name, pa.string()) for name in (*names, "broken")])
    other = parsed.filter("broken is not null").select(F.col("broken").alias("line"))
    return parsed.filter("broken is null").unionByName(
        other.mapInArrow(partial(literals.parse, names), engine.struct(text))
    )


def _parts(text: Column) -> Column:
    """Return the parts of a JSON list, as text; null for any other text."""
    return F.when(F.trim(text).startswith("["), F.from_json(text, "array<string>"))


def _joined(text: Column, between: str) -> Column:
    """Return the parts of a JSON list as one text, ``between`` them; of a list of lists the inner lists, separated by
    commas; other text as it is."""
    parts = _parts(text)
    inner = F.transform(parts, lambda part: F.coalesce(F.array_join(_parts(part), between), part))
    nested = F.exists(parts, lambda part: F.trim(part).startswith("["))
    return F.coalesce(F.when(nested, F.array_join(inner, ", ")).otherwise(F.array_join(parts, between)), text)


def _picture(downloaded: bool) -> Column:
    """Return the first picture of a product, as ``tables.PICTURE``; null where it has none. ``downloaded``: its path is
    the last part of its address."""
    first = [F.get(_parts(F.col(name)), F.lit(0)) for name in _ADDRESSES]
    sizes = [F.get_json_object(place, f"$.{size}") for place in first[:1] for size in _LARGE]
    plain = [F.when(~F.trim(F.col(name)).startswith("["), F.col(name)) for name in _ADDRESSES]
    address = F.coalesce(*sizes, *(F.when(~place.startswith("{"), place) for place in first), *plain)
    name = F.regexp_extract(address, r"([^/?#]+)(?:[?#].*)?$", 1) if downloaded else address
    path = F.nullif(F.trim(name), F.lit(""))
    return F.when(path.isNotNull(), F.struct(F.lit(None).cast("binary").alias("bytes"), path.alias("path")))


def _rejected(lines: DataFrame, input_hash: str) -> DataFrame:
    row = F.to_json(F.struct(F.col("broken").alias("line")))
    rows = lines.groupBy("table", row.alias("row")).agg(F.count("*").alias("copies"))
    columns = {"input_hash": F.lit(input_hash), "row_hash": F.sha2("row", 256), "reason": F.lit("unparsable_json")}
    return rows.withColumns(columns).select(*tables.REJECTED_ROWS.names)
