"""Check every row of items and interactions: accepted ids, judged events, rejected rows and their reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config
from adasid.errors import InputError
from pipelines.content import vectors
from pipelines.engines.lake import Lake
from pipelines.engines.spark import write
from pipelines.features import histories, labels, ranks, validate
from pipelines.features.layout import ITEM, PART, Layout, layout
from pipelines.sources import in_place, parquet

_KINDS = ("lacks", "void")


class Checked(NamedTuple):
    """Checked input has the item_id and ``_item`` of accepted items; interactions with ``_item``, ``time``, ``reason``,
    ``_chance`` and ``_part``, partitioned by user; figures of the accepted ones (``rows``, :func:`labels.sums` and
    :func:`histories.sums`); rejected rows by reason; identical copies of items; items without each modality; where the
    events of users are."""

    items: DataFrame
    judged: DataFrame
    accepted: dict[str, Any]
    rejected: dict[str, int]
    duplicate_items: int
    missing: dict[str, int]
    users: Layout


def check(spark: SparkSession, cfg: Config, lake: Lake, input_hash: str, note: Callable[[str], None]) -> Checked:
    """Validate every input row. Rejected rows are written before anything is raised about them."""
    features, used = cfg.features, modalities(cfg)
    items = vectors.items(spark, cfg, lake)
    limit, now = features.max_rejected, validate.clock(features.now)
    widths = validate.widths(items, used)
    lacks = [validate.present(name).isNull().alias(f"_lacks_{i}") for i, name in enumerate(used)]
    voids = [
        (F.col(name).isNotNull() & validate.present(name).isNull()).alias(f"_void_{i}") for i, name in enumerate(used)
    ]
    judged_items = validate.judge_items(items, widths, *lacks, *voids)
    flags = [f"_{kind}_{i}" for kind in _KINDS for i in range(len(used))]
    narrow = ranks.numbered(judged_items.select("item_id", "reason", *flags)).frame
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
    accepted = narrow.filter("reason IS NULL").select("item_id", F.col("rank").alias(ITEM))
    interactions = in_place.read(spark, lake, "interactions", parquet.EVENTS)
    users = layout(spark, features.user_buckets)
    timed = validate.judge_events(interactions, accepted, now, features.first_year)
    judged = users.place(_lean(timed, cfg.seed, users)).persist()
    # unknown items alone can have ids that are not those of items
    item_id = F.when(F.col("reason") == "unknown_item", F.col("item_id"))
    odd = [F.count_if(validate.odd("user_id")).alias("user_id"), F.count_if(validate.odd(item_id)).alias("item_id")]
    event_figures = validate.reasons(judged, *odd, *labels.sums(), *histories.sums())
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
    return Checked(accepted, judged, event_figures[None], rejected, copies, missing, users)


def _lean(judged: DataFrame, seed: int, users: Layout) -> DataFrame:
    """Add ``_chance`` and ``_part`` to judged interactions. The texts of an item and a time go with the rejected rows
    only, which are written as they came."""
    texts = {name: F.when(F.col("reason").isNotNull(), F.col(name)) for name in ("item_id", "timestamp")}
    return judged.select("*", histories.chance(seed), users.part().alias(PART)).withColumns(texts)


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
    return [F.count_if(F.col(f"_{kind}_{i}")).alias(f"{kind}_{i}") for kind in _KINDS for i in range(len(used))]


def _missing(row: Mapping[str, int], used: tuple[str, ...], note: Callable[[str], None]) -> dict[str, int]:
    """Return modality -> accepted items without it, from their :func:`_lacking`; a note counts empty and zero
    vectors."""
    for i, name in enumerate(used):
        if row[f"void_{i}"]:
            note(
                f"items: {row[f'void_{i}']} have an empty or a zero vector in {name!r}: they count as items without it"
            )
    return {name: row[f"lacks_{i}"] for i, name in enumerate(used)}


def _quarantine(lake: Lake, input_hash: str, *bad: DataFrame | None) -> None:
    """Add rejected rows, in place of those of an earlier run on the same inputs; with none, create the table if it is
    missing."""
    frames = [frame for frame in bad if frame is not None]
    if not frames:
        if not lake.exists("rejected_rows"):
            lake.write_rows("rejected_rows", tables.REJECTED_ROWS, [], input_hash)
        return
    frame = reduce(DataFrame.unionByName, frames)
    write(frame, lake, "rejected_rows", tables.REJECTED_ROWS, input_hash, replace=f"input_hash = '{input_hash}'")


def modalities(cfg: Config) -> tuple[str, ...]:
    """Return the vector columns that ``items`` must have."""
    return (*cfg.features.content, *([tables.BEHAVIOR] if cfg.behavior.source == "column" else []))
