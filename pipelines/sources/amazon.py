"""Read the public Amazon review files of 2014, 2018 and 2023: JSON lines, or Python literals. Fields that differ in
name between releases are merged."""

from __future__ import annotations

from functools import partial

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.ml.feature import RegexTokenizer, Word2Vec
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from adasid import tables
from adasid.config import AmazonSource
from adasid.datasets import literals
from adasid.errors import InputError
from pipelines.engines import spark as engine

_REVIEW = ("reviewerID", "user_id", "parent_asin", "asin", "unixReviewTime", "timestamp", "overall", "rating")
_PRODUCT = ("parent_asin", "asin", "title", "brand", "store", "categories", "category")
_ROUNDS = 5
"""Word2Vec makes this many passes over the products."""
_PRODUCTS = 200_000
"""A task of Word2Vec learns from at most this many products."""
_TAGS = r"(?s)<(script|style)\b.*?</\1>|<[^>]*>|&#?\w+;"
"""This matches HTML in titles, which would become words."""


def read(
    spark: SparkSession, source: AmazonSource, paths: dict[str, str], seed: int, input_hash: str
) -> dict[str, DataFrame]:
    """Return ``items``, ``interactions``, and ``rejected_rows`` for lines that are neither JSON nor a Python literal.
    Raises InputError for a file of another kind."""
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
    words = F.regexp_replace(
        F.concat_ws(" ", "title", F.coalesce("brand", "store"), F.coalesce("categories", "category")), _TAGS, " "
    )
    items = products.filter("broken is null").select(item.alias("item_id"), "title", words.alias("words"))
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
        "items": _embed(items, source, seed),
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


def _embed(items: DataFrame, source: AmazonSource, seed: int) -> DataFrame:
    """Add ``text`` (text_width,): the mean Word2Vec vector of an item's words, null where none is in the vocabulary.

    Up to 200,000 products one partition and one seed make the vectors repeat where Spark delivers the rows in the same
    order, as it does on one machine with one input split; a cluster may order them otherwise and learn other, equally
    good vectors. With more products several partitions learn, and Spark averages their vectors after each pass.
    """
    tokens = RegexTokenizer(inputCol="words", outputCol="tokens", pattern=r"[^\p{L}\p{N}]+").transform(items)
    embed = Word2Vec(
        inputCol="tokens",
        outputCol="vector",
        vectorSize=source.text_width,
        minCount=source.min_word_count,
        seed=seed,
        numPartitions=max(1, -(-items.count() // _PRODUCTS)),
        maxIter=_ROUNDS,
    )
    try:
        model = embed.fit(tokens)
    except PySparkException as error:
        if "vocabulary size" not in str(error):
            raise
        raise InputError(
            f"source.amazon.metadata {source.metadata}: no word occurs {source.min_word_count} times; lower "
            "source.amazon.min_word_count"
        ) from error
    known = model.transform(tokens).withColumn("text", vector_to_array(F.col("vector"), "float32"))
    return known.select("item_id", "title", F.when(F.exists("text", lambda x: x != 0), F.col("text")).alias("text"))


def _rejected(lines: DataFrame, input_hash: str) -> DataFrame:
    row = F.to_json(F.struct(F.col("broken").alias("line")))
    rows = lines.groupBy("table", row.alias("row")).agg(F.count("*").alias("copies"))
    columns = {"input_hash": F.lit(input_hash), "row_hash": F.sha2("row", 256), "reason": F.lit("unparsable_json")}
    return rows.withColumns(columns).select(*tables.REJECTED_ROWS.names)
