"""Checks of the two input tables. A row that fails goes to ``rejected_rows`` with the first reason that applies."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from adasid.errors import ConfigError, InputError

Widths = dict[str, list[tuple[int, int]]]
"""modality -> (width, rows), most frequent first."""

_INFINITY = float("inf")
_MILLIS_ABOVE = 10**11
_LAST_SECOND = 253_402_300_799  # end of the year 9999
_FIRST_SECOND = -62_135_596_800  # start of the year 1


def widths(items: DataFrame, modalities: Iterable[str]) -> Widths:
    """How often each width occurs in a modality (the most frequent ones). Raises InputError for a modality without a column."""
    found: Widths = {}
    for modality in modalities:
        if modality not in items.columns:
            raise InputError(
                f"table items has no column {modality!r} (it has {', '.join(items.columns)}): add it, or take {modality!r} out of the configuration "
                "(features.content, behavior.source)"
            )
        found[modality] = []
    sizes = F.array(*(F.struct(F.lit(m).alias("modality"), F.array_size(m).alias("width"), F.col(m).isNotNull().alias("given")) for m in found))
    counted = items.select(F.inline(sizes)).filter("given").groupBy("modality", "width").count()
    for row in counted.orderBy(F.desc("count"), "width").limit(10 * max(len(found), 1)).collect():
        found[row["modality"]].append((row["width"], row["count"]))
    return found


def judge_items(items: DataFrame, widths: Widths) -> DataFrame:
    """``items`` with ``reason``: null for the rows that are accepted, one for each item. Of several rows of an item a faultless one is kept,
    the one with the smallest content hash. One exchange, by item_id."""
    kept = {modality: found[0][0] for modality, found in widths.items() if found}
    content = items.columns
    hashed = F.xxhash64(*content, *(F.col(name).isNull() for name in content))
    own = items.select("*", _vector_fault(kept).alias("_fault"), hashed.alias("_hash"))
    same = Window.partitionBy("item_id").orderBy(F.col("_fault").isNotNull(), "_hash")
    ranked = own.select("*", F.row_number().over(same).alias("_row"), F.rank().over(same).alias("_rank"))
    duplicate = (F.col("_rank") > 1) | (F.col("_fault").isNull() & (F.col("_row") > 1))  # identical faulty rows share one reason
    return ranked.select(*content, F.coalesce(_id_fault("item_id"), F.when(duplicate, "duplicate_item"), "_fault").alias("reason"))


def judge_events(interactions: DataFrame, accepted: DataFrame, now: datetime) -> DataFrame:
    """``interactions`` with ``time`` and ``reason`` (null where accepted). ``accepted``: the item_id of every accepted item."""
    known = interactions.join(accepted.select("item_id", F.lit(True).alias("_known")), "item_id", "left")
    text = F.nullif(F.trim("timestamp"), F.lit(""))
    timed = known.select(*interactions.columns, "_known", text.alias("_text"), parse_time(text).alias("time"))
    reason = F.coalesce(
        _id_fault("user_id"),
        _id_fault("item_id"),
        F.when(F.col("_known").isNull(), "unknown_item"),
        F.when(F.col("_text").isNull() & F.col("pos").isNull(), "no_order"),
        F.when(F.col("_text").isNotNull() & F.col("time").isNull(), "unparsable_timestamp"),
        F.when(F.col("time") > F.lit(now), "future_timestamp"),
    )
    return timed.select(*interactions.columns, "time", reason.alias("reason"))


def parse_time(text: Column) -> Column:
    """Timestamp of a text: an integer is unix seconds, or milliseconds above 10^11; anything else ISO 8601 from the year on. Null where neither."""
    number = F.when(text.rlike(r"^[+-]?\d+$"), text.try_cast("bigint"))
    seconds = F.when(number.between(_FIRST_SECOND, _MILLIS_ABOVE), F.timestamp_seconds(number))
    millis = F.when((number > _MILLIS_ABOVE) & (number <= _LAST_SECOND * 1000), F.timestamp_millis(number))
    return F.coalesce(seconds, millis, F.when(text.rlike(r"^\d{4}-"), F.try_to_timestamp(text)))


def clock(now: str | None) -> datetime:
    """``features.now`` (UTC where it names no zone), or this moment."""
    if now is None:
        return datetime.now(timezone.utc)
    try:
        moment = datetime.fromisoformat(now.replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(f"features.now is {now!r}: must be an ISO time such as 2024-05-01T00:00:00, or null for the clock") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def reasons(judged: DataFrame) -> dict[str | None, int]:
    """reason -> rows; None for the accepted ones."""
    return {row["reason"]: row["count"] for row in judged.groupBy("reason").count().collect()}


def refused(judged: DataFrame, table: str, columns: list[str], run: str) -> DataFrame:
    """Rows of ``rejected_rows``: the refused rows of a judged table, whole as JSON, identical ones counted."""
    rows = judged.filter(F.col("reason").isNotNull()).select("reason", F.to_json(F.struct(*columns), {"ignoreNullFields": "false"}).alias("row"))
    counted = rows.groupBy("reason", "row").agg(F.count("*").alias("copies"))
    return counted.select(F.lit(run).alias("run"), F.lit(table).alias("table"), F.sha2("row", 256).alias("row_hash"), "reason", "row", "copies")


def insist(table: str, counted: Mapping[str | None, int], limit: float, widths: Widths | None = None) -> None:
    """Raise InputError where more than ``limit`` of the rows were refused, or no row is left."""
    total, bad = sum(counted.values()), {reason: rows for reason, rows in counted.items() if reason}
    if not total:
        raise InputError(f"table {table} has no rows: check the source and import it again")
    listed = ", ".join(f"{reason}: {rows}" for reason, rows in sorted(bad.items()))
    if sum(bad.values()) / total > limit:
        raise InputError(
            f"table {table}: {sum(bad.values())} of {total} rows rejected, more than features.max_rejected {limit:g} ({listed}); "
            f"{_two_widths(widths or {})}look at them in table rejected_rows, then mend the source, or raise features.max_rejected"
        )
    if not counted.get(None):
        raise InputError(f"table {table}: none of its {total} rows was accepted ({listed}); look at them in table rejected_rows and mend the source")


def _two_widths(widths: Widths) -> str:
    mixed = {modality: found for modality, found in widths.items() if len(found) > 1}
    return "".join(
        f"{modality!r} has vectors of width {' and '.join(f'{width} ({rows} rows)' for width, rows in found[:2])}: embed all items with one model; "
        for modality, found in mixed.items()
    )


def _id_fault(column: str) -> Column:
    return F.when(F.col(column).isNull(), f"null_{column}").when(F.trim(column) == "", f"empty_{column}")


def _vector_fault(widths: Mapping[str, int]) -> Column:
    def any_of(test: Callable[[str], Column]) -> Column:
        return reduce(operator.or_, map(test, widths), F.lit(False))

    def non_finite(name: str) -> Column:
        # built-ins run as generated code, ten times as fast as a lambda; array_contains is null where an element is null, and NaN is the greatest value
        finite = ~F.array_contains(name, F.lit(_INFINITY).cast("float")) & (F.array_max(name) < _INFINITY) & (F.array_min(name) > -_INFINITY)
        return F.col(name).isNotNull() & ~F.coalesce(finite, F.lit(False))

    return (
        F.when(any_of(lambda name: F.array_size(name) != widths[name]), "wrong_dimension")
        .when(any_of(non_finite), "non_finite")
        .when(any_of(lambda name: (F.array_max(name) == 0) & (F.array_min(name) == 0)), "zero_vector")
    )
