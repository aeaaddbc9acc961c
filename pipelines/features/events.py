"""The first part of the features stage: from raw items and interactions to item_stats, user_stats, sequences, ranking_samples, catalog_stats,
and item_pairs where the tokenizer learns from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config, Features, digest
from adasid.errors import InputError
from pipelines.engines.lake import Lake
from pipelines.engines.spark import read, session, write
from pipelines.engines.tracking import Track
from pipelines.features import histories, pairs, validate
from pipelines.features.ranks import Ranked
from pipelines.features.statistics import item_stats, popularity

_OUTPUTS = ("item_stats", "user_stats", "ranking_samples", "sequences")
_LATER = {"content", "norm_percentiles", "proxy_min_spearman", "pairs"}  # modalities(), settings of the second part, and of item_pairs
_RANKING = {"ranking_split", "ranking_holdout"}


class Checked(NamedTuple):
    """Item ids that were accepted; interactions with ``time`` and ``reason``, partitioned by user; how many of them are good; refused rows by reason."""

    items: DataFrame
    judged: DataFrame
    good: int
    rejected: dict[str, int]


class Clean(NamedTuple):
    """Ordered, split events with the rows that were dropped on the way."""

    events: DataFrame
    duplicates: int
    users: int
    interactions: int


def modalities(cfg: Config) -> tuple[str, ...]:
    """The vector columns that ``items`` must have."""
    return (*cfg.features.content, *([tables.BEHAVIOR] if cfg.behavior.source == "column" else []))


def build(cfg: Config, track: Track) -> bool:
    """Do the part unless its outputs are up to date; whether anything was done. Raises InputError for unusable input."""
    worked = _events(cfg, track)
    return (cfg.tokenizer.pairs and pairs.build(cfg, track)) or worked


def _events(cfg: Config, track: Track) -> bool:
    lake, features = track.lake, _decided(cfg.features, track)
    mark = _mark(cfg, features, lake)
    if lake.fresh(mark, *_OUTPUTS) and _catalog_run(lake) == mark:
        return False
    spark = session(cfg.spark)
    track.inputs(_reads(lake))
    try:
        track.outputs(_build(spark, cfg.model_copy(update={"features": features}), track, mark))
    finally:
        spark.catalog.clearCache()
    return True


def _reads(lake: Lake) -> dict[str, int]:
    return lake.versions("items", "interactions")


def _mark(cfg: Config, features: Features, lake: Lake) -> str:
    unread = _LATER | (_RANKING if features.ranking_split == "same" else set())
    return digest("events", features.model_dump(mode="json", exclude=unread), modalities(cfg), lake.stamps(_reads(lake)))


def _decided(features: Features, track: Track) -> Features:
    """``features`` with what ``ranking_split: auto`` comes to on these interactions. Read through Arrow, so that a stage that has nothing to do starts
    no Spark; the files' statistics answer where no event is rated."""
    if features.ranking_split != "auto":
        return features

    def any_row(column: str, condition: pc.Expression) -> bool:
        return any(batch.num_rows for batch in track.lake.batches("interactions", None, [column], condition))

    rated = any_row("rating", pc.field("rating") <= features.positive_rating)
    time = pc.field("timestamp")
    timed = rated and not any_row("timestamp", time.is_null() | (pc.utf8_trim_whitespace(time) == ""))
    if rated and not timed:
        track.note("interactions are rated, but not all have a timestamp: ranking is split as retrieval is (features.ranking_split)")
    return features.model_copy(update={"ranking_split": "global_time" if timed else "same"})


def _build(spark: SparkSession, cfg: Config, track: Track, mark: str) -> dict[str, int]:
    lake, features = track.lake, cfg.features
    checked = check(spark, cfg, lake, mark)
    track.note(f"checked the input: {sum(checked.rejected.values())} rows rejected")
    clean = prepare(checked, features, track)
    train = clean.events.filter("split = 'train'")
    counts = train.groupBy("user_id", "item_id").agg(F.count("*").alias("events")).persist()
    stats = item_stats(checked.items, counts, features)
    sources = _reads(lake)
    users = counts.groupBy("user_id").agg(F.sum("events").alias("interactions"), F.count("*").alias("items"))
    index = stats.frame.select("item_id", "item_index")
    label = F.when(F.col("rating").isNull() | (F.col("rating") > features.positive_rating), 1).otherwise(0)
    indexed = clean.events.join(index, "item_id").select("*", label.alias("label")).persist()
    samples = indexed.withColumn("split", F.col("ranking_split"))
    windows = histories.sequences(indexed, features.max_length)
    written = {
        "item_stats": write(stats.frame, lake, "item_stats", tables.ITEM_STATS, mark, sources=sources),
        "user_stats": write(users, lake, "user_stats", tables.USER_STATS, mark),
        "ranking_samples": write(samples, lake, "ranking_samples", tables.RANKING_SAMPLES, mark),
        "sequences": write(windows, lake, "sequences", tables.SEQUENCES, mark, sources=sources),
    }
    row = _catalog_row(mark, clean, stats, checked.rejected, features)
    written["catalog_stats"] = write_catalog(lake, row, mark)
    written["rejected_rows"] = lake.version("rejected_rows")
    numbers = {key: row[key] for key in ("items", "users", "interactions", "train_interactions", "duplicates", "gini", "head_interactions")}
    track.metrics({**numbers, "rejected": sum(checked.rejected.values()), **{f"items_{name}": n for name, n in row["strata"]}})
    return written


