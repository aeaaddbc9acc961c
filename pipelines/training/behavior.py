"""The stage that trains behaviour embeddings: SASRec on the users' sequences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from adasid import tables
from adasid.config import Config
from adasid.report.words import DASH
from adasid.training.checkpoint import Checkpoints, read_tensors
from pipelines import stage
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.run import Run
from pipelines.stage import Inputs, Stage
from pipelines.training import launch, workers

_CHUNK = 50_000
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
    cfg, lake, read = inputs.cfg, inputs.lake, inputs.versions
    launch.check_same_run(inputs.input_hashes)
    folder = Run(cfg).artifact("behavior", inputs.hash)
    payload = launch.payload(cfg, lake, read, folder)
    launch.fit(workers.behavior, payload, context, "behavior", cfg.behavior.epochs, _SHOWN)
    result = read_tensors(folder / "result.safetensors")
    stats = _items(lake, read["item_stats"], len(result["norms"]))
    batches, name = _embedding_batches(stats, result), "behavior_embeddings"
    written = {name: lake.write(name, tables.BEHAVIOR_EMBEDDINGS, batches, inputs.hash, read)}
    Checkpoints(folder / "checkpoints").clear()
    summary = json.loads((folder / "result.json").read_text(encoding="utf-8"))
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
    prefix="behavior",
)
"""Reads sequences, writes behaviour embeddings (SASRec)."""


def _items(lake: Lake, version: int, items: int) -> pa.Table:
    table = lake.read("item_stats", version, ["item_index", "item_id", "interactions"]).sort_by("item_index")
    assert table.num_rows == items
    return table.combine_chunks()


def _embedding_batches(stats: pa.Table, result: Mapping[str, torch.Tensor]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the items that have training events: the embeddings of others never got a gradient, even if
    they get events before the next training."""
    width, items = result["embeddings"].shape[1], stats["item_id"].combine_chunks()
    learned = pc.greater(stats["interactions"], 0).combine_chunks()
    for start in range(0, len(items), _CHUNK):
        part = result["embeddings"][start : start + _CHUNK].numpy()
        vectors = pa.ListArray.from_arrays(
            np.arange(0, part.size + 1, width, dtype=np.int32), pa.array(part.reshape(-1))
        )
        index, norms = np.arange(start, start + len(part)), result["norms"][start : start + _CHUNK].numpy()
        columns = [items.slice(start, len(part)), pa.array(index), vectors, pa.array(norms)]
        rows = pa.RecordBatch.from_arrays(columns, schema=tables.BEHAVIOR_EMBEDDINGS)
        yield rows.filter(learned.slice(start, len(part)))
