"""Validate the two input tables. A row that fails goes to ``rejected_rows`` with the first reason that applies."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from adasid.datasets import columns, units
from adasid.errors import ConfigError, InputError

Widths = dict[str, list[tuple[int, int]]]
"""Maps modality -> (width, rows), most frequent first."""

COPY = "identical_copy"
"""A row that equals an accepted row in every column has this reason. It is dropped and counted, not rejected."""

_INFINITY = float("inf")
_LAST_SECOND = 253_402_300_799  # end of the year 9999
_FIRST_SECOND = -62_135_596_800  # start of the year 1
_UNITS = ((10**11, 10**6), (10**14, 10**3), (10**17, 1))
"""A unix time up to the first value is in the unit of that many microseconds: seconds, milliseconds, microseconds;
above all of them, nanoseconds."""
_WIDTHS = 10
"""At most this many widths of a modality are collected."""
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?$"
_PLAIN = r"^[\x21-\x7e]+\z"
_TIMES = {"implausible_timestamp", "unparsable_timestamp", "future_timestamp"}
_BREAKS = r"[\p{Cc}\u2028\u2029]"
"""These are the characters at which some reader of text files ends a line, and all other invisible ones."""


def widths(items: DataFrame, modalities: Iterable[str]) -> Widths:
    """Count the rows of each width of a modality (the most frequent ones). Raises InputError for a modality without a
    column."""
    widths_found: Widths = {}
    for modality in modalities:
        if modality not in items.columns:
            raise InputError(
                f"table items has no column {modality!r} (it has {', '.join(items.columns)}): add it, or take "
                f"{modality!r} out of the configuration "
                "(features.content, behavior.source)"
            )
        widths_found[modality] = []
    sizes = F.create_map(*(part for m in widths_found for part in (F.lit(m), F.col(f"_{m}"))))
    widest = items.groupBy(*(F.array_size(present(m)).alias(f"_{m}") for m in widths_found)).count()
    counted = (
        widest.select(F.explode(sizes).alias("modality", "width"), "count")
        .filter("width IS NOT NULL")
        .groupBy("modality", "width")
        .agg(F.sum("count").alias("count"))
    )
    often = Window.partitionBy("modality").orderBy(F.desc("count"), "width")
    rows = counted.select("*", F.row_number().over(often).alias("rank")).filter(F.col("rank") <= _WIDTHS)
    for row in rows.orderBy("modality", "rank").collect():
        widths_found[row["modality"]].append((row["width"], row["count"]))
    return widths_found


def present(modality: str) -> Column:
    """Return the vector of a modality; null for an empty and for a zero vector, which mean that the item lacks it."""
    # built-ins run as generated code, ten times as fast as a lambda; min and max skip nulls, which are faults and not
    # zeros
    zero = (
        (F.array_max(modality) == 0)
        & (F.array_min(modality) == 0)
        & (F.array_size(F.array_compact(modality)) == F.array_size(modality))
    )
    return F.when((F.array_size(modality) > 0) & ~F.coalesce(zero, F.lit(False)), F.col(modality))


def judge_items(items: DataFrame, widths: Widths, *figures: Column) -> DataFrame:
    """Add ``reason`` to ``items``: null for the accepted rows, one for each item. Of several rows of an item the valid
    one with the smallest content hash is accepted; rows that equal it are copies. One exchange, by item_id.
    ``figures``: further columns, computed before the exchange, which moves no vector that nothing else needs."""
    kept = {modality: found[0][0] for modality, found in widths.items() if found}
    content = items.columns
    hashed = F.xxhash64(*content, *(F.col(name).isNull() for name in content))
    checked = items.select("*", *figures, _vector_fault(kept).alias("_fault"), hashed.alias("_hash"))
    added = [name for name in checked.columns if name not in {*content, "_fault", "_hash"}]
    same = Window.partitionBy("item_id").orderBy(F.col("_fault").isNotNull(), "_hash")
    ranked = checked.select("*", F.row_number().over(same).alias("_row"), F.rank().over(same).alias("_rank"))
    duplicate = (F.col("_rank") > 1) | (
        F.col("_fault").isNull() & (F.col("_row") > 1)
    )  # identical faulty rows share one reason
    why = F.when(F.col("_rank") > 1, "duplicate_item").otherwise(COPY)
    reason = F.coalesce(_id_fault("item_id"), F.when(duplicate, why), "_fault")
    return ranked.select(*content, *added, reason.alias("reason"))


def judge_events(interactions: DataFrame, accepted: DataFrame, now: datetime, first_year: int) -> DataFrame:
    """Add ``time``, ``reason`` (null where accepted) and the columns of ``accepted`` to ``interactions``. ``accepted``:
    the item_id of every accepted item, and columns to add. An event before ``first_year`` or after ``now`` has a time
    in another unit, or none. The id of an accepted item was checked with the item."""
    known = interactions.join(accepted.select("*", F.lit(True).alias("_known")), "item_id", "left")
    columns = [*interactions.columns, *(name for name in accepted.columns if name != "item_id")]
    text = F.nullif(F.trim("timestamp"), F.lit(""))
    texts = known.select(*columns, "_known", text.alias("_text"), text.try_cast("bigint").alias("_whole"))
    time = F.coalesce(_parse_whole(F.col("_text"), F.col("_whole")), parse_time(F.col("_text")))
    timed = texts.select("*", time.alias("time"))
    reason = F.coalesce(
        _id_fault("user_id"),
        F.when(F.col("_known").isNull(), F.coalesce(_id_fault("item_id"), F.lit("unknown_item"))),
        F.when(F.col("_text").isNull() & F.col("pos").isNull(), "no_order"),
        F.when(F.col("_text").isNotNull() & F.col("time").isNull(), "unparsable_timestamp"),
        F.when(F.col("time") < F.lit(datetime(first_year, 1, 1, tzinfo=timezone.utc)), "implausible_timestamp"),
        F.when(F.col("time") > F.lit(now), "future_timestamp"),
        F.when(~F.col("label").isin(0.0, 1.0), "invalid_label"),
        F.when(F.abs("rating") == _INFINITY, "invalid_rating"),
    )
    return timed.select(*columns, "time", reason.alias("reason"))


def parse_time(text: Column) -> Column:
    """Parse the timestamp of a text. A number is a unix time, with or without a fraction, in seconds, milliseconds,
    microseconds or nanoseconds by its size; anything else is ISO 8601 that starts with the year. Null where neither."""
    number = F.when(text.rlike(_NUMBER), text.try_cast("decimal(38,9)"))
    micros = F.when(F.abs(number) <= 9 * 10**18, _micros(number))  # within 64 bits
    inside = micros.between(_FIRST_SECOND * 10**6, _LAST_SECOND * 10**6)
    return F.coalesce(
        F.when(inside, F.timestamp_micros(micros)), F.when(text.rlike(r"^\d{4}-"), F.try_to_timestamp(text))
    )


def _parse_whole(text: Column, whole: Column) -> Column:
    """Return :func:`parse_time` where the text is the number ``whole`` as it is printed, not in nanoseconds, as nearly
    all times are: ten times as fast as by a pattern and decimals. Null for any other text."""
    return F.when((whole >= _FIRST_SECOND) & (whole.cast("string") == text), F.timestamp_micros(whole * _rate(whole)))


def _micros(number: Column) -> Column:
    """Return a unix time in microseconds."""
    return F.coalesce((number * _rate(F.abs(number))).cast("bigint"), (number / 1000).cast("bigint"))


def _rate(size: Column) -> Column:
    """Return the microseconds in the unit of a unix time of this ``size``; null for nanoseconds."""
    rate = F.when(size <= _UNITS[0][0], _UNITS[0][1])
    for most, factor in _UNITS[1:]:
        rate = rate.when(size <= most, factor)
    return rate


def clock(now: str | None) -> datetime:
    """Return ``features.now`` (UTC where it names no zone), or the current time. Raises ConfigError for an invalid
    time."""
    if now is None:
        return datetime.now(timezone.utc)
    try:
        moment = datetime.fromisoformat(now.replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(
            f"features.now is {now!r}: must be an ISO time such as 2024-05-01T00:00:00, or null for the clock"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def reasons(judged: DataFrame, *figures: Column) -> dict[str | None, dict[str, Any]]:
    """Return reason -> ``rows`` and the aggregates ``figures`` of these rows; None for the accepted ones."""
    counted = judged.groupBy("reason").agg(F.count("*").alias("rows"), *figures)
    return {row["reason"]: row.asDict() for row in counted.collect()}


def odd(column: str | Column) -> Column:
    """Return whether an id has a character beyond printable ASCII, so that it may differ from another only in blanks
    or Unicode form."""
    value = F.col(column) if isinstance(column, str) else column
    return value.rlike(r"[^\x21-\x7e]")


def refused(judged: DataFrame, table: str, columns: list[str], run: str) -> DataFrame:
    """Return rows of ``rejected_rows``: the rejected rows of a validated table, whole as JSON, identical ones
    counted."""
    rows = judged.filter(F.col("reason") != COPY).select(
        "reason", F.to_json(F.struct(*columns), {"ignoreNullFields": "false"}).alias("row")
    )
    counted = rows.groupBy("reason", "row").agg(F.count("*").alias("copies"))
    return counted.select(
        F.lit(run).alias("input_hash"),
        F.lit(table).alias("table"),
        F.sha2("row", 256).alias("row_hash"),
        "reason",
        "row",
        "copies",
    )


def advice(judged: DataFrame, counted: Mapping[str | None, int], first_year: int, now: datetime) -> str:
    """Return an example of each kind of rejected time, and what it may mean; empty where there was none."""
    kinds = sorted(_TIMES & {reason for reason in counted if reason})
    if not kinds:
        return ""
    counts = (
        judged.filter(F.col("reason").isin(kinds))
        .groupBy("reason")
        .agg(F.max(F.trim("timestamp")).alias("text"))
        .collect()
    )
    parts = {row["reason"]: units.explain(row["text"], first_year, now) for row in counts}
    return "; ".join(f"{kind.removesuffix('_timestamp')}: {parts[kind]}" for kind in kinds)


def alike(ids: DataFrame) -> str | None:
    """Describe ids (the one column of ``ids``, some of them :func:`odd`) that differ from another one only in blanks at
    their ends or in Unicode's form (NFC); None for none."""
    (name,) = ids.columns
    plain = ids.filter(odd(name)).distinct().mapInArrow(columns.plain_ids, "id string, plain string").persist()
    others = ids.join(plain.select(F.col("plain").alias(name)).distinct(), name, "left_semi").distinct()
    every = plain.union(others.select(F.col(name).alias("id"), F.col(name).alias("plain"))).distinct()
    groups = (
        every.groupBy("plain")
        .agg(F.countDistinct("id").alias("n"), F.min("id").alias("one"), F.max("id").alias("other"))
        .filter("n > 1")
    )
    row = groups.agg(F.count("*").alias("groups"), F.min(F.struct("one", "other")).alias("first")).first()
    if row is None or not row["groups"]:
        return None
    first = row["first"]
    return (
        f"{row['groups']} groups of {name} differ in blanks or Unicode form only (first: {first['one']!a} and "
        f"{first['other']!a}): "
        "trim and normalize them (NFC) in the source if they mean the same"
    )