def check(spark: SparkSession, cfg: Config, lake: Lake, mark: str) -> Checked:
    """Judge every input row. Refused rows are written before anything is raised about them."""
    items, interactions = read(spark, lake, "items"), read(spark, lake, "interactions")
    limit, now = cfg.features.max_rejected, validate.clock(cfg.features.now)
    widths = validate.widths(items, modalities(cfg))
    judged_items = validate.judge_items(items, widths)
    narrow = judged_items.select("item_id", "reason").persist()
    counted = validate.reasons(narrow)
    bad = validate.refused(judged_items, "items", items.columns, mark) if len(counted) > 1 or None not in counted else None
    try:
        validate.insist("items", counted, limit, widths)
    except InputError:
        _quarantine(spark, lake, mark, bad)
        raise
    accepted = narrow.filter("reason IS NULL").select("item_id")
    judged = validate.judge_events(interactions, accepted, now).repartition("user_id").persist()
    counted_events = validate.reasons(judged)
    bad_events = validate.refused(judged, "interactions", interactions.columns, mark) if set(counted_events) - {None} else None
    _quarantine(spark, lake, mark, bad, bad_events)
    validate.insist("interactions", counted_events, limit)
    names = sorted({reason for reason in (*counted, *counted_events) if reason})
    return Checked(accepted, judged, counted_events[None], {name: counted.get(name, 0) + counted_events.get(name, 0) for name in names})


def prepare(checked: Checked, features: Features, track: Track) -> Clean:
    """De-duplicate, apply the k-core, order and split the accepted events, without another exchange by user."""
    accepted = checked.judged.filter("reason IS NULL").select(*histories.EVENT)
    for key, other in (("split", "leave_one_out"), ("ranking_split", "same")):
        if getattr(features, key) == "global_time" and (timeless := accepted.filter("time IS NULL").count()):
            raise InputError(
                f"features.{key} is 'global_time' but {timeless} events have no timestamp: add timestamps, or set features.{key}: {other}"
            )
    events, before = histories.deduplicate(accepted, features.deduplicate), None
    if features.k_core:
        events = events.localCheckpoint()
        before = events.count()
        events, fixed = histories.k_core(events, features.k_core, features.k_core_rounds)
        if events.isEmpty():
            raise InputError(f"features.k_core {features.k_core} leaves no event of {before}: lower it, or set it to 0")
        if not fixed:
            track.note(
                f"the k-core was still shrinking after features.k_core_rounds {features.k_core_rounds}: raise it, or accept items and users below {features.k_core} events"
            )
    ordered = histories.order(events, features).persist()
    totals = ordered.agg(F.count("*").alias("events"), F.count_if(F.col("position") == 0).alias("users")).first()
    assert totals is not None
    duplicates = checked.good - (totals["events"] if before is None else before)
    return Clean(ordered, duplicates, totals["users"], totals["events"])


def write_catalog(lake: Lake, row: dict[str, Any], mark: str) -> int:
    """Write the one row of ``catalog_stats``."""
    full = {field.name: row.get(field.name) for field in tables.CATALOG_STATS}
    return lake.write("catalog_stats", tables.CATALOG_STATS, pa.Table.from_pylist([full], tables.CATALOG_STATS).to_batches(), mark)


def _catalog_row(mark: str, clean: Clean, stats: Ranked, rejected: dict[str, int], features: Features) -> dict[str, Any]:
    return {
        "run": mark,
        "users": clean.users,
        "interactions": clean.interactions,
        "duplicates": clean.duplicates,
        "rejected": sorted(rejected.items()),
        "ranking_split": features.split if features.ranking_split == "same" else features.ranking_split,
        **popularity(stats),
    }


def _catalog_run(lake: Lake) -> str | None:
    """The digest of the events that ``catalog_stats`` describes; the second part rewrites the table under a digest of its own."""
    return str(lake.read("catalog_stats", columns=["run"])["run"][0]) if lake.exists("catalog_stats") else None


def _quarantine(spark: SparkSession, lake: Lake, mark: str, *bad: DataFrame | None) -> None:
    """Append refused rows; with none, make sure that the table is there."""
    frames = [frame for frame in bad if frame is not None]
    if not frames and lake.exists("rejected_rows"):
        return
    frame = frames[0] if frames else spark.createDataFrame([], "run string, table string, row_hash string, reason string, row string, copies bigint")
    for other in frames[1:]:
        frame = frame.unionByName(other)
    write(frame, lake, "rejected_rows", tables.REJECTED_ROWS, mark, append=(f"rejected_rows:{mark}", 1))
