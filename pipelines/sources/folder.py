"""Read a table of items, CSV or Parquet, beside a folder of pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from urllib.parse import unquote

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from adasid.config import FolderSource
from adasid.datasets import columns
from adasid.datasets.files import convert_batches
from adasid.errors import InputError
from adasid.faults import wrapped
from pipelines.engines import spark as engine
from pipelines.sources import parquet
from pipelines.sources.parquet import Target

PICTURE = "image"
"""Name of the picture of an item."""
_IDS = ("user_id", "item_id")
_NUMBERS = {"rating": "double", "label": "double", "pos": "bigint", "order": "bigint"}


def form(path: str) -> str:
    """Return the format of a file: ``csv``, or ``parquet`` for any other name than that of a text file."""
    return "csv" if path.lower().endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")) else "parquet"


def table(
    spark: SparkSession, source: FolderSource, key: str, path: str, target: Target, note: Callable[[str], None]
) -> DataFrame:
    """Return the rows of a table, converted as those of Parquet are. Raises InputError that names ``key`` and
    column."""
    named = source.suffix is not None and PICTURE in target.schema.names
    if named:
        target = target._replace(some={name: fix for name, fix in target.some.items() if name != PICTURE})
    rows = parquet.scan(spark, key, path, target, note) if form(path) == "parquet" else _csv(spark, key, path, target)
    if not named:
        return rows
    place = F.struct(F.lit(None).cast("binary").alias("bytes"), F.concat("item_id", F.lit(source.suffix)).alias("path"))
    return rows.withColumn(PICTURE, place)


def _csv(spark: SparkSession, key: str, path: str, target: Target) -> DataFrame:
    where = f"{key} {path}"
    separator = "\t" if path.lower().endswith((".tsv", ".tsv.gz")) else ","
    options = {"header": "true", "multiLine": "true", "escape": '"', "sep": separator, "mode": "FAILFAST"}
    spark.conf.set("spark.sql.csv.parser.columnPruning.enabled", "false")  # else a row with too few fields is taken
    reader = spark.read.options(**options)
    try:
        frame = reader.csv(engine.uri(engine.escaped(path, key)))
        if len(frame.inputFiles()) > 1:  # else the columns of all files are taken by position
            frame = reader.option("enforceSchema", "false").csv(engine.uri(engine.escaped(path, key)))
    except PySparkException as error:
        raise wrapped(error, f"{where}: not readable as CSV ({engine.root_cause(error)}); correct the path") from error
    target.check(where, frame.columns)
    names = [name for name in frame.columns if name in columns.read_from(target.schema)]
    numbers = _NUMBERS if "user_id" in target.schema.names else {}
    kinds = {**dict.fromkeys(numbers, _number), **dict.fromkeys(_IDS, _id)}
    chosen = frame.select(*(kinds[name](where, name) if name in kinds else F.col(f"`{name}`") for name in names))
    columns.problems(to_arrow_schema(chosen.schema, timezone="UTC"), target.schema, where)
    return chosen.mapInArrow(partial(convert_batches, target.schema, where), engine.struct(target.schema))


def other_columns(error: Exception) -> InputError | None:
    """Return the InputError for a CSV file whose header is not that of the files beside it; None for another error."""
    match = re.search(r"CSV header does not conform to the schema.*?CSV file: (\S+)", str(error), re.DOTALL)
    if not match:
        return None
    fix = "write all files with the same columns in the same order"
    return InputError(f"source.folder: {unquote(match[1])} does not have the columns of the files beside it: {fix}")


def _id(where: str, name: str) -> Column:
    """Return a column of ids. One with U+FFFD, which stands for bytes that are not UTF-8, ends the job: several ids
    could become one."""
    fault = f"adasid.errors.InputError: {where}: column {name!r} has an id that is not UTF-8 (or has U+FFFD): "
    message = F.concat(F.lit(fault), F.col(name), F.lit("; write the file in UTF-8"))
    return F.when(F.col(name).contains("\ufffd"), F.raise_error(message)).otherwise(F.col(name)).alias(name)


def _number(where: str, name: str) -> Column:
    """Parse the numbers of a column. A text that is none ends the job."""
    text = F.nullif(F.trim(F.col(name)), F.lit(""))
    number = text.try_cast(_NUMBERS[name])
    fault = F.lit(f"adasid.errors.InputError: {where}: column {name!r} has a text that is no number: ")
    return (
        F.when(text.isNotNull() & number.isNull(), F.raise_error(F.concat(fault, text))).otherwise(number).alias(name)
    )
