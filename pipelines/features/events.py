"""Compute, from raw items and interactions, item_stats, user_stats, sequences, ranking_samples, catalog_stats, and
item_pairs where the tokenizer learns from them: the first part of the features stage."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config, Features
from adasid.errors import InputError
from pipelines.content import vectors
from pipelines.engines.lake import Lake
from pipelines.engines.spark import fits_broadcast, session, write
from pipelines.engines.tracking import StageContext
from pipelines.features import histories, labels, layout, statistics
from pipelines.features.check import Checked, check, modalities
from pipelines.features.layout import BUCKET, ITEM, PART, ROW, USER, Layout
from pipelines.features.ranks import Ranked
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage

_READS = ("items", "interactions")
_WRITES = ("item_stats", "user_stats", "ranking_samples", "sequences", "catalog_stats")
_LATER = {
    "content",
    "norm_percentiles",
    "proxy_min_spearman",
    "pairs",
}  # covered by modalities(), or read only by the second part and item_pairs
_DROPPED = ("duplicates", "duplicate_items", "capped", "below_k_core", "tied", "outside_histories")
"""These counts of ``catalog_stats`` are tracked."""
_BUCKETS = "features.user_buckets"
_RANKING = {"ranking_split", "ranking_holdout"}


class Clean(NamedTuple):
    """Clean events are ordered and split; ``counts``: what was dropped, as ``tables.CATALOG_STATS`` counts it."""

    events: DataFrame
    counts: dict[str, int]


def _settings(cfg: Config, lake: Lake) -> dict[str, object]:
    unread = _LATER | {"user_buckets"} | (_RANKING if cfg.features.ranking_split == "same" else set())
    return {
        "features": cfg.features.model_dump(mode="json", exclude=unread),
        _BUCKETS: cfg.features.user_buckets,
        "seed": cfg.seed,
        "modalities": modalities(cfg),
    }


def _fresh(inputs: Inputs, lake: Lake) -> bool:
    """Return whether the tables exist, in the buckets that the config asks for."""
    if not lake.fresh(inputs.hash, *_WRITES):
        return False
    (row,) = Lake(lake.root, {}).read("catalog_stats").to_pylist()  # whatever the pins say, as the hashes above
    return bool(row["user_buckets"] == inputs.cfg.features.user_buckets)


def same_source(cfg: Config, lake: Lake) -> None:
    """Raise InputError where items and interactions are of two runs of ingest, and no pin asks for that."""
    if {"items", "interactions"} & set(cfg.pins):
        return
    input_hashes = {
        lake.input_hash(name, version) for name, version in lake.versions("items", "interactions").items()
    } - {None}
    if len(input_hashes) > 1:
        raise InputError(
            "tables items and interactions come from different runs of ingest (was one cut off?): run jobs/ingest.py "
            "again"
        )


def _decided(cfg: Config, lake: Lake) -> Config:
    """Resolve ``ranking_split: auto`` on these interactions. Arrow reads them, so that a stage that is up to date
    starts no Spark; the files' statistics suffice where no event is rated. Raises InputError for a table that lacks a
    column."""
    _check_columns(lake)
    features = cfg.features
    if features.ranking_split != "auto":
        return cfg
    rated = _rated(features, lake)
    split = "global_time" if rated and _timed(lake) else "same"
    return cfg.model_copy(update={"features": features.model_copy(update={"ranking_split": split})})


def _check_columns(lake: Lake) -> None:
    present = lake.schema("interactions").names
    if present == tables.IN_PLACE.names:
        return
    for column in tables.INTERACTIONS.names:
        if column not in present:
            raise InputError(
                f"table interactions version {lake.version('interactions')} has no column {column!r}, so that it is "
                "of another version of adasid: run jobs/ingest.py again (and drop its pin)"
            )


def _rated(features: Features, lake: Lake) -> bool:
    """Return whether an event has a rating or a label that is not positive."""
    low = pc.field("rating") <= pa.scalar(features.positive_rating, tables.INTERACTIONS.field("rating").type)
    return _any_row(lake, "rating", low) or _any_row(lake, "label", pc.field("label") == 0)


def _timed(lake: Lake) -> bool:
    """Return whether every event has a timestamp."""
    time = pc.field("timestamp")
    return not _any_row(lake, "timestamp", time.is_null() | (pc.utf8_trim_whitespace(time) == ""))


def _any_row(lake: Lake, column: str, condition: pc.Expression) -> bool:
    schema = pa.schema([tables.INTERACTIONS.field(column)])
    return any(batch.num_rows for batch in in_place.batches(lake, "interactions", schema, condition))


def _build(inputs: Inputs, context: StageContext) -> dict[str, int]:
    same_source(inputs.cfg, inputs.lake)
    spark = session(inputs.cfg.spark, size=in_place.size(inputs.lake, *inputs.versions))
    try:
        with in_place.reading(inputs.lake, *_READS):
            return _write(spark, inputs, context)
    finally:
        spark.catalog.clearCache()


def _write(spark: SparkSession, inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg, lake, input_hash, sources = inputs.cfg, inputs.lake, inputs.hash, inputs.versions
    features = cfg.features
    if context.cfg.features.ranking_split == "auto" and features.ranking_split == "same" and _rated(features, lake):
        context.note(
            "interactions are rated, but not all have a timestamp: ranking is split as retrieval is "
            "(features.ranking_split)"
        )
    checked = check(spark, cfg, lake, input_hash, context.note)
    users = checked.users
    context.note(f"checked the input: {sum(checked.rejected.values())} rows rejected")
    clean = prepare(checked, features, context)
    trained = statistics.trained(clean.events, USER)
    stats = statistics.item_stats(checked.items, trained, features)
    indexed = _indexed(clean.events, stats, users)
    samples = indexed.withColumn("split", F.col("ranking_split")).withColumn(BUCKET, users.bucket())
    windows = histories.sequences(indexed, features.max_length, USER)
    written = {
        name: write(frame, lake, name, schema, input_hash, sources=sources, partition=partition)
        for name, frame, schema, partition in (
            ("item_stats", stats.frame, tables.ITEM_STATS, ()),
            ("user_stats", statistics.user_stats(trained), tables.USER_STATS, ()),
            ("ranking_samples", samples, tables.RANKING_SAMPLES, (BUCKET,)),
            ("sequences", windows.withColumn(BUCKET, users.bucket()), tables.SEQUENCES, (BUCKET,)),
        )
    }
    row = _catalog_row(input_hash, checked, clean, stats, features)
    written["catalog_stats"] = lake.write_rows("catalog_stats", tables.CATALOG_STATS, [row], input_hash, sources)
    written["rejected_rows"] = lake.version("rejected_rows")
    numbers = {
        key: row[key]
        for key in ("items", "users", "interactions", "train_interactions", "gini", "head_interactions", *_DROPPED)
    }
    context.metrics(
        {**numbers, "rejected": sum(checked.rejected.values()), **{f"items_{name}": n for name, n in row["strata"]}}
    )
    return written


def _indexed(events: DataFrame, stats: Ranked, users: Layout) -> DataFrame:
    """Add ``item_index`` to ``events``, which keep their partitions and their order. Where all items are too many to
    broadcast, three integers of an event go to the items and back, and nothing else of it; the indices of a partition's
    events must fit in memory."""
    index = stats.frame.select(ITEM, "item_index")
    if fits_broadcast(index):
        return events.join(F.broadcast(index), ITEM)
    found = events.select(ITEM, PART, ROW).join(index.hint("shuffle_hash"), ITEM)
    found = users.place(found.select(PART, ROW, "item_index")).persist()
    return events.join(found.hint("shuffle_hash"), [PART, ROW])


def prepare(checked: Checked, features: Features, context: StageContext) -> Clean:
    """Label, de-duplicate, cap, apply the k-core, order and split the accepted events, without another exchange by
    user. The k-core apart, no step removes a user, so that the users are ranked first: their ranks order them faster
    than their ids do."""
    accepted, users = checked.judged.filter("reason IS NULL"), checked.users
    accepted = labels.labelled(accepted, features, checked.accepted).select(*histories.EVENT, PART)
    for key, other in (("split", "leave_one_out"), ("ranking_split", "same")):
        if getattr(features, key) == "global_time" and (timeless := accepted.filter("time IS NULL").count()):
            raise InputError(
                f"features.{key} is 'global_time' but {timeless} events have no timestamp: add timestamps, or set "
                f"features.{key}: {other}"
            )
    ranked = layout.rank_users(accepted)
    events, left = users.indexed(accepted, ranked), [checked.accepted["rows"]]
    if features.deduplicate == "exact" and not checked.accepted["twofold"]:
        events = histories.deduplicate_sorted(events, USER)
    else:
        events = histories.deduplicate(events, features.deduplicate, USER)
    if heavy := _heavy(ranked.frame, features.max_user_events):
        left.append(events.count())
        events = histories.cap(events, features.max_user_events, USER)
    if features.k_core:
        events = events.localCheckpoint()
        left.append(before := events.count())
        core, fixed = histories.k_core(events.drop("user_index"), features.k_core, features.k_core_rounds)
        events = users.indexed(users.place(core), layout.rank_users(core))
        if events.isEmpty():
            raise InputError(f"features.k_core {features.k_core} leaves no event of {before}: lower it, or set it to 0")
        if not fixed:
            context.note(
                f"the k-core was still shrinking after features.k_core_rounds {features.k_core_rounds}: raise it, or "
                "accept items and users below "
                f"{features.k_core} events"
            )
    slates = labels.outside(features, checked.accepted)
    ordered = histories.order(events, features, USER, slates=slates).drop("pos", histories.CHANCE)
    ordered = ordered.withColumn(ROW, F.monotonically_increasing_id()).persist()
    sums = [F.count_if(~F.col("in_history")).alias("outside_histories"), F.count_if("tied").alias("tied")]
    train = F.count_if(F.col("split") == "train").alias("train")
    row = ordered.agg(
        F.count("*").alias("interactions"), F.count_if(F.col("position") == 0).alias("users"), train, *sums
    ).first()
    assert row is not None
    totals = row.asDict()
    if not totals.pop("train"):
        raise InputError(
            f"no event is left to train on: of {totals['interactions']} events {totals['outside_histories']} are "
            "outside histories (features.histories "
            f"{features.histories!r}) and the others are held out (features.split {features.split!r}, ranking_split "
            f"{features.ranking_split!r}): lower "
            "features.holdout and ranking_holdout, set features.ranking_split: same, or bring more events"
        )
    left.append(totals["interactions"])
    lost = [a - b for a, b in zip(left, left[1:])]
    counts = {**totals, "duplicates": lost[0]}
    counts["capped"] = lost[1] if heavy else 0
    counts["below_k_core"] = lost[-1] if features.k_core else 0
    if counts["capped"]:
        context.note(f"{heavy}: the latest {features.max_user_events} of each are kept, {counts['capped']} dropped")
    return Clean(ordered, counts)


def _heavy(users: DataFrame, most: int) -> str | None:
    """Describe the ``users`` with more than ``most`` of their ``events``; None where there is none."""
    heavy = users.select("user_id", F.col("events").alias("n")).filter(F.col("n") > most)
    row = heavy.agg(F.count("*").alias("users"), F.max(F.struct("n", "user_id")).alias("first")).first()
    if row is None or not row["users"]:
        return None
    first = row["first"]
    return (
        f"{row['users']} users have more than features.max_user_events {most} events (user {first['user_id']!r} "
        "has "
        f"{first['n']})"
    )


def _catalog_row(input_hash: str, checked: Checked, clean: Clean, stats: Ranked, features: Features) -> dict[str, Any]:
    return {
        "input_hash": input_hash,
        "user_buckets": features.user_buckets,
        **clean.counts,
        "duplicate_items": checked.duplicate_items,
        "missing": sorted(checked.missing.items()),
        "rejected": sorted(checked.rejected.items()),
        "ranking_split": features.split if features.ranking_split == "same" else features.ranking_split,
        **statistics.popularity(stats),
    }


EVENTS = Stage(
    "features",
    "spark",
    reads=lambda cfg: (*_READS, *vectors.needed(cfg)),
    writes=lambda cfg: _WRITES,
    also=(vectors.ENCODERS,),
    appends=("rejected_rows",),
    settings=_settings,
    unhashed=frozenset({_BUCKETS}),
    decide=_decided,
    body=_build,
    fresh=_fresh,
    prefix="events 4",  # raised when a table gets or loses a column, or events another order
)
"""Reads raw items and interactions, writes statistics, sequences, ranking samples and rejected rows."""