def insist_vectors(widths: Widths) -> None:
    """Raise InputError where no item has a vector of a modality."""
    for modality, groups in widths.items():
        if not groups:
            raise InputError(
                f"table items: no item has a vector in column {modality!r} (empty and zero vectors do not count): "
                f"bring some, or take {modality!r} out of the "
                "configuration (features.content, behavior.source)"
            )


def insist(
    table: str, counted: Mapping[str | None, int], limit: float, widths: Widths | None = None, advice: str = ""
) -> None:
    """Raise InputError where more than ``limit`` of the rows were rejected, those that ingest could not parse among
    them, or no row is left."""
    total, bad = sum(counted.values()), {reason: rows for reason, rows in counted.items() if reason}
    if not total:
        raise InputError(f"table {table} has no rows: check the source and import it again")
    listed = ", ".join(f"{reason}: {rows}" for reason, rows in sorted(bad.items()))
    if sum(bad.values()) / total > limit:
        raise InputError(
            f"table {table}: {sum(bad.values())} of {total} rows rejected, more than features.max_rejected {limit:g} "
            f"({listed}); "
            f"{_two_widths(widths or {})}{advice and advice + '; '}look at them in table rejected_rows, then mend the "
            "source, or raise features.max_rejected"
        )
    if not counted.get(None):
        raise InputError(
            f"table {table}: none of its {total} rows was accepted ({listed}); look at them in table rejected_rows and "
            "mend the source"
        )


