"""Run the features stages (Spark): check the input, split it, measure the long tail, and join a tokenizer's inputs."""

from __future__ import annotations

from typing import Literal

from adasid.config import Config
from adasid.errors import InputError
from pipelines import stage
from pipelines.content import vectors
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.features import events, items, pairs


def run(cfg: Config, context: StageContext, part: Literal["auto", "events", "items"] = "auto") -> None:
    """Bring the tables up to date. ``events`` needs items and interactions, ``items`` also behaviour embeddings;
    ``auto`` does both as far as possible. Raises InputError for missing or unusable input."""
    worked, lake = False, Lake(context.lake.root, cfg.pins)
    if lake.exists(vectors.ENCODERS):
        vectors.check(cfg, lake)  # also where the tables are up to date: their input hash does not know the config's
    if part != "items":
        worked = stage.run(events.EVENTS, cfg, context) is not None
        if cfg.tokenizer.pairs:
            worked = stage.run(pairs.ITEM_PAIRS, cfg, context) is not None or worked
    if part != "events":
        if text := items.missing(cfg, context.lake):
            if part == "items":
                raise InputError(text)
            context.note(text)
        else:
            worked = stage.run(items.ITEM_FEATURES, cfg, context) is not None or worked
    if not worked:
        context.status = "up to date"
    _summarize(context)


def _summarize(context: StageContext) -> None:
    row = context.lake.read("catalog_stats").to_pylist()[0]
    rejected = sum(rows for _, rows in row["rejected"])
    context.facts.update(
        {"items": row["items"], "users": row["users"], "events": row["interactions"], "rejected": rejected}
    )
    if row.get("tied"):
        context.facts["tied in time"] = f"{row['tied'] / row['interactions']:.1%} of events"
    context.facts.update({"gini": round(row["gini"], 3), "head share": round(row["head_interactions"], 3)})
    if richness := items.richness(context.lake):
        context.facts.update({"spearman": round(richness["spearman"], 3), "richness": richness["richness_source"]})
