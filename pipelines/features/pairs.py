"""Mine co-engaged pairs of items from the training events (table ``item_pairs``), by co-occurrence or Swing (Yang et
al., arXiv 2010.05525; methods 4.1).

Work is bounded by the arrays that are paired: a user has at most ``max_user_items`` items and, for Swing, an item at
most ``max_item_users`` users, so Swing forms at most items x max_item_users^2 / 2 pairs of users, and from each of
those at most max_user_items^2 / 2 pairs of items. Both are counted before they are formed, and are at most
``max_rows``. Users are sampled by a hash of their index, the same for every item, so the samples of two items mostly
share users. No row has more than one such array, and nothing is collected.
"""

from __future__ import annotations

from collections.abc import Callable

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from adasid import tables
from adasid.config import Config, Pairs
from adasid.errors import InputError
from pipelines import stage
from pipelines.engines.lake import Lake
from pipelines.engines.spark import read, row_groups, session, write
from pipelines.engines.tracking import StageContext
from pipelines.features import layout
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage

TABLE = "item_pairs"
_SAMPLES = "ranking_samples"
_ROW_GROUP = 2**20
_ROW_BYTES = 40
"""A shuffled row has two users and an item, or two items and a weight, 8 bytes each, and its header, before
compression."""


def check(cfg: Config, lake: Lake) -> None:
    """Raise InputError unless ``item_pairs`` was computed from the newest events, with the config's settings."""
    if not stage.check_fresh(ITEM_PAIRS, cfg, lake):
        raise InputError(
            f"table {TABLE} does not exist, or was computed from other events or settings than this run's: run "
            "jobs/build_features.py again"
        )


