"""Stage ``ingest``: bring the source into the Delta tables ``items`` and ``interactions`` (and ``truth`` where it is known), unchecked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.ml.feature import RegexTokenizer, Word2Vec
from pyspark.ml.functions import vector_to_array
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from adasid import tables
from adasid.config import AmazonSource, ArraysSource, Config, TablesSource, digest
from adasid.datasets import arrays, synthetic
from adasid.datasets.arrow import over_ranges
from adasid.errors import InputError
from pipelines.engines import spark as engine
from pipelines.engines.tracking import Track

_READ_THROUGH = 2**28
"""Bytes up to which a local file is known by its content."""

_CHUNK, _TASKS = 10_000, 256
"""Items made by one task, at least; tasks that make items, at most."""

_REVIEW = ("reviewerID", "user_id", "parent_asin", "asin", "unixReviewTime", "timestamp", "overall", "rating")
_PRODUCT = ("parent_asin", "asin", "title", "brand", "store", "categories", "category")
_ROUNDS = 5
"""Word2Vec passes over the products."""


def run(cfg: Config, track: Track) -> None:
    """Write ``items``, ``interactions`` and, for the synthetic source, ``truth``; unparsable lines of Amazon files go to ``rejected_rows``.

    Nothing is written where the tables already come from the same settings and the same source files (see ``_fingerprint``). Raises
    InputError for a missing or unreadable file, column or modality.
    """
    spark = engine.session(cfg.spark)
    modalities = _modalities(cfg)
    seed = cfg.seed if cfg.source.kind in {"synthetic", "amazon"} else None
    prints = {key: _fingerprint(spark, key, path, form) for key, (path, form) in _inputs(cfg).items()}
    stamp = digest("ingest", cfg.source, seed, modalities, prints)
    names = ("items", "interactions", *(("truth",) if cfg.source.kind == "synthetic" else ()))
    if track.lake.fresh(stamp, *names):
        track.status = "up to date"
        return
    versions = {}
    with _reading(cfg):
        frames = _frames(spark, cfg, modalities, prints, stamp)
        for name, frame in frames.items():
            schema = {
                "items": tables.items(modalities),
                "interactions": tables.INTERACTIONS,
                "truth": tables.TRUTH,
                "rejected_rows": tables.REJECTED_ROWS,
            }[name]
            versions[name] = engine.write(frame, track.lake, name, schema, stamp, (f"{name}:{stamp}", 1) if name == "rejected_rows" else None)
            track.note(f"{name} written at version {versions[name]}")
    track.outputs(versions)
    facts = {name: track.lake.open(name, versions[name]).to_pyarrow_dataset().count_rows() for name in ("items", "interactions")}
    if "rejected_rows" in versions:
        refused = engine.read(spark, track.lake, "rejected_rows", versions["rejected_rows"]).filter(F.col("run") == stamp)
        facts["unparsable_lines"] = refused.agg(F.coalesce(F.sum("copies"), F.lit(0))).first()[0]  # type: ignore[index]
    track.facts.update(facts)
    track.metrics(facts)


def _modalities(cfg: Config) -> tuple[str, ...]:
    """The vector columns of ``items``. Raises InputError where the source cannot bring one."""
    wanted = (*cfg.features.content, *((tables.BEHAVIOR,) if cfg.behavior.source == "column" else ()))
    source = cfg.source
    offered = {
        "synthetic": synthetic.MODALITIES,
        "amazon": ("text",),
        "arrays": tuple(source.arrays.embeddings) if source.arrays else (),
        "tables": wanted,
    }[source.kind]
    for modality in wanted:
        if modality not in offered:
            fix = "add it to source.arrays.embeddings" if source.kind == "arrays" else "bring your own with source.kind: arrays or tables"
            use = (
                "set behavior.source: sasrec"
                if modality == tables.BEHAVIOR
                else f"remove it from features.content ({', '.join(cfg.features.content)})"
            )
            raise InputError(f"source.kind {source.kind!r} has no modality {modality!r} (it has: {', '.join(offered)}): {use}, or {fix}")
    return wanted


def _inputs(cfg: Config) -> dict[str, tuple[str, str]]:
    """Config key -> (absolute path or URL, format) of all that the source reads."""
    source = cfg.source
    found: dict[str, tuple[str, str]] = {}
    if source.tables:
        found = {f"source.tables.{name}": (getattr(source.tables, name), source.tables.format) for name in ("items", "interactions")}
    elif source.arrays:
        files = {"items": source.arrays.items, "interactions": source.arrays.interactions}
        files.update({f"embeddings.{modality}": source.arrays.embeddings[modality] for modality in _modalities(cfg)})
        found = {f"source.arrays.{name}": (str(Path(source.arrays.folder) / file), "file") for name, file in files.items()}
    elif source.amazon:
        found = {f"source.amazon.{name}": (getattr(source.amazon, name), "file") for name in ("reviews", "metadata")}
    return {key: (path if "://" in path else str(Path(path).absolute()), form) for key, (path, form) in found.items()}


def _fingerprint(spark: SparkSession, key: str, path: str, form: str) -> list[Any]:
    """What changes with the content of a source: id and version of a Delta table, else each file's name, size and content (of a local file
    of up to 256 MiB) or time of change. A copy with the same content is the same source."""
    if form == "delta":
        try:
            table = DeltaTable(path)
        except Exception as error:
            raise InputError(
                f"{key} {path}: not a Delta table ({engine.root_cause(error)}); correct the path, or set source.tables.format: parquet"
            ) from None
        return [str(table.metadata().id), table.version()]
    try:
        target = spark._jvm.org.apache.hadoop.fs.Path(path)  # type: ignore[union-attr]
        files, found = target.getFileSystem(spark._jsc.hadoopConfiguration()).listFiles(target, True), []
        root = target.getFileSystem(spark._jsc.hadoopConfiguration()).makeQualified(target).getParent().toUri().toString()
        while files.hasNext():
            file = files.next()
            uri, size = file.getPath().toUri(), file.getLen()
            local = uri.getScheme() == "file" and size <= _READ_THROUGH
            mark = hashlib.sha256(Path(uri.getPath()).read_bytes()).hexdigest() if local else file.getModificationTime()
            found.append([uri.toString().removeprefix(root), size, mark])
    except (Py4JJavaError, PySparkException) as error:
        problem = "does not exist" if "FileNotFound" in engine.root_cause(error) else f"cannot be listed ({engine.root_cause(error)})"
        raise InputError(f"{key} {path}: {problem}; give an existing path (relative paths start at the working directory)") from None
    return sorted(found)


def _frames(spark: SparkSession, cfg: Config, modalities: tuple[str, ...], prints: dict[str, list[Any]], stamp: str) -> dict[str, DataFrame]:
    paths = {key.rsplit(".", 1)[-1]: path for key, (path, _) in _inputs(cfg).items()}
    if cfg.source.synthetic:
        params, make = cfg.source.synthetic, (cfg.source.synthetic, cfg.seed)
        return {
            "items": _generate(spark, params.items, _chunk(params.items), partial(synthetic.items, *make, modalities), tables.items(modalities)),
            "truth": _generate(spark, params.items, _chunk(params.items), partial(synthetic.truth, *make), tables.TRUTH),
            "interactions": _generate(spark, params.users, params.chunk_users, partial(synthetic.interactions, *make), tables.INTERACTIONS),
        }
    if cfg.source.tables:
        return _from_tables(spark, cfg.source.tables, paths, modalities, prints)
    if cfg.source.arrays:
        return _from_arrays(spark, cfg.source.arrays, paths, modalities)
    assert cfg.source.amazon
    return _from_amazon(spark, cfg.source.amazon, paths, cfg.seed, stamp)


def _chunk(rows: int) -> int:
    return max(_CHUNK, -(-rows // _TASKS))


def _generate(spark: SparkSession, rows: int, chunk: int, make: Callable[[int, int], Iterator[pa.RecordBatch]], schema: pa.Schema) -> DataFrame:
    """The rows that ``make(start, stop)`` yields for 0 to ``rows``, one Spark task a chunk."""
    chunks, start = -(-rows // chunk), F.col("id") * chunk
    ranges = spark.range(0, chunks, 1, max(chunks, 1)).select(start.alias("start"), F.least(start + chunk, F.lit(rows)).alias("stop"))
    return ranges.mapInArrow(partial(over_ranges, make), engine.struct(schema))


def _from_tables(
    spark: SparkSession, source: TablesSource, paths: dict[str, str], modalities: tuple[str, ...], prints: dict[str, list[Any]]
) -> dict[str, DataFrame]:
    items, interactions = (_load(spark, key, paths[key.rsplit(".", 1)[-1]], source.format, found) for key, found in prints.items())
    where = f"source.tables.items {paths['items']}"
    _require(
        items,
        where,
        {"item_id": "add the item's id", **{m: "add it as an array of floats (null where an item has none)" for m in modalities}},
    )
    for modality in modalities:
        kind = items.schema[modality].dataType
        if not (isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.NumericType)):
            raise InputError(f"{where}: column {modality!r} is {kind.simpleString()}; must be an array of floats")
    title = F.col("title") if "title" in items.columns else F.lit(None)
    return {
        "items": items.select("item_id", title.alias("title"), *modalities),
        "interactions": _events(interactions, f"source.tables.interactions {paths['interactions']}"),
    }


def _from_arrays(spark: SparkSession, source: ArraysSource, paths: dict[str, str], modalities: tuple[str, ...]) -> dict[str, DataFrame]:
    embeddings = {modality: str((Path(source.folder) / source.embeddings[modality]).absolute()) for modality in modalities}
    rows = arrays.check(paths["items"], embeddings)
    events = _events(
        _load(spark, "source.arrays.interactions", paths["interactions"], "parquet", []),
        f"source.arrays.interactions {paths['interactions']}",
    )
    return {
        "items": _generate(spark, rows, _chunk(rows), partial(arrays.rows, paths["items"], embeddings), tables.items(modalities)),
        "interactions": events,
    }


def _load(spark: SparkSession, key: str, path: str, form: str, found: list[Any]) -> DataFrame:
    """A Parquet path, or a Delta table at the version that was fingerprinted."""
    reader = spark.read.format(form)
    try:
        return (reader.option("versionAsOf", found[-1]) if form == "delta" else reader).load(path)
    except (Py4JJavaError, PySparkException) as error:
        fix = "store its times in microseconds, which Spark reads" if "NANOS" in engine.root_cause(error) else "correct the path or the format"
        raise InputError(f"{key} {path}: not readable as {form} ({engine.root_cause(error)}); {fix}") from None


def _require(frame: DataFrame, where: str, columns: dict[str, str]) -> None:
    for column, fix in columns.items():
        if column not in frame.columns:
            raise InputError(f"{where}: column {column!r} is missing (found: {', '.join(frame.columns)}); {fix}")


def _events(frame: DataFrame, where: str) -> DataFrame:
    """The columns of ``tables.INTERACTIONS`` from user_id, item_id, timestamp and/or pos (or order), rating (or label)."""
    _require(frame, where, {"user_id": "add the user's id", "item_id": "add the item's id"})
    if not {"timestamp", "pos", "order"} & set(frame.columns):
        raise InputError(
            f"{where}: columns 'timestamp' and 'pos' are missing (found: {', '.join(frame.columns)}); add one of them to order the events"
        )
    timestamp = _time_text(frame, where) if "timestamp" in frame.columns else F.lit(None)
    pos, rating = _number(frame, where, ("pos", "order"), "bigint"), _number(frame, where, ("rating", "label"), "float")
    return frame.select("user_id", "item_id", timestamp.alias("timestamp"), pos.alias("pos"), rating.alias("rating"))


def _time_text(frame: DataFrame, where: str) -> Column:
    column, kind = F.col("timestamp"), frame.schema["timestamp"].dataType
    if isinstance(kind, T.StringType):
        return column
    if isinstance(kind, T.TimestampType | T.TimestampNTZType | T.DateType):
        return F.date_format(column.cast("timestamp"), "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX")
    if isinstance(kind, T.IntegralType):
        return column.cast("string")
    if isinstance(kind, T.NumericType):
        return F.regexp_replace(column.try_cast("decimal(38,6)").cast("string"), r"\.?0+$", "")
    raise InputError(f"{where}: column 'timestamp' is {kind.simpleString()}; must be a number (unix seconds or milliseconds), text or a timestamp")


def _number(frame: DataFrame, where: str, names: tuple[str, ...], kind: str) -> Column:
    name = next((name for name in names if name in frame.columns), None)
    if name is None:
        return F.lit(None)
    found = frame.schema[name].dataType
    if not isinstance(found, T.NumericType | T.BooleanType | T.NullType):
        raise InputError(f"{where}: column {name!r} is {found.simpleString()}; must be a number")
    return F.col(name).try_cast(kind)


def _from_amazon(spark: SparkSession, source: AmazonSource, paths: dict[str, str], seed: int, stamp: str) -> dict[str, DataFrame]:
    """Reviews and products of the 2014, 2018 and 2023 releases; fields that differ in name between them are merged."""
    reviews, products = _json_lines(spark, paths["reviews"], _REVIEW), _json_lines(spark, paths["metadata"], _PRODUCT)
    item = F.coalesce("parent_asin", "asin")
    events = reviews.filter("broken is null").select(
        F.coalesce("reviewerID", "user_id").alias("user_id"),
        item.alias("item_id"),
        F.coalesce("unixReviewTime", "timestamp").alias("timestamp"),
        F.lit(None).alias("pos"),
        F.coalesce("overall", "rating").try_cast("float").alias("rating"),
    )
    words = F.concat_ws(" ", "title", F.coalesce("brand", "store"), F.coalesce("categories", "category"))
    items = products.filter("broken is null").select(item.alias("item_id"), "title", words.alias("words"))
    checks = {
        "reviews": (events, "reviewerID or user_id, with asin or parent_asin", ["user_id", "item_id"]),
        "metadata": (items, "asin or parent_asin", ["item_id"]),
    }
    for name, (frame, fields, keys) in checks.items():
        if frame.dropna(subset=keys).isEmpty():
            raise InputError(f"source.amazon.{name} {paths[name]}: no line has {fields}; give the {name} file as downloaded, JSON lines")
    refused = [
        frame.filter("broken is not null").select(F.lit(table).alias("table"), "broken")
        for table, frame in (("interactions", reviews), ("items", products))
    ]
    return {"items": _embed(items, source, seed), "interactions": events, "rejected_rows": _rejected(refused[0].union(refused[1]), stamp)}


def _json_lines(spark: SparkSession, path: str, fields: tuple[str, ...]) -> DataFrame:
    """``fields`` as text and ``broken``, the whole line where it is neither JSON nor a Python literal. Blank lines are skipped.

    The schema is text throughout, so that a number, a nested list and a value of an unexpected type are all kept as written.
    """
    schema = T.StructType([T.StructField(name, T.StringType()) for name in (*fields, "broken")])
    options = {
        "mode": "PERMISSIVE",
        "columnNameOfCorruptRecord": "broken",
        "allowSingleQuotes": "true",
        "allowBackslashEscapingAnyCharacter": "true",
    }
    return spark.read.text(path).filter("trim(value) <> ''").select(F.from_json("value", schema, options).alias("line")).select("line.*")


def _embed(items: DataFrame, source: AmazonSource, seed: int) -> DataFrame:
    """Add ``text`` (text_width,): the mean Word2Vec vector of an item's words, null where none is in the vocabulary.

    One partition and one seed make the vectors repeat where Spark delivers the rows in the same order, as it does on one
    machine with one input split; a cluster may order them otherwise and learn other, equally good vectors.
    """
    split = RegexTokenizer(inputCol="words", outputCol="tokens", pattern=r"[^\p{L}\p{N}]+")
    embed = Word2Vec(
        inputCol="tokens",
        outputCol="vector",
        vectorSize=source.text_width,
        minCount=source.min_word_count,
        seed=seed,
        numPartitions=1,
        maxIter=_ROUNDS,
    )
    tokens = split.transform(items)
    try:
        model = embed.fit(tokens)
    except PySparkException as error:
        if "vocabulary size" not in str(error):
            raise
        raise InputError(
            f"source.amazon.metadata {source.metadata}: no word occurs {source.min_word_count} times; lower source.amazon.min_word_count"
        ) from None
    known = model.transform(tokens).withColumn("text", vector_to_array(F.col("vector"), "float32"))
    return known.select("item_id", "title", F.when(F.exists("text", lambda x: x != 0), F.col("text")).alias("text"))


def _rejected(lines: DataFrame, stamp: str) -> DataFrame:
    row = F.to_json(F.struct(F.col("broken").alias("line")))
    rows = lines.groupBy("table", row.alias("row")).agg(F.count("*").alias("copies"))
    return rows.select(
        F.lit(stamp).alias("run"), "table", F.sha2("row", 256).alias("row_hash"), F.lit("unparsable_json").alias("reason"), "row", "copies"
    )


@contextmanager
def _reading(cfg: Config) -> Iterator[None]:
    """Engine errors while the source is copied become one line that names the source."""
    try:
        yield
    except (Py4JJavaError, PySparkException) as error:
        raise InputError(
            f"source.{cfg.source.kind} could not be copied into the lake ({engine.root_cause(error)}); check the files it names"
        ) from error
