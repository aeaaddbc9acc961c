"""Rank the items that share a SID."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F


def ranked(
    encoded: DataFrame,
    tokenizer: str,
    generation: int,
    untouched: DataFrame | None = None,
    before: DataFrame | None = None,
) -> DataFrame:
    """Add the collision rank among the items of one SID. An item that has the codes of its row in ``before`` [item_id,
    codes, collision_rank] retains its rank. The others rank after those, and after the items of ``untouched`` [codes,
    collision_rank] with the same SID; among themselves by (interactions desc, item_id)."""
    previous, first = F.lit(None).cast("int"), F.lit(0)
    if before is not None:
        encoded = encoded.join(
            before.select("item_id", "codes", F.col("collision_rank").alias("_previous")), ["item_id", "codes"], "left"
        )
        previous = F.col("_previous")
        first = F.coalesce(F.max(previous).over(Window.partitionBy("codes")) + 1, first)
    if untouched is not None:
        same = untouched.join(encoded.select("codes").distinct(), "codes", "left_semi")
        encoded = encoded.join(
            same.groupBy("codes").agg((F.max("collision_rank") + 1).alias("_first")), "codes", "left"
        )
        first = F.greatest(first, F.coalesce("_first", F.lit(0)))
    order = Window.partitionBy("codes").orderBy(previous.isNotNull(), F.desc("interactions"), "item_id")
    rank = F.coalesce(previous, first + F.row_number().over(order) - 1).alias("collision_rank")
    return encoded.select("*", rank, F.lit(tokenizer).alias("tokenizer"), F.lit(generation).alias("generation"))
