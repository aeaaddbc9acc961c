"""Build one row of item_features for every item, once behaviour embeddings exist: the second part of the features
stage."""

from __future__ import annotations

from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config
from adasid.errors import InputError
from adasid.tables import BEHAVIOR
from pipelines import stage, staleness
from pipelines.content import vectors as content_vectors
from pipelines.engines.lake import Lake
from pipelines.engines.spark import read, row_groups, session, write
from pipelines.engines.tracking import StageContext
from pipelines.features import layout, quality, validate
from pipelines.features.check import modalities
from pipelines.features.richness import measure
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage

EMBEDDINGS = "behavior_embeddings"
_ROW_GROUP = 16 * 2**20
"""Bytes of a row group of ``item_features``: some thousand items, so that a worker that reads a range of ``item_index``
reads little more."""


def missing(cfg: Config, lake: Lake) -> str | None:
    """Return why the stage cannot run yet, with the fix; None where it can."""
    if cfg.behavior.source == "sasrec" and not lake.exists(EMBEDDINGS):
        fix = "run `python jobs/train.py --stage behavior`"
        return f"item_features waits, table {EMBEDDINGS} does not exist yet: {fix}"
    return None


def richness(lake: Lake) -> dict[str, Any] | None:
    """Return the row of ``richness_stats``; None where there is none, or it is of other ``item_stats`` than the
    newest."""
    if not lake.exists("richness_stats"):
        return None
    known = lake.lineage("richness_stats").get("item_stats")
    if known is None or lake.newer("item_stats", known):
        return None
    return dict(lake.read("richness_stats").to_pylist()[0])


def check(cfg: Config, lake: Lake) -> None:
    """Raise InputError unless ``item_features`` was computed from the newest ``item_stats``, so that an item has one
    index in all tables."""
    if not stage.check_fresh(ITEM_FEATURES, cfg, lake):
        raise InputError(
            "item_features was computed from other items or settings than item_stats and this run's config: run "
            "jobs/build_features.py again"
        )


def check_split(cfg: Config, lake: Lake) -> None:
    """Raise InputError where behaviour embeddings were trained on other sequences than the current ones, whose test
    events they could know. Under ``behavior.refresh: keep`` that is on purpose."""
    if cfg.behavior.source == "column" or cfg.behavior.refresh == "keep":
        return
    if (line := staleness.unrecorded(lake)) and EMBEDDINGS not in lake.pins:
        raise InputError(f"{line}; or use them as they are with --set behavior.refresh=keep")
    if lags := staleness.behind(lake, EMBEDDINGS):
        text = f"{EMBEDDINGS} could know events of today's test: {staleness.sentences(lags)[0]}"
        raise InputError(f"{text}; or use them as they are with --set behavior.refresh=keep")


def _reads(cfg: Config) -> tuple[str, ...]:
    learned = [EMBEDDINGS] if cfg.behavior.source == "sasrec" else []
    return ("items", *content_vectors.needed(cfg), "item_stats", *learned)


def _settings(cfg: Config, lake: Lake) -> dict[str, object]:
    return {
        "features.norm_percentiles": cfg.features.norm_percentiles,
        "features.proxy_min_spearman": cfg.features.proxy_min_spearman,
        "modalities": modalities(cfg),
    }


def _build(inputs: Inputs, context: StageContext) -> dict[str, int]:
    spark = session(inputs.cfg.spark, size=in_place.size(inputs.lake, *inputs.versions))
    try:
        with in_place.reading(inputs.lake, "items"):
            return _write(spark, inputs, context)
    finally:
        spark.catalog.clearCache()


