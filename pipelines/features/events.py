"""Compute, from raw items and interactions, item_stats, user_stats, sequences, ranking_samples, catalog_stats, and
item_pairs where the tokenizer learns from them: the first part of the features stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config, Features
from adasid.errors import InputError
from pipelines.engines.lake import Lake
from pipelines.engines.spark import read, session, write
from pipelines.engines.tracking import StageContext
from pipelines.features import histories, labels, validate
from pipelines.features.ranks import Ranked
from pipelines.features.statistics import item_stats, popularity
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
_RANKING = {"ranking_split", "ranking_holdout"}


class Checked(NamedTuple):
    """Checked input has accepted item ids; interactions with ``time`` and ``reason``, partitioned by user; the number
    of accepted ones; rejected rows by reason; identical copies of items; items without each modality."""

    items: DataFrame
    judged: DataFrame
    good: int
    rejected: dict[str, int]
    duplicate_items: int
    missing: dict[str, int]


class Clean(NamedTuple):
    """Clean events are ordered and split; ``counts``: what was dropped, as ``tables.CATALOG_STATS`` counts it."""

    events: DataFrame
    counts: dict[str, int]


def modalities(cfg: Config) -> tuple[str, ...]:
    """Return the vector columns that ``items`` must have."""
    return (*cfg.features.content, *([tables.BEHAVIOR] if cfg.behavior.source == "column" else []))


def _settings(cfg: Config, lake: Lake) -> dict[str, object]:
    unread = _LATER | (_RANKING if cfg.features.ranking_split == "same" else set())
    return {
        "features": cfg.features.model_dump(mode="json", exclude=unread),
        "seed": cfg.seed,
        "modalities": modalities(cfg),
    }


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
    for column in tables.INTERACTIONS.names:
        if column not in present:
            raise InputError(
                f"table interactions version {lake.version('interactions')} has no column {column!r}, so that it is "
                "of another version of adasid: run jobs/ingest.py again (and drop its pin)"
            )


def _rated(features: Features, lake: Lake) -> bool:
    """Return whether an event has a rating or a label that is not positive."""
    low = pc.field("rating") <= features.positive_rating
    return _any_row(lake, "rating", low) or _any_row(lake, "label", pc.field("label") == 0)


def _timed(lake: Lake) -> bool:
    """Return whether every event has a timestamp."""
    time = pc.field("timestamp")
    return not _any_row(lake, "timestamp", time.is_null() | (pc.utf8_trim_whitespace(time) == ""))


def _any_row(lake: Lake, column: str, condition: pc.Expression) -> bool:
    return any(batch.num_rows for batch in lake.batches("interactions", None, [column], condition))


def _build(inputs: Inputs, context: StageContext) -> dict[str, int]:
    same_source(inputs.cfg, inputs.lake)
    spark = session(inputs.cfg.spark)
    try:
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
    context.note(f"checked the input: {sum(checked.rejected.values())} rows rejected")
    clean = prepare(checked, features, context, cfg.seed)
    train = clean.events.filter("split = 'train'")
    counts = train.groupBy("user_id", "item_id").agg(F.count("*").alias("events")).persist()
    stats = item_stats(checked.items, counts, features)
    users = counts.groupBy("user_id").agg(F.sum("events").alias("interactions"), F.count("*").alias("items"))
    indexed = clean.events.join(stats.frame.select("item_id", "item_index"), "item_id").persist()
    samples = indexed.withColumn("split", F.col("ranking_split"))
    windows = histories.sequences(indexed, features.max_length)
    written = {
        "item_stats": write(stats.frame, lake, "item_stats", tables.ITEM_STATS, input_hash, sources=sources),
        "user_stats": write(users, lake, "user_stats", tables.USER_STATS, input_hash, sources=sources),
        "ranking_samples": write(samples, lake, "ranking_samples", tables.RANKING_SAMPLES, input_hash, sources=sources),
        "sequences": write(windows, lake, "sequences", tables.SEQUENCES, input_hash, sources=sources),
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


def check(spark: SparkSession, cfg: Config, lake: Lake, input_hash: str, note: Callable[[str], None]) -> Checked:
    """Validate every input row. Rejected rows are written before anything is raised about them."""
    features, used = cfg.features, modalities(cfg)
    items = read(spark, lake, "items")
    limit, now = features.max_rejected, validate.clock(features.now)
    widths = validate.widths(items, used)
    judged_items = validate.judge_items(items, widths)
    lacks = [validate.present(name).isNull().alias(f"_lacks_{i}") for i, name in enumerate(used)]
    voids = [
        (F.col(name).isNotNull() & validate.present(name).isNull()).alias(f"_void_{i}") for i, name in enumerate(used)
    ]
    narrow = judged_items.select("item_id", "reason", *lacks, *voids).persist()
    figures = validate.reasons(narrow, *_lacking(used), F.count_if(validate.odd("item_id")).alias("odd"))
    counted = {reason: row["rows"] for reason, row in figures.items()} | _unparsed(lake, "items")
    copies = counted.pop(validate.COPY, 0)
    bad = validate.refused(judged_items, "items", items.columns, input_hash) if set(counted) - {None} else None
    try:
        validate.insist("items", counted, limit, widths)
        validate.insist_vectors(widths)
    except InputError:
        _quarantine(lake, input_hash, bad)
        raise
    accepted, interactions = narrow.filter("reason IS NULL"), read(spark, lake, "interactions")
    judged = validate.judge_events(interactions, accepted, now, features.first_year).repartition("user_id").persist()
    odd = [F.count_if(validate.odd(name)).alias(name) for name in ("user_id", "item_id")]
    event_figures = validate.reasons(judged, *odd)
    counted_events = {reason: row["rows"] for reason, row in event_figures.items()} | _unparsed(lake, "interactions")
    bad_events = (
        validate.refused(judged, "interactions", interactions.columns, input_hash)
        if set(counted_events) - {None}
        else None
    )
    _quarantine(lake, input_hash, bad, bad_events)
    advice = validate.advice(judged, counted_events, features.first_year, now)
    validate.insist("interactions", counted_events, limit, advice=advice)
    if advice:
        note(f"interactions: times that are refused, {advice}")
    unknown = judged.filter("reason = 'unknown_item'").select("item_id")
    known = (
        accepted.select("item_id").union(unknown.distinct())
        if "unknown_item" in counted_events
        else accepted.select("item_id")
    )
    odd_items = figures[None]["odd"] + event_figures.get("unknown_item", {}).get("item_id", 0)
    for table, ids, number in (
        ("items", known, odd_items),
        ("interactions", judged.filter("reason IS NULL").select("user_id"), event_figures[None]["user_id"]),
    ):
        if number and (alike := validate.alike(ids)):
            note(f"{table}: {alike}; they count as different ids")
    names = sorted({reason for reason in (*counted, *counted_events) if reason})
    rejected = {name: counted.get(name, 0) + counted_events.get(name, 0) for name in names}
    missing = _missing(figures[None], used, note)
    return Checked(accepted.select("item_id"), judged, counted_events[None], rejected, copies, missing)


def _unparsed(lake: Lake, table: str) -> dict[str | None, int]:
    """Count the lines of this source that ingest could not parse."""
    input_hash = lake.input_hash(table, lake.version(table))
    if not input_hash or not lake.exists("rejected_rows"):
        return {}
    mine = (pc.field("input_hash") == input_hash) & (pc.field("table") == table)
    copies = sum(
        pc.sum(batch["copies"]).as_py() or 0 for batch in lake.batches("rejected_rows", None, ["copies"], mine)
    )
    return {"unparsable_json": copies} if copies else {}


def _lacking(used: tuple[str, ...]) -> list[Column]:
    """Return counts of items without each modality, and of those with an empty or a zero vector."""
    kinds = ("lacks", "void")
    return [F.count_if(F.col(f"_{kind}_{i}")).alias(f"{kind}_{i}") for kind in kinds for i in range(len(used))]


def _missing(row: Mapping[str, int], used: tuple[str, ...], note: Callable[[str], None]) -> dict[str, int]:
    """Return modality -> accepted items without it, from their :func:`_lacking`; a note counts empty and zero
    vectors."""
    for i, name in enumerate(used):
        if row[f"void_{i}"]:
            note(
                f"items: {row[f'void_{i}']} have an empty or a zero vector in {name!r}: they count as items without it"
            )
    return {name: row[f"lacks_{i}"] for i, name in enumerate(used)}


def prepare(checked: Checked, features: Features, context: StageContext, seed: int) -> Clean:
    """Label, de-duplicate, cap, apply the k-core, order and split the accepted events, without another exchange by
    user."""
    accepted = labels.labelled(checked.judged.filter("reason IS NULL"), features).select(*histories.EVENT)
    for key, other in (("split", "leave_one_out"), ("ranking_split", "same")):
        if getattr(features, key) == "global_time" and (timeless := accepted.filter("time IS NULL").count()):
            raise InputError(
                f"features.{key} is 'global_time' but {timeless} events have no timestamp: add timestamps, or set "
                f"features.{key}: {other}"
            )
    events, left = histories.deduplicate(accepted, features.deduplicate), [checked.good]
    if heavy := _heavy(accepted, features.max_user_events):
        left.append(events.count())
        events = histories.cap(events, features.max_user_events, seed)
    if features.k_core:
        events = events.localCheckpoint()
        left.append(before := events.count())
        events, fixed = histories.k_core(events, features.k_core, features.k_core_rounds)
        if events.isEmpty():
            raise InputError(f"features.k_core {features.k_core} leaves no event of {before}: lower it, or set it to 0")
        if not fixed:
            context.note(
                f"the k-core was still shrinking after features.k_core_rounds {features.k_core_rounds}: raise it, or "
                "accept items and users below "
                f"{features.k_core} events"
            )
    ordered = histories.order(events, features, seed).persist()
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


def _heavy(events: DataFrame, most: int) -> str | None:
    """Describe the users with more than ``most`` events; None where there is none."""
    counts = events.groupBy("user_id").agg(F.count("*").alias("n")).filter(F.col("n") > most)
    row = counts.agg(F.count("*").alias("users"), F.max(F.struct("n", "user_id")).alias("first")).first()
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
        **clean.counts,
        "duplicate_items": checked.duplicate_items,
        "missing": sorted(checked.missing.items()),
        "rejected": sorted(checked.rejected.items()),
        "ranking_split": features.split if features.ranking_split == "same" else features.ranking_split,
        **popularity(stats),
    }


def _quarantine(lake: Lake, input_hash: str, *bad: DataFrame | None) -> None:
    """Append rejected rows; with none, create the table if it is missing."""
    frames = [frame for frame in bad if frame is not None]
    if not frames:
        if not lake.exists("rejected_rows"):
            lake.write_rows("rejected_rows", tables.REJECTED_ROWS, [], input_hash)
        return
    frame = reduce(DataFrame.unionByName, frames)
    write(frame, lake, "rejected_rows", tables.REJECTED_ROWS, input_hash, append=(f"rejected_rows:{input_hash}", 1))


EVENTS = Stage(
    "features",
    "spark",
    reads=lambda cfg: _READS,
    writes=lambda cfg: _WRITES,
    appends=("rejected_rows",),
    settings=_settings,
    decide=_decided,
    body=_build,
    prefix="events",
)
"""Reads raw items and interactions, writes statistics, sequences, ranking samples and rejected rows."""
