"""Label events as positive, negative or neither, and decide whether they belong to the user's history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from adasid.config import Features
from adasid.errors import InputError


def sums() -> list[Column]:
    """Return the aggregates of accepted events that :func:`labelled` needs."""
    rated = F.when(F.col("label").isNull(), F.col("rating"))
    return [
        F.count("label").alias("labels"),
        F.count(rated).alias("ratings"),
        F.max(rated).alias("highest"),
        F.sum("label").alias("positive"),
    ]


def labelled(events: DataFrame, features: Features, totals: Mapping[str, Any]) -> DataFrame:
    """Add ``label`` (1, 0, or null for an event that is neither labelled nor rated where others are) and
    ``in_history``.

    A label counts as it is; a rating is positive above ``features.positive_rating``; where nothing is labelled or
    rated, every event is positive. ``totals``: the values of :func:`sums`. Raises InputError where no event would be
    positive.
    """
    limit = float(np.float32(features.positive_rating))  # ratings are float32: one of 3.9 is above the double 3.9
    if totals["ratings"] and totals["highest"] <= limit:
        fix = "call the column 'label' if 1 means positive, or set" if totals["highest"] <= 1 else "set"
        raise InputError(
            f"table interactions: the highest rating is {totals['highest']:g}, not above features.positive_rating "
            f"{features.positive_rating:g}, so no rated event is positive: "
            f"{fix} features.positive_rating below it"
        )
    if totals["labels"] and not totals["positive"] and not totals["ratings"]:
        raise InputError(
            "table interactions: all labels are 0, so no event is positive: bring positive events, or leave the column "
            "out"
        )
    unsaid = F.lit(None).cast("int") if totals["labels"] or totals["ratings"] else F.lit(1)
    given = F.when(F.col("label").isNotNull(), F.col("label").cast("int"))
    label = F.coalesce(given, (F.col("rating") > limit).cast("int"), unsaid)
    shown = {
        "auto": ~F.coalesce(given == 0, F.lit(False)),
        "all": F.lit(True),
        "positive": F.coalesce(label, F.lit(1)) == 1,
    }[features.histories]
    return events.withColumn("in_history", shown).withColumn("label", label)


def outside(features: Features, totals: Mapping[str, Any]) -> bool:
    """Return whether :func:`labelled` can leave events outside histories."""
    if features.histories == "positive":
        return bool(totals["labels"] or totals["ratings"])
    return features.histories == "auto" and totals["labels"] > (totals["positive"] or 0)