def _write(spark: SparkSession, inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg, lake, input_hash, versions = inputs.cfg, inputs.lake, inputs.hash, inputs.versions
    joined = join(spark, cfg, lake)
    source = joined if cfg.behavior.source == "column" else _learned(spark, lake, read(spark, lake, "item_stats"))
    richness = measure(source.filter("norm IS NOT NULL"), cfg.features)
    if richness.fields["richness_source"] == "count":
        context.note(
            f"WARNING: Spearman(norm, count) is {richness.fields['spearman']:.2f}, below features.proxy_min_spearman "
            f"{cfg.features.proxy_min_spearman:g}: "
            "the norm does not measure how much is known about an item, so richness is min-max of log(1 + count)"
        )
    features, schema = joined.select("*", richness.column.alias("richness")), tables.item_features(cfg.features.content)
    features = layout.by_index(features, lake.open("item_stats").count())
    with row_groups(spark, _ROW_GROUP):
        written = {"item_features": write(features, lake, "item_features", schema, input_hash, sources=versions)}
    if cfg.behavior.source == "sasrec":
        result = read(spark, lake, "item_features", written["item_features"])
        _note_missing(context, result.filter("interactions > 0 AND norm IS NULL").count(), result.count())
    row = {"input_hash": input_hash, **richness.fields}
    written["richness_stats"] = lake.write_rows("richness_stats", tables.RICHNESS_STATS, [row], input_hash, versions)
    written[quality.TABLE] = quality.write(cfg, lake, written["item_features"], inputs, context)
    context.metrics({key: richness.fields[key] for key in ("spearman", "norm_low", "norm_high")})
    return written


def _note_missing(context: StageContext, without: int, items: int) -> None:
    """Note how many items have training events but no behaviour embedding."""
    context.metrics({"items_without_embedding": without})
    if without:
        context.facts["without behaviour embedding"] = without
        context.note(
            f"{without} of {items} items have training events but no behaviour embedding (new since its training, "
            "or not among the latest behavior.max_length + 1 events of a user with at least two): they count as items "
            "without behaviour"
        )


def join(spark: SparkSession, cfg: Config, lake: Lake) -> DataFrame:
    """Join every item of ``item_stats`` with its accepted row of ``items``, its behaviour vector and norm (null where
    it has none) and fingerprint. One exchange by item_id for each table."""
    stats, content, brought = read(spark, lake, "item_stats"), cfg.features.content, modalities(cfg)
    items = content_vectors.items(spark, cfg, lake)
    judged = validate.judge_items(items, validate.widths(items, brought))
    accepted = judged.filter("reason IS NULL").select(
        "item_id", "title", *(validate.present(name).alias(name) for name in brought)
    )
    columns = ["item_id", "item_index", "interactions", "stratum", "title", *content]
    if cfg.behavior.source == "column":
        joined = stats.join(accepted, "item_id", "left").select(*columns, BEHAVIOR, _length(BEHAVIOR).alias("norm"))
    else:
        joined = _learned(spark, lake, stats.join(accepted, "item_id", "left")).select(*columns, BEHAVIOR, "norm")
    vectors = [*content, BEHAVIOR]
    hashed = F.xxhash64(*vectors, *(F.col(name).isNull() for name in vectors))
    return joined.select("*", F.lower(F.lpad(F.hex(hashed), 16, "0")).alias("fingerprint"))


def _learned(spark: SparkSession, lake: Lake, stats: DataFrame) -> DataFrame:
    """Add the learned behaviour and norm to ``stats``; null for items that were not trained, and for cold ones."""
    learned = read(spark, lake, EMBEDDINGS).select(
        "item_id", F.col(BEHAVIOR).alias("_vector"), F.col("norm").alias("_norm")
    )
    warm = (
        F.when(F.col("interactions") > 0, F.col(f"_{name}")).alias(alias)
        for name, alias in (("vector", BEHAVIOR), ("norm", "norm"))
    )
    return stats.join(learned, "item_id", "left").select(*stats.columns, *warm)


def _length(vector: str) -> Column:
    return F.sqrt(F.aggregate(F.col(vector).cast("array<double>"), F.lit(0.0), lambda total, x: total + x * x)).cast(
        "float"
    )


ITEM_FEATURES = Stage(
    "item features",
    "spark",
    reads=_reads,
    writes=lambda cfg: ("item_features", "richness_stats", quality.TABLE),
    also=(content_vectors.ENCODERS, "catalog_stats", "truth"),
    settings=_settings,
    body=_build,
    prefix="items",
)
"""Reads items, their statistics and behaviour embeddings, writes the inputs of a tokenizer."""
