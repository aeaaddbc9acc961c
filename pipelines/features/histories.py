"""Clean events in order: de-duplication, k-core, position and split; and the sequences made of them. Everything here stays
within the partitions of a frame that is hash-partitioned by user, except the k-core's join on items."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from adasid.config import Features
from adasid.errors import InputError
from adasid.tables import RANKING_ONLY
from pipelines.features.ranks import rank_by, values_at

EVENT = ("user_id", "item_id", "time", "pos", "rating")
_ORDER = ("time", "pos", "item_id", "rating")


def deduplicate(events: DataFrame, how: str) -> DataFrame:
    """Keep the first of the events that ``features.deduplicate`` calls equal. Events without time are told apart by ``pos``."""
    if how == "none":
        return events
    moment = [] if how == "pair" else [F.col("time"), F.when(F.col("time").isNull(), F.col("pos"))]
    same = Window.partitionBy("user_id", "item_id", *moment).orderBy(*_ORDER)
    return events.select("*", F.row_number().over(same).alias("_copy")).filter("_copy = 1").drop("_copy")


def k_core(events: DataFrame, least: int, rounds: int) -> tuple[DataFrame, bool]:
    """Drop users and items with fewer than ``least`` events until nothing changes; the second value tells whether that was
    seen within ``rounds``. ``events`` should be cheap to read again (a checkpoint)."""
    size = events.count()
    for _ in range(rounds):
        users = events.select("*", F.count("*").over(Window.partitionBy("user_id")).alias("_n")).filter(F.col("_n") >= least).drop("_n")
        items = users.groupBy("item_id").count().filter(F.col("count") >= least)
        events = users.join(items, "item_id", "left_semi").select(*events.columns).localCheckpoint()
        before, size = size, events.count()
        if size == before:
            return events, True
    return events, False


def order(events: DataFrame, features: Features) -> DataFrame:
    """``events`` with ``position`` (0-based place in the user's history), ``split`` and ``ranking_split``. Both say ``train`` of the events that
    neither holds out: what embeddings, counts and SIDs are made of. ``split`` is null where only ranking holds an event out."""
    own = Window.partitionBy("user_id")
    placed = events.select("*", (F.row_number().over(own.orderBy(*_ORDER)) - 1).cast("bigint").alias("position"))
    if features.split == "global_time":
        split = _by_time(events, (features.holdout, features.holdout), "split", "holdout", "leave_one_out")
    else:
        placed = placed.select("*", F.count("*").over(own).alias("_n"))
        left = F.when(F.col("_n") >= 3, F.col("_n") - F.col("position"))
        split = F.when(left == 1, "test").when(left == 2, "validation")
    own_split = F.coalesce(split, F.lit("train"))
    if features.ranking_split != "global_time":
        return placed.select(*events.columns, "position", own_split.alias("split"), own_split.alias("ranking_split"))
    later = _by_time(events, features.ranking_holdout, "ranking_split", "ranking_holdout", "same")
    kept = F.when(split.isNotNull() | later.isNull(), own_split)
    ranking = F.coalesce(later, F.when(split.isNotNull(), RANKING_ONLY), F.lit("train"))
    return placed.select(*events.columns, "position", kept.alias("split"), ranking.alias("ranking_split"))


def _by_time(events: DataFrame, shares: tuple[float, float], key: str, share_key: str, other: str) -> Column:
    """``validation`` and ``test`` of the events in the last two ``shares`` by time, null before; events of one time stay together, in the later part."""
    ranked = rank_by(events.select(F.unix_micros("time").alias("at")), F.asc("at"))
    first, second = (max(ranked.size - max(round(share * ranked.size), 1), 0) for share in (sum(shares), shares[1]))
    times = values_at(ranked, "at", (0, first, second))
    if times[first] == times[0]:
        raise InputError(
            f"features.{key} is 'global_time' but the last {sum(shares):g} of the {ranked.size} events begin at the first time there is: "
            f"no training part is left; lower features.{share_key}, or set features.{key}: {other}"
        )
    moment = F.unix_micros("time")
    return F.when(moment >= times[second], "test").when(moment >= times[first], "validation")


def sequences(indexed: DataFrame, max_length: int) -> DataFrame:
    """user_id, split, history, target of every user with something to learn or to predict. ``indexed`` has item_index, position, split."""
    history = F.transform(F.array_sort(F.collect_list(F.struct("position", "item_index"))), lambda event: event["item_index"])

    def first(split: str) -> Column:
        return F.min(F.when(F.col("split") == split, F.col("position"))).cast("int")

    users = indexed.groupBy("user_id").agg(
        history.alias("items"),
        F.count_if(F.col("split") == "train").cast("int").alias("train"),
        first("validation").alias("validation"),
        first("test").alias("test"),
    )

    def last(most: int, end: Column) -> Column:
        start = F.greatest(end - most, F.lit(0))
        return F.slice("items", start + 1, end - start)

    nothing = F.lit(None).cast("bigint")
    rows = [
        F.when(
            F.col("train") >= 2,
            F.struct(F.lit("train").alias("split"), last(max_length + 1, F.col("train")).alias("history"), nothing.alias("target")),
        )
    ]
    for split in ("validation", "test"):
        at = F.col(split)
        rows.append(F.when(at >= 1, F.struct(F.lit(split).alias("split"), last(max_length, at).alias("history"), F.get("items", at).alias("target"))))
    return users.select("user_id", F.inline(F.array_compact(F.array(*rows))))
