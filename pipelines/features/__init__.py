"""The features stage (Spark): check the input, split it, measure the long tail, and join what a tokenizer reads."""

from __future__ import annotations

from typing import Literal

from adasid.config import Config
from pipelines.engines.tracking import Track
from pipelines.features import events, items


def run(cfg: Config, track: Track, part: Literal["auto", "events", "items"] = "auto") -> None:
    """Bring the stage's tables up to date. ``events`` needs items and interactions, ``items`` also behaviour embeddings; ``auto``
    does both as far as it can. Raises InputError for missing or unusable input."""
    worked = [events.build(cfg, track)] if part != "items" else []
    if part != "events":
        worked.append(items.build(cfg, track, required=part == "items"))
    if not any(worked):
        track.status = "up to date"
    row = track.lake.read("catalog_stats").to_pylist()[0]
    track.facts.update(
        {"items": row["items"], "users": row["users"], "events": row["interactions"], "rejected": sum(rows for _, rows in row["rejected"])}
    )
    if row.get("tied"):
        track.facts["tied in time"] = f"{row['tied'] / row['interactions']:.1%} of events"
    track.facts.update({"gini": round(row["gini"], 3), "head share": round(row["head_interactions"], 3)})
    if row["spearman"] is not None:
        track.facts.update({"spearman": round(row["spearman"], 3), "richness": row["richness_source"]})
