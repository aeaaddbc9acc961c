"""The stage that trains behaviour embeddings: SASRec on the users' sequences."""

from __future__ import annotations

import json

from pyspark.sql import DataFrame, SparkSession

from adasid import tables
from adasid.config import Config
from adasid.files import remove
from adasid.report.words import DASH
from pipelines import stage
from pipelines.engines.lake import Lake
from pipelines.engines.spark import read, session, uri, write
from pipelines.engines.tracking import StageContext
from pipelines.features import layout
from pipelines.run import Run
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage
from pipelines.training import launch, workers

_SHOWN = ("loss", "validation_ndcg@10", "validation_recall@10", "test_recall@10", "spearman", "seconds")


def run(cfg: Config, context: StageContext) -> None:
    """Train SASRec on ``sequences`` and ``item_stats``; write ``behavior_embeddings``. Skipped where the items bring
    the embeddings."""
    if reason := skipped(cfg, context.lake):
        context.status, text = reason
        context.note(text)
    elif stage.run(BEHAVIOR, cfg, context) is None:
        context.status = "up to date"


def skipped(cfg: Config, lake: Lake) -> tuple[str, str] | None:
    """Return status and reason where the config asks for no training of behaviour embeddings, else None."""
    if cfg.behavior.source == "column":
        return "not needed", "the items bring their behaviour embeddings: nothing to train"
    if cfg.behavior.refresh == "keep" and lake.exists("behavior_embeddings"):
        text = "the existing embeddings are used; items without one count as without behaviour"
        return "kept", f"behavior.refresh is keep: {text}"
    return None


def _train_behavior(inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg, lake, versions = inputs.cfg, inputs.lake, inputs.versions
    launch.check_same_run(inputs.input_hashes)
    layout.check(lake, "sequences")
    folder = Run(cfg).artifact("behavior", inputs.hash)
    payload = launch.payload(cfg, lake, versions, folder)
    launch.fit(workers.behavior, payload, context, "behavior", cfg.behavior.epochs, _SHOWN)
    summary = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    shards = [uri(folder / "result" / name) for name in summary["files"]]
    rows = lake.open("item_stats", versions["item_stats"]).to_pyarrow_dataset().count_rows()
    size = in_place.size(lake, "item_stats") + rows * cfg.behavior.width * 4
    frame, name = _with_ids(session(cfg.spark, size=size), lake, shards), "behavior_embeddings"
    written = {name: write(frame, lake, name, tables.BEHAVIOR_EMBEDDINGS, inputs.hash, sources=versions)}
    for done in ("checkpoints", "best", "early", "result"):
        remove(folder / done)
    context.artifact(folder / "result.json")
    if "note" in summary:
        context.note(summary["note"])
    figures = {"test R@10": summary["test"].get("recall@10"), "Spearman(norm, count)": summary["spearman"]}
    context.facts.update({"best epoch": summary["best_epoch"]})
    context.facts.update({name: DASH if value is None else round(value, 4) for name, value in figures.items()})
    return written


BEHAVIOR = Stage(
    "behavior",
    "ray",
    reads=lambda cfg: ("sequences", "item_stats"),
    writes=lambda cfg: ("behavior_embeddings",),
    settings=lambda cfg, lake: {
        "behavior": cfg.behavior.model_dump(mode="json", exclude={"refresh"}),
        "seed": cfg.seed,
    },
    body=_train_behavior,
    prefix="behavior 2",  # raised when embeddings of the same sequences change
)
"""Reads sequences, writes behaviour embeddings (SASRec)."""


def _with_ids(spark: SparkSession, lake: Lake, shards: list[str]) -> DataFrame:
    """Return the rows of the workers' files (``tables.BEHAVIOR_SHARD``), which are of the items that were trained on,
    with their ids."""
    rows = spark.read.parquet(*shards).withColumnRenamed("embedding", tables.BEHAVIOR)
    return rows.join(read(spark, lake, "item_stats").select("item_index", "item_id"), "item_index")
