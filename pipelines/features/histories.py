"""Order clean events (de-duplication, k-core, position, split) and build sequences from them.

Everything stays within the partitions of a frame that is hash-partitioned by user, except the k-core's join on items.
``by`` are the columns that identify a user.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from adasid.config import Features
from adasid.errors import InputError
from adasid.tables import RANKING_ONLY
from pipelines.features.layout import ITEM
from pipelines.features.ranks import rank_by, values_at

CHANCE = "_chance"
EVENT = ("user_id", ITEM, "time", "pos", CHANCE, "rating", "label", "in_history")
_BY = ("user_id",)


def chance(seed: int) -> Column:
    """Return the seeded hash that breaks ties of an event's time: an order by id could be learned."""
    return F.xxhash64(F.lit(seed), "user_id", "time", "item_id").alias(CHANCE)


def sums() -> list[Column]:
    """Return the aggregate of accepted events that says whether :func:`deduplicate_sorted` may be used: ``twofold``,
    the number of those with both time and pos."""
    return [F.count_if(F.col("time").isNotNull() & F.col("pos").isNotNull()).alias("twofold")]


def chronological() -> tuple[Column, ...]:
    """Return the order of a user's events: time, then pos, then :func:`chance`."""
    return *map(F.col, ("time", "pos", CHANCE, ITEM)), F.desc("in_history"), F.desc("label"), F.col("rating")


def deduplicate(events: DataFrame, how: str, by: Sequence[str] = _BY) -> DataFrame:
    """Keep the first of the events that ``features.deduplicate`` calls equal. Events without time differ by ``pos``. An
    impression never equals a later visit of the same item; a visit at the same time replaces it."""
    if how == "none":
        return events
    moment = [F.col("in_history")] if how == "pair" else [F.col("time"), F.when(F.col("time").isNull(), F.col("pos"))]
    first = F.desc("in_history"), F.col("time"), F.col("pos"), F.desc("label"), F.col("rating")
    same = Window.partitionBy(*by, ITEM, *moment).orderBy(*first)
    return events.select("*", F.row_number().over(same).alias("_copy")).filter("_copy = 1").drop("_copy")


def deduplicate_sorted(events: DataFrame, by: Sequence[str] = _BY) -> DataFrame:
    """De-duplicate ``exact`` events of which none has both time and pos. Equal ones are neighbours in the chronological
    order, for which :func:`order` then does not sort again."""
    key = F.struct(ITEM, "time", "pos")
    before = F.lag(key).over(Window.partitionBy(*by).orderBy(*chronological()))
    return events.select("*", before.eqNullSafe(key).alias("_copy")).filter("NOT _copy").drop("_copy")


def cap(events: DataFrame, most: int, by: Sequence[str] = _BY) -> DataFrame:
    """Keep the latest ``most`` events of every user."""
    latest = Window.partitionBy(*by).orderBy(*chronological())
    last = F.count("*").over(Window.partitionBy(*by)) - F.row_number().over(latest)
    return events.select("*", last.alias("_later")).filter(F.col("_later") < most).drop("_later")


def k_core(events: DataFrame, least: int, rounds: int) -> tuple[DataFrame, bool]:
    """Drop users and items with fewer than ``least`` events until nothing changes; the second value says whether that
    converged within ``rounds``. ``events`` should be cheap to read again (a checkpoint)."""
    size = events.count()
    for _ in range(rounds):
        users = (
            events.select("*", F.count("*").over(Window.partitionBy("user_id")).alias("_n"))
            .filter(F.col("_n") >= least)
            .drop("_n")
        )
        items = users.groupBy(ITEM).count().filter(F.col("count") >= least)
        events = users.join(items, ITEM, "left_semi").select(*events.columns).localCheckpoint()
        before, size = size, events.count()
        if size == before:
            return events, True
    return events, False