def _two_widths(widths: Widths) -> str:
    mixed = {modality: found for modality, found in widths.items() if len(found) > 1}
    return "".join(
        f"{modality!r} has vectors of width {' and '.join(f'{width} ({rows} rows)' for width, rows in found[:2])}: "
        "embed all items with one model; "
        for modality, found in mixed.items()
    )


def _id_fault(column: str) -> Column:
    plain = F.col(column).rlike(_PLAIN)  # nearly all ids have no fault, by one expression
    faults = F.when(F.col(column).isNull(), f"null_{column}").when(~F.is_valid_utf8(column), f"not_utf8_{column}")
    faults = faults.when(F.col(column).rlike(r"^[\s\p{Z}]*$"), f"empty_{column}").when(
        F.col(column).rlike(_BREAKS), f"control_character_{column}"
    )
    return F.when(~F.coalesce(plain, F.lit(False)), faults)


def _vector_fault(widths: Mapping[str, int]) -> Column:
    def any_of(test: Callable[[str], Column]) -> Column:
        return reduce(operator.or_, map(test, widths), F.lit(False))

    def non_finite(name: str) -> Column:
        # array_contains is null where an element is null, and NaN is the greatest value
        finite = (
            ~F.array_contains(name, F.lit(_INFINITY).cast("float"))
            & (F.array_max(name) < _INFINITY)
            & (F.array_min(name) > -_INFINITY)
        )
        return present(name).isNotNull() & ~F.coalesce(finite, F.lit(False))

    return F.when(any_of(lambda name: F.array_size(present(name)) != widths[name]), "wrong_dimension").when(
        any_of(non_finite), "non_finite"
    )