def _build(inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg, lake = inputs.cfg, inputs.lake
    layout.check(lake, _SAMPLES)
    spark = session(cfg.spark, size=in_place.size(lake, *inputs.versions))
    try:
        mined = mine(read(spark, lake, _SAMPLES).filter("split = 'train'"), cfg.features.pairs, context.note)
        items = lake.open("item_stats").count()
        with row_groups(spark, _ROW_GROUP):  # a worker reads those of its items
            ordered = layout.by_index(mined, items, F.desc("score"), F.col("partner_index"))
            version = write(ordered, lake, TABLE, tables.ITEM_PAIRS, inputs.hash, sources=inputs.versions)
    finally:
        spark.catalog.clearCache()
    written = read(spark, lake, TABLE, version)
    pairs, paired = written.count(), written.select("item_index").distinct().count()
    share = paired / items
    context.metrics({"item_pairs": pairs, "paired_items": share})
    context.facts.update({"pairs": pairs, "items with pairs": round(share, 3)})
    return {TABLE: version}


ITEM_PAIRS = Stage(
    "item pairs",
    "spark",
    reads=lambda cfg: (_SAMPLES, "item_stats"),
    writes=lambda cfg: (TABLE,),
    settings=lambda cfg, lake: {"features.pairs": cfg.features.pairs.model_dump(mode="json")},
    body=_build,
    prefix="pairs",
)
"""Reads training events, writes co-engaged pairs of items."""


def mine(events: DataFrame, settings: Pairs, note: Callable[[str], None]) -> DataFrame:
    """Return item_index, partner_index, score, users: the best partners of every item. ``events``: user_index,
    item_index, position. A ``note`` says how much Swing will shuffle. Raises InputError where that is too much."""
    kept = histories(events, settings.max_user_items)
    scored = cooccurrence(kept) if settings.method == "cooccurrence" else swing(kept, settings, note)
    both = scored.filter(F.col("users") >= settings.min_users).select(
        F.inline(
            F.array(
                *(
                    F.struct(F.col(a).alias("item_index"), F.col(b).alias("partner_index"), "score", "users")
                    for a, b in ("ab", "ba")
                )
            )
        )
    )
    best = Window.partitionBy("item_index").orderBy(F.desc("score"), "partner_index")
    return both.select("*", F.row_number().over(best).alias("_n")).filter(F.col("_n") <= settings.per_item).drop("_n")


def histories(events: DataFrame, most: int) -> DataFrame:
    """Return user_index, item_index: the ``most`` latest items of each user with at least two."""
    by_user = Window.partitionBy("user_index")
    last = events.groupBy("user_index", "item_index").agg(F.max("position").alias("last"))
    recent = last.select("*", F.row_number().over(by_user.orderBy(F.desc("last"))).alias("_n")).filter(
        F.col("_n") <= most
    )
    return (
        recent.select("user_index", "item_index", F.count("*").over(by_user).alias("_items"))
        .filter("_items > 1")
        .drop("_items")
    )


def cooccurrence(kept: DataFrame) -> DataFrame:
    """Return a < b, score = number of users who have both, users."""
    items = kept.groupBy("user_index").agg(F.array_sort(F.collect_list("item_index")).alias("all"))
    counted = _two_of(items).groupBy("a", "b").agg(F.count("*").alias("users"))
    return counted.select("a", "b", F.col("users").cast("double").alias("score"), "users")


def swing(kept: DataFrame, settings: Pairs, note: Callable[[str], None]) -> DataFrame:
    """Return a < b, score = sum over pairs of users u < v who have both of 1 / (alpha + |I_u and I_v|), users.

    All terms, |I_u and I_v| too, are over the sampled users of an item. Sums are decimal: they do not depend on the
    order of rows.
    """
    chance = Window.partitionBy("item_index").orderBy(F.xxhash64("user_index"), "user_index")
    sampled = kept.select("*", F.row_number().over(chance).alias("_n")).filter(F.col("_n") <= settings.max_item_users)
    users = sampled.groupBy("item_index").agg(F.array_sort(F.collect_list("user_index")).alias("all")).persist()
    most = settings.max_item_users
    fewer = f"lower features.pairs.max_item_users (now {most}; half of it makes a quarter of the pairs)"
    _bound(users, "pairs of users of one item", fewer, settings, note)
    both = _two_of(users, "item_index").groupBy("a", "b").agg(F.array_sort(F.collect_list("item_index")).alias("all"))
    common = both.filter(F.size("all") > 1).persist()
    shorter = f"lower features.pairs.max_user_items (now {settings.max_user_items}) or max_item_users"
    _bound(common, "pairs of items of two users", shorter, settings, note)
    weight = (1 / (F.lit(settings.alpha) + F.size("all"))).cast("decimal(18,18)")  # below 1/2: at least two items
    weighted = common.select("all", weight.alias("weight"))
    summed = (
        _two_of(weighted, "weight")
        .groupBy("a", "b")
        .agg(F.sum("weight").cast("double").alias("score"), F.count("*").alias("n"))
    )
    return summed.select(
        "a", "b", "score", F.round((1 + F.sqrt(1 + 8 * F.col("n"))) / 2).cast("bigint").alias("users")
    )  # n = users (users - 1) / 2


def _bound(lists: DataFrame, what: str, fix: str, settings: Pairs, note: Callable[[str], None]) -> None:
    """Note how many pairs the elements of ``lists`` make. Raises InputError for more than ``max_rows``."""
    number = F.size("all").cast("bigint")
    row = lists.agg(F.sum(number * (number - 1) / 2).cast("bigint").alias("rows")).first()
    rows = (row and row["rows"]) or 0
    amount = f"{rows} {what}, up to {rows * _ROW_BYTES / 2**30:.3g} GiB to shuffle"
    if rows > settings.max_rows:
        raise InputError(
            f"features.pairs: swing would form {amount}, more than features.pairs.max_rows {settings.max_rows}: {fix}, "
            "set features.pairs.method: cooccurrence, or raise max_rows"
        )
    note(f"swing forms {amount}")


def _two_of(frame: DataFrame, *columns: str) -> DataFrame:
    """Return ``columns`` with every two elements ``a``, ``b`` of the array ``all``, in the array's order."""
    first = frame.select(*columns, "all", F.posexplode("all").alias("at", "a"))
    return first.select(*columns, "a", F.explode(F.slice("all", F.col("at") + 2, F.size("all"))).alias("b"))
