"""The second part of the features stage: one row of item_features for every item, once behaviour embeddings exist."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config, digest
from adasid.errors import InputError
from adasid.tables import BEHAVIOR
from pipelines.engines.lake import Lake
from pipelines.engines.spark import read, session, write
from pipelines.engines.tracking import Track
from pipelines.features import validate
from pipelines.features.events import modalities, write_catalog
from pipelines.features.richness import measure

EMBEDDINGS = "behavior_embeddings"


def build(cfg: Config, track: Track, required: bool) -> bool:
    """Do the part unless its outputs are up to date; whether anything was done. Where embeddings are missing or of other items, it
    waits with a note, or raises InputError if the part is ``required``."""
    lake, trained = track.lake, cfg.behavior.source == "sasrec"
    if trained and not lake.exists(EMBEDDINGS):
        return _wait(track, required, f"table {EMBEDDINGS} does not exist yet")
    versions, mark = _reads(cfg, lake), _mark(cfg, lake)
    if lake.fresh(mark, "item_features", "catalog_stats"):
        return False
    spark = session(cfg.spark)
    if trained and cfg.behavior.refresh == "always" and not _same_items(spark, lake):
        return _wait(
            track,
            required,
            f"table {EMBEDDINGS} version {versions[EMBEDDINGS]} was made of other items than item_stats version {versions['item_stats']}",
        )
    track.inputs(versions)
    try:
        track.outputs(_build(spark, cfg, track, mark))
    finally:
        spark.catalog.clearCache()
    return True


def check(cfg: Config, lake: Lake) -> None:
    """Raise InputError unless ``item_features`` was made of today's ``item_stats``, so that an item has one index in all tables."""
    if not lake.fresh(_mark(cfg, lake), "item_features"):
        raise InputError("item_features is of other items or settings than item_stats and this run's config: run jobs/build_features.py again")


def _reads(cfg: Config, lake: Lake) -> dict[str, int]:
    return lake.versions("items", "item_stats", *([EMBEDDINGS] if cfg.behavior.source == "sasrec" else []))


def _mark(cfg: Config, lake: Lake) -> str:
    return digest("items", cfg.features.norm_percentiles, cfg.features.proxy_min_spearman, modalities(cfg), lake.stamps(_reads(cfg, lake)))


def _wait(track: Track, required: bool, why: str) -> bool:
    text = f"item_features waits, {why}: run `python jobs/train.py --stage behavior`"
    if required:
        raise InputError(text)
    track.note(text)
    return False


def _same_items(spark: SparkSession, lake: Lake) -> bool:
    stats, embeddings = read(spark, lake, "item_stats"), read(spark, lake, EMBEDDINGS)
    both = stats.select("item_id", "item_index", "stratum").join(
        embeddings.select("item_id", "item_index", "norm"), ["item_id", "item_index"], "full"
    )
    return both.filter("stratum IS NULL OR norm IS NULL").isEmpty()


def _build(spark: SparkSession, cfg: Config, track: Track, mark: str) -> dict[str, int]:
    lake = track.lake
    joined = join(spark, cfg, lake)
    source = joined if cfg.behavior.source == "column" else _learned(spark, lake, read(spark, lake, "item_stats"))
    richness = measure(source.filter("norm IS NOT NULL"), cfg.features)
    if richness.fields["richness_source"] == "count":
        track.note(
            f"WARNING: Spearman(norm, count) is {richness.fields['spearman']:.2f}, below features.proxy_min_spearman {cfg.features.proxy_min_spearman:g}: "
            "the norm does not measure how much is known about an item, so richness is min-max of log(1 + count)"
        )
    features = joined.select("*", richness.column.alias("richness"))
    written = {"item_features": write(features, lake, "item_features", tables.item_features(cfg.features.content), mark)}
    row = lake.read("catalog_stats").to_pylist()[0]
    written["catalog_stats"] = write_catalog(lake, {**row, **richness.fields}, mark)
    track.metrics({key: richness.fields[key] for key in ("spearman", "norm_low", "norm_high")})
    return written


def join(spark: SparkSession, cfg: Config, lake: Lake) -> DataFrame:
    """Every item of ``item_stats`` with its accepted row of ``items``, its behaviour vector and norm (null where it has none) and fingerprint.
    One exchange by item_id for each table."""
    items, stats, content = read(spark, lake, "items"), read(spark, lake, "item_stats"), cfg.features.content
    judged, brought = validate.judge_items(items, validate.widths(items, modalities(cfg))), modalities(cfg)
    accepted = judged.filter("reason IS NULL").select("item_id", "title", *(validate.present(name).alias(name) for name in brought))
    columns = ["item_id", "item_index", "interactions", "stratum", "title", *content]
    if cfg.behavior.source == "column":
        joined = stats.join(accepted, "item_id", "left").select(*columns, BEHAVIOR, _length(BEHAVIOR).alias("norm"))
    else:
        joined = _learned(spark, lake, stats.join(accepted, "item_id", "left")).select(*columns, BEHAVIOR, "norm")
    vectors = [*content, BEHAVIOR]
    hashed = F.xxhash64(*vectors, *(F.col(name).isNull() for name in vectors))
    return joined.select("*", F.lower(F.lpad(F.hex(hashed), 16, "0")).alias("fingerprint"))


def _learned(spark: SparkSession, lake: Lake, stats: DataFrame) -> DataFrame:
    """``stats`` with the learned behaviour and norm; null for cold items, whose rows of the model's table never saw a gradient."""
    learned = read(spark, lake, EMBEDDINGS).select("item_id", F.col(BEHAVIOR).alias("_vector"), F.col("norm").alias("_norm"))
    warm = (F.when(F.col("interactions") > 0, F.col(f"_{name}")).alias(alias) for name, alias in (("vector", BEHAVIOR), ("norm", "norm")))
    return stats.join(learned, "item_id", "left").select(*stats.columns, *warm)


def _length(vector: str) -> Column:
    return F.sqrt(F.aggregate(F.col(vector).cast("array<double>"), F.lit(0.0), lambda total, x: total + x * x)).cast("float")
