"""Generate a small catalogue with planted clusters, for tests of tokenizers and their training."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from adasid import tables
from adasid.data.shards import Pairs, Shard
from adasid.distributed import Workers
from adasid.tables import BEHAVIOR


def catalogue(
    items: int = 600, clusters: int = 8, text: int = 24, visual: int = 16, behavior: int = 12, seed: int = 0
) -> tuple[pa.Table, np.ndarray]:
    """Rows like ``item_features`` (what a tokenizer reads of it) and the planted cluster of each item. Some items lack
    an image, the last tenth lack behaviour."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(clusters, size=items)
    richness = np.linspace(1, 0, items).astype(np.float32)
    columns: dict[str, pa.Array] = {
        "item_id": pa.array([f"i{n:05d}" for n in range(items)]),
        "item_index": pa.array(np.arange(items)),
        "richness": pa.array(richness),
    }
    columns["interactions"] = pa.array(np.maximum(0, 200 - np.arange(items)))
    columns["stratum"] = pa.array(np.where(np.arange(items) < items * 0.9, "mid", "cold"))
    columns["fingerprint"] = columns["item_id"]
    for name, width, noise in (
        ("text", text, 0.3),
        ("visual", visual, 0.3),
        (BEHAVIOR, behavior, 0.3 + 2 * (1 - richness[:, None])),
    ):
        centres = rng.normal(size=(clusters, width))
        values = (centres[cluster] + noise * rng.normal(size=(items, width))).astype(np.float32)
        absent = (
            np.arange(items) % 10 == 3
            if name == "visual"
            else np.arange(items) >= items * 0.9
            if name == BEHAVIOR
            else np.zeros(items, bool)
        )
        columns[name] = pa.array([None if gone else row for row, gone in zip(values, absent)], tables.VECTOR)
    return pa.table(columns), cluster


def shard(
    table: pa.Table,
    modalities: tuple[str, ...] = ("text", "visual", BEHAVIOR),
    rank: int = 0,
    world: int = 1,
    cluster: np.ndarray | None = None,
    workers: Workers | None = None,
) -> Shard:
    """The part of worker ``rank``; with ``cluster``, three partners of its own cluster for each item, which ``workers``
    exchange."""
    mine = np.arange(rank, table.num_rows, world)

    def read(columns: list[str]) -> list[pa.RecordBatch]:
        return table.take(mine).select(columns).to_batches(max_chunksize=97)

    if cluster is None:
        return Shard(read, modalities)
    rng = np.random.default_rng(0)
    partners = np.array([rng.choice(np.flatnonzero(cluster == cluster[item]), 3) for item in range(len(cluster))])
    items = np.repeat(mine, 3)
    return Shard(read, modalities, pairs=Pairs(items, partners[mine].ravel()), workers=workers or Workers(rank, world))
