"""Train, encode, measure and probe all tokenizers of ``compare`` on the same features; write one table and one page.

A cell is a tokenizer and a seed. Its result is written as soon as it is computed, so an interrupted command resumes
with the next cell.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as nnf
from pyspark import StorageLevel

from adasid.config import Config, digest
from adasid.data.shards import batch_of, find_widths
from adasid.errors import InputError
from adasid.files import Location, write_json
from adasid.metrics.probes import Readout, agreement, duplicates_kept, shared_cosine
from adasid.report import comparison
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers import artifact
from pipelines import categories, report, stage
from pipelines.engines import cluster, tracking
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.features import pairs
from pipelines.publish.encode import encode
from pipelines.publish.measure import measure
from pipelines.run import Run
from pipelines.sources import in_place
from pipelines.stage import Inputs
from pipelines.training import tokenizer

Row = dict[str, Any]


def run(cfg: Config, context: StageContext) -> None:
    """Compute every cell that has no result yet, then write the table in ``<run>/report/tokenizers``."""
    cells = [
        (label, seed)
        for label in cfg.compare.tokenizers
        for seed in dict.fromkeys((*cfg.compare.seeds, *cfg.compare.more_seeds.get(label, ())))
    ]
    if not cells:
        raise InputError("compare.tokenizers is empty: name the tokenizers to compare (conf/demo.yaml shows how)")
    rows, spent, started = [], 0, time.monotonic()
    kinds = _kinds(cfg, context.lake)
    if any(settings.pairs for settings in cfg.compare.tokenizers.values()):
        stage.run(pairs.ITEM_PAIRS, cfg, context)
    try:
        for number, (label, seed) in enumerate(cells, 1):
            cell = cfg.model_copy(update={"tokenizer": cfg.compare.tokenizers[label], "seed": seed})
            inputs = stage.resolve(tokenizer.declare("compare"), cell, context.lake)
            folder = tokenizer.folder_of(inputs, "compare")
            probes = cfg.compare.model_dump(mode="json", include=_PROBES)
            result = folder / f"result-{digest(_FORMAT, probes, sorted(kinds.items()))}.json"
            if not result.exists():
                with tracking.stage(cell, f"compare {label}, seed {seed}", journal=False) as inner:
                    row = {"label": label, "seed": seed, **_measure(inputs, inner, folder, kinds)}
                    inner.metrics({k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "seed"})
                    write_json(result, row)
                spent += 1
                left = (time.monotonic() - started) / spent * (len(cells) - number) / 60
                context.note(f"{number} of {len(cells)} done, at most about {left:.0f} min left")
            rows.append({**json.loads(result.read_text(encoding="utf-8")), "label": label})
    finally:
        cluster.shutdown()
    _write(cfg, context, rows)


_FORMAT = 2
"""This number is raised when a probe measures something else."""
_PROBES = {"sample", "queries", "neighbours", "near_duplicate", "categories"}


def _measure(inputs: Inputs, context: StageContext, folder: Location, kinds: dict[str, int]) -> Row:
    cfg, lake, version = inputs.cfg, inputs.lake, inputs.versions["item_features"]
    manifest = tokenizer.fit(cfg, context, "compare", inputs)
    spark = engine.session(cfg.spark, size=in_place.size(lake, "item_features"))
    features = engine.read(spark, lake, "item_features", version)
    encoded = encode(spark, features, folder / "model", manifest, cfg.sids.batch).persist(StorageLevel.DISK_ONLY)
    try:
        metrics = measure(encoded, list(manifest.slots))
    finally:
        encoded.unpersist()
    row = {
        name: metrics[name]
        for name in ("items", "distinct", "collision_items", "collision_distinct", "largest_group", "sid_entropy")
    }
    for name in ("entropy", "utilisation", "perplexity"):
        if known := [value for value in metrics[name] if value is not None]:  # null for a slot that no item fills
            row[name] = float(np.mean(known))
    row |= {
        "length": len(manifest.slots),
        "parameters": manifest.parameters,
        "seconds": manifest.seconds,
        "method": manifest.tokenizer,
    }
    row |= {f"own_{m}": value for m, value in manifest.metrics["fvu"].items()}
    return (
        row
        | _probe(cfg, lake, version, folder / "model", kinds)
        | {"artifact": manifest.digest, "mlflow_run": context.run_id}
    )


def _probe(cfg: Config, lake: Lake, version: int, model: Location, kinds: dict[str, int]) -> Row:
    """Measure the readout of every modality and the agreement of neighbours, on a sample of the catalogue that is
    evenly spaced by popularity. An inactive slot counts as PAD here (collisions and code use are of the emitted
    codes)."""
    tokenizer, _ = artifact.read(model)
    dataset = lake.open("item_features", version).to_pyarrow_dataset()
    items = dataset.count_rows()
    chosen, step = _chosen(cfg, items), _step(cfg, items)
    modalities = (*cfg.features.content, BEHAVIOR)
    widths = find_widths(lambda columns: lake.batches("item_features", version, columns), modalities)
    probe, parts = Readout(len(tokenizer.slots), max(slot.size for slot in tokenizer.slots), widths), []
    for rows in dataset.to_batches(
        columns=["item_id", "item_index", "richness", "stratum", *modalities], filter=chosen
    ):
        if not rows.num_rows:
            continue
        batch = batch_of(rows, widths)
        emitted, _, active = tokenizer.encode(batch_of(rows, tokenizer.widths))
        codes = emitted.masked_fill(~active, PAD)
        probe.add(codes, batch.index // step, batch.vectors, batch.present)
        kind = np.array(
            [kinds.get(item, -1) for item in rows.column("item_id").to_pylist()] if kinds else np.full(len(rows), -1),
            np.int64,
        )
        content = nnf.normalize(
            torch.cat([nnf.normalize(batch.vectors[m], dim=1) for m in cfg.features.content], 1), dim=1
        )
        slots = active[:, [slot.kind == BEHAVIOR for slot in tokenizer.slots]].double().mean(1)
        slots[~batch.present[BEHAVIOR]] = torch.nan  # no behaviour, nothing to switch off
        stratum = rows.column("stratum").to_numpy(zero_copy_only=False)
        parts.append((codes.numpy(), kind, stratum, emitted.numpy(), content.numpy(), slots.numpy()))
    codes_, kind_, stratum, emitted_, content_, active_ = (np.concatenate(part) for part in zip(*parts))
    row: Row = {f"readout_{m}": value for m, value in probe.unexplained().items()}
    row["shared_cosine"] = shared_cosine(emitted_, content_)
    if (active_ < 1).any():
        row |= {f"active_{name}": float(np.nanmean(active_[stratum == name])) for name in ("head", "tail")}
    everyone = np.unique(np.linspace(0, len(kind_) - 1, min(cfg.compare.queries, len(kind_))).round().astype(np.int64))
    row["duplicates_kept"] = duplicates_kept(emitted_, content_, everyone, cfg.compare.near_duplicate)
    if kinds:
        tail = np.flatnonzero(np.isin(stratum, ("tail", "cold")))
        row["agreement"] = agreement(codes_, kind_, everyone, cfg.compare.neighbours)
        row["agreement_tail"] = agreement(
            codes_, kind_, tail[:: max(1, len(tail) // cfg.compare.queries)], cfg.compare.neighbours
        )
    return {name: value for name, value in row.items() if np.isfinite(value)}


def _chosen(cfg: Config, items: int) -> pc.Expression:
    """Return the filter that selects every n-th item of the catalogue, by popularity."""
    index, step = pc.field("item_index"), _step(cfg, items)
    return pc.subtract(index, pc.multiply(pc.divide(index, step), step)) == 0


def _step(cfg: Config, items: int) -> int:
    return -(-items // cfg.compare.sample)


def _kinds(cfg: Config, lake: Lake) -> dict[str, int]:
    """Map each sampled item that has a category to its number; return an empty dict where no categories are known."""
    features = lake.open("item_features").to_pyarrow_dataset()
    items = features.to_table(columns=["item_id"], filter=_chosen(cfg, features.count_rows()))["item_id"]
    return categories.of(cfg, lake, items.combine_chunks())


def _write(cfg: Config, context: StageContext, rows: list[Row]) -> None:
    folder = Run(cfg).report("tokenizers")
    report.write(folder, comparison.build(cfg.name, rows), rows)
    context.artifact(folder)
    context.facts.update(
        cells=len(rows), tokenizers=len({row["label"] for row in rows}), page=str(folder / "index.html")
    )
    print(comparison.text(rows))
