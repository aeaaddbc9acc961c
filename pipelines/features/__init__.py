"""The features stages (Spark): check the input, split it, measure the long tail, and join what a tokenizer reads."""

from __future__ import annotations

from typing import Literal

from adasid.config import Config
from adasid.errors import InputError
from pipelines import stage
from pipelines.engines.tracking import Track
from pipelines.features import events, items, pairs


def run(cfg: Config, track: Track, part: Literal["auto", "events", "items"] = "auto") -> None:
    """Bring the tables up to date. ``events`` needs items and interactions, ``items`` also behaviour embeddings;
    ``auto`` does both as far as it can. Raises InputError for missing or unusable input."""
    worked = False
    if part != "items":
        worked = stage.run(events.EVENTS, cfg, track) is not None
        if cfg.tokenizer.pairs:
            worked = stage.run(pairs.ITEM_PAIRS, cfg, track) is not None or worked
    if part != "events":
        if text := items.missing(cfg, track.lake):
            if part == "items":
                raise InputError(text)
            track.note(text)
        else:
            worked = stage.run(items.ITEM_FEATURES, cfg, track) is not None or worked
    if not worked:
        track.status = "up to date"
    _summarize(track)


def _summarize(track: Track) -> None:
    row = track.lake.read("catalog_stats").to_pylist()[0]
    rejected = sum(rows for _, rows in row["rejected"])
    track.facts.update({"items": row["items"], "users": row["users"], "events": row["interactions"], "rejected": rejected})
    if row.get("tied"):
        track.facts["tied in time"] = f"{row['tied'] / row['interactions']:.1%} of events"
    track.facts.update({"gini": round(row["gini"], 3), "head share": round(row["head_interactions"], 3)})
    if richness := items.richness(track.lake):
        track.facts.update({"spearman": round(richness["spearman"], 3), "richness": richness["richness_source"]})