def order(events: DataFrame, features: Features, by: Sequence[str] = _BY, slates: bool = True) -> DataFrame:
    """Add ``position`` (0-based rank among the user's events), ``place`` (the same among those ``in_history``),
    ``tied`` (whether another event has the same time and pos), ``split`` and ``ranking_split``. Both are ``train`` for
    the events that neither holds out: embeddings, counts and SIDs are computed from these. ``split`` is null where only
    ranking reads an event. An event outside histories is split with the user's last visit at its time, else with the
    next one. ``slates``: whether there may be such events."""
    ordered = Window.partitionBy(*by).orderBy(*chronological())
    visits = F.sum(F.col("in_history").cast("bigint"))
    moment = F.struct("time", "pos")
    same = [neighbour(moment).over(ordered).eqNullSafe(moment) for neighbour in (F.lag, F.lead)]
    placed = events.select(
        "*",
        (F.row_number().over(ordered) - 1).cast("bigint").alias("position"),
        (visits.over(ordered.rowsBetween(Window.unboundedPreceding, 0)) - F.col("in_history").cast("bigint")).alias(
            "place"
        ),
        (same[0] | same[1]).alias("tied"),
        visits.over(ordered.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)).alias("_n"),
    )
    columns = [*events.columns, "position", "place", "tied"]
    place = F.col("place")
    if slates:
        # all impressions of a slate are split as its last visit: none is trained on where a click is tested
        shown = F.max(F.when(F.col("in_history"), F.col("place"))).over(Window.partitionBy(*by, "time"))
        place = F.when(F.col("in_history") | F.col("time").isNull(), place).otherwise(F.coalesce(shown, "place"))
    if features.split == "global_time":
        visited = events.filter("in_history")
        held_out = _by_time(visited, (features.holdout, features.holdout), "split", "holdout", "leave_one_out")
    else:
        left = F.when(F.col("_n") >= 3, F.col("_n") - F.least(place, F.col("_n") - 1))
        held_out = F.when(left == 1, "test").when(left == 2, "validation")
    split = F.coalesce(held_out, F.lit("train"))
    if features.ranking_split != "global_time":
        ranking = F.when(~F.col("in_history") & (split == "train"), RANKING_ONLY).otherwise(split)
        return placed.select(
            *columns, F.when(F.col("in_history"), split).alias("split"), ranking.alias("ranking_split")
        )
    later = _by_time(events, features.ranking_holdout, "ranking_split", "ranking_holdout", "same")
    kept = F.when(F.col("in_history") & (held_out.isNotNull() | later.isNull()), split)
    ranking = F.coalesce(later, F.when(held_out.isNotNull() | ~F.col("in_history"), RANKING_ONLY), F.lit("train"))
    return placed.select(*columns, kept.alias("split"), ranking.alias("ranking_split"))


def _by_time(events: DataFrame, shares: tuple[float, float], key: str, share_key: str, other: str) -> Column:
    """Return ``validation`` and ``test`` for the events in the last two ``shares`` by time, null before; events of one
    time stay together, in the later part. Raises InputError where no training part is left."""
    ranked = rank_by(events.select(F.unix_micros("time").alias("at")), F.asc("at"))
    first, second = (max(ranked.size - max(round(share * ranked.size), 1), 0) for share in (sum(shares), shares[1]))
    times = values_at(ranked, "at", (0, first, second))
    if times[first] == times[0]:
        raise InputError(
            f"features.{key} is 'global_time' but the last {sum(shares):g} of the {ranked.size} events begin at the "
            "earliest time: "
            f"no training part is left; lower features.{share_key}, or set features.{key}: {other}"
        )
    moment = F.unix_micros("time")
    return F.when(moment >= times[second], "test").when(moment >= times[first], "validation")


def sequences(indexed: DataFrame, max_length: int, by: Sequence[str] = _BY) -> DataFrame:
    """Return ``by``, user_id, split, history, target of every user with something to learn or to predict. ``indexed``
    has item_index, place, in_history, split. A partition that is in the order of ``by`` is not sorted again, and its
    users stay in that order."""
    history = F.sort_array(F.collect_list(F.struct("place", "item_index")))["item_index"]

    def first(split: str) -> Column:
        return F.min(F.when(F.col("split") == split, F.col("place"))).cast("int")

    users = (
        indexed.filter("in_history")
        .groupBy(*by)
        .agg(
            F.first("user_id").alias("_user"),
            history.alias("items"),
            F.count_if(F.col("split") == "train").cast("int").alias("train"),
            first("validation").alias("validation"),
            first("test").alias("test"),
        )
    )

    def last(most: int, end: Column) -> Column:
        start = F.greatest(end - most, F.lit(0))
        return F.slice("items", start + 1, end - start)

    nothing = F.lit(None).cast("bigint")
    rows = [
        F.when(
            F.col("train") >= 2,
            F.struct(
                F.lit("train").alias("split"),
                last(max_length + 1, F.col("train")).alias("history"),
                nothing.alias("target"),
            ),
        )
    ]
    for split in ("validation", "test"):
        at = F.col(split)
        rows.append(
            F.when(
                at >= 1,
                F.struct(
                    F.lit(split).alias("split"),
                    last(max_length, at).alias("history"),
                    F.get("items", at).alias("target"),
                ),
            )
        )
    keys = [name for name in by if name != "user_id"]
    return users.sortWithinPartitions(*by).select(
        *keys, F.col("_user").alias("user_id"), F.inline(F.array_compact(F.array(*rows)))
    )
