"""Run on every training worker: read its part of the tables, train with ``adasid/training``, write the result into the
folder of the training.

Each worker process imports this module, which imports neither MLflow nor Spark.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from adasid import tables
from adasid.config import Config, Ranking, Retrieval, TokenizerSettings
from adasid.data.sequences import Histories
from adasid.data.shards import Pairs, Shard
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location, write_json, write_text
from adasid.recommenders import ngrams
from adasid.recommenders.tokens import ItemTokens
from adasid.storage import configure
from adasid.tokenizers import artifact
from adasid.tokenizers.relabel import Relabelled
from adasid.training.behavior import BehaviorData, BehaviorTraining
from adasid.training.ranking import Events, RankingData, RankingTraining
from adasid.training.retrieval import RetrievalData, RetrievalTraining
from adasid.training.tokenizer import TokenizerTraining, summary
from pipelines.engines import cluster
from pipelines.engines.lake import Lake
from pipelines.training.payload import Payload

OUTCOME = "outcome.json"
_SAMPLE = ["user_id", "position", "item_index", "label", "in_history", "split"]
_PAIR = pa.schema([(name, pa.int64()) for name in ("item_index", "partner_index")])


def behavior(payload: Payload) -> None:
    """Train SASRec; write embeddings and norms, each worker its rows of the table to a Parquet file in ``result``, and
    ``result.json``, which names these files."""
    cfg, workers, lake, folder = _opened(payload)
    read = payload.read
    counts = (
        lake.read("item_stats", read["item_stats"], ["item_index", "interactions"])
        .sort_by("item_index")["interactions"]
        .to_numpy()
    )
    parts = _histories(lake, read, workers, cfg)
    data = BehaviorData(
        parts["train"],
        parts["validation"],
        parts["test"],
        counts.astype(np.int64),
        f"sequences version {read['sequences']}",
    )
    training = BehaviorTraining(cfg.behavior, data, folder, cfg.seed, workers, _device(cfg))
    result = training.run(_report(payload, workers))
    names = [f"{rank}-of-{workers.world}.parquet" for rank in range(workers.world)]
    result.write(folder / "result" / names[workers.rank])
    workers.agree(True, _device(cfg))  # rank 0 waits for all files
    if workers.rank == 0:
        write_json(folder / "result.json", {**result.summary, "inputs": read, "files": names})


def tokenizer(payload: Payload) -> None:
    """Train the tokenizer; write its artifact to ``model``. ``payload.start``: the artifact to continue from, under
    ``retokenize.warm``; ``payload.previous``: the previous codes and their tolerance."""
    cfg, workers, lake, folder = _opened(payload)
    version, started_from = payload.read["item_features"], None
    settings: TokenizerSettings = cfg.tokenizer
    if payload.start:
        started_from, known = artifact.read(payload.start)
        settings = artifact.settings_of(known.config)
    mine = _modulo("item_index", workers) if workers.world > 1 else None
    shard = Shard(
        lambda columns: lake.batches("item_features", version, columns, mine),
        settings.inputs,
        everyone=lambda columns: lake.batches("item_features", version, columns),
        pairs=_pairs(lake, payload.read, mine) if settings.pairs else None,
    )
    torch.manual_seed(cfg.seed)
    tokenizer = started_from or artifact.build(settings, shard.widths)
    tokenizer.unfreeze()
    previous = payload.previous
    if previous and tuple((slot.kind, slot.size) for slot in tokenizer.slots) == previous.slots:
        theirs = None if settings.pairs else mine  # partners may be other workers' items
        shard.hold(
            lake.batches("previous_codes", previous.version, ["item_index", "codes"], theirs),
            len(tokenizer.slots),
            previous.slack,
        )
    inner = tokenizer.inner if isinstance(tokenizer, Relabelled) else tokenizer
    name, warm = f"item_features version {version}", cfg.retokenize.warm if started_from else None
    training = TokenizerTraining(inner, settings, shard, folder, cfg.seed, workers, name, _device(cfg), warm)
    started = time.monotonic()
    rows = training.run(_report(payload, workers))
    if workers.rank == 0:
        facts = {
            "metrics": summary(rows[-1], tokenizer.widths),
            "inputs": payload.read,
            "seed": cfg.seed,
            "seconds": round(time.monotonic() - started, 1),
            "versions": payload.library_versions,
            "run": cfg.name,
        }
        artifact.write(folder / "model", tokenizer, settings, facts)


def retrieval(payload: Payload) -> None:
    """Train a retriever on the SIDs of ``payload.catalogue`` (table, version and slots; None: one token an item);
    write ``best.safetensors`` and ``outcome.json``."""
    cfg, workers, lake, folder = _opened(payload)
    read, settings = payload.read, cfg.retrieval
    catalogue, counts, strata = _catalogue(lake, payload, settings)
    parts = _histories(lake, read, workers, cfg)
    data = RetrievalData(
        parts["train"], parts["validation"], parts["test"], counts, strata, f"sequences version {read['sequences']}"
    )
    training = RetrievalTraining(settings, catalogue, data, folder, cfg.seed, workers, _device(cfg))
    _finish(payload, workers, training.run(_report(payload, workers)))


def ranking(payload: Payload) -> None:
    """Train a click-through model on the same SIDs; write ``best.safetensors`` and ``outcome.json``."""
    cfg, workers, lake, folder = _opened(payload)
    version, settings = payload.read["ranking_samples"], cfg.ranking
    catalogue, counts, strata = _catalogue(lake, payload, settings)
    events = Events.from_batches(lake.batches("ranking_samples", version, _SAMPLE))
    data = RankingData(events, counts, strata, f"ranking_samples version {version}")
    training = RankingTraining(
        settings, catalogue, data, folder, cfg.seed, workers, _device(cfg), cfg.spark.scores_from
    )
    _finish(payload, workers, training.run(_report(payload, workers)))


def _finish(payload: Payload, workers: Workers, result: dict[str, Any]) -> None:
    if workers.rank == 0:
        facts = {"seed": payload.config.seed, "inputs": payload.read, "versions": payload.library_versions}
        write_json(payload.folder / OUTCOME, {**result, **facts})


def _catalogue(
    lake: Lake, payload: Payload, settings: Retrieval | Ranking
) -> tuple[ItemTokens, NDArray[np.int64], NDArray[np.int64]]:
    """Return tokens, training counts and strata of all items, in the order of item_index, as the model's
    ``settings`` want them. Raises InputError where the SIDs are of other items."""
    stats = lake.read("item_stats", payload.read["item_stats"], ["item_id", "item_index", "interactions", "stratum"])
    stats = stats.sort_by("item_index").combine_chunks()
    counts = stats["interactions"].to_numpy().astype(np.int64)
    strata = pc.index_in(stats["stratum"], pa.array(tables.STRATA)).to_numpy().astype(np.int64)
    chosen = payload.catalogue
    if not chosen:
        return ItemTokens.ids(len(stats)), counts, strata
    rows = lake.read(chosen.table, chosen.version, ["item_id", "codes", "weights", "active"])
    index = pc.index_in(stats["item_id"], rows["item_id"].combine_chunks())
    if index.null_count or len(rows) != len(stats):
        raise InputError(
            f"{chosen.table} version {chosen.version} has {len(rows)} items, of which "
            f"{len(stats) - index.null_count} are among the {len(stats)} of "
            "item_stats: write the SIDs of these items (jobs/write_sids.py)"
        )
    rows = rows.take(index).combine_chunks()
    codes, factors, active = (
        pc.list_flatten(rows[name]).to_numpy(zero_copy_only=False).reshape(len(rows), -1)
        for name in ("codes", "weights", "active")
    )
    codes = np.where(active, codes, tables.PAD) if settings.inactive == "pad" else codes
    weights = factors.astype(np.float32) if settings.weights else None
    tokens = ItemTokens.of(codes.astype(np.int32), chosen.slots, weights)
    combinations = ngrams.choose(settings.ngrams, chosen.slots, chosen.parallel)
    trained = torch.from_numpy(counts > 0)
    tokens = tokens.with_ngrams(combinations, settings.ngram_rows, trained, settings.ngram_min_items)
    return tokens, counts, strata


def _histories(lake: Lake, read: dict[str, int], workers: Workers, cfg: Config) -> dict[str, Histories]:
    """Return this worker's users of each split."""
    columns = ["user_id", "history", "target"]
    splits = {
        split: Histories.from_batches(lake.batches("sequences", read["sequences"], columns, pc.field("split") == split))
        for split in tables.SPLITS
    }
    if len(splits["train"]) < workers.world:
        raise InputError(
            f"sequences version {read['sequences']} has {len(splits['train'])} users with at least two training "
            f"events, fewer than ray.workers {workers.world}: bring more interactions"
        )
    return {split: histories.part(workers.rank, workers.world) for split, histories in splits.items()}


def _pairs(lake: Lake, read: dict[str, int], mine: pc.Expression | None) -> Pairs:
    """Return the pairs whose first item belongs to this worker, and the rows of their partners."""
    table = pa.Table.from_batches(
        (batch.cast(_PAIR) for batch in lake.batches("item_pairs", read["item_pairs"], _PAIR.names, mine)), _PAIR
    )
    items, partners = (table[name].to_numpy() for name in _PAIR.names)
    if not len(items):
        raise InputError(
            f"item_pairs version {read['item_pairs']} has no pair for this worker: lower features.pairs.min_users, or "
            "bring more interactions"
        )
    wanted = pc.field("item_index").isin(pa.array(np.unique(partners)))
    others = wanted if mine is None else wanted & ~mine
    return Pairs(
        items,
        partners,
        lambda columns: (
            lake.batches("item_features", read["item_features"], columns, others) if mine is not None else []
        ),
    )


def _modulo(column: str, workers: Workers) -> pc.Expression:
    """Return the filter of rows whose ``column`` modulo the number of workers is this worker's rank."""
    field = pc.field(column)
    return pc.subtract(field, pc.multiply(pc.divide(field, workers.world), workers.world)) == workers.rank


def _opened(payload: Payload) -> tuple[Config, Workers, Lake, Location]:
    configure(payload.config.storage.options)
    return payload.config, Workers.current(), Lake(payload.lake, {}), payload.folder


def _report(payload: Payload, workers: Workers) -> Callable[[list[dict[str, float]]], None]:
    """Return a callback: rank 0 writes ``metrics.jsonl``, which the driver reads; every rank reports to Ray Train."""

    def report(rows: list[dict[str, float]]) -> None:
        if workers.rank == 0:
            write_text(payload.folder / cluster.METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        if payload.config.ray.workers:
            import ray.train

            ray.train.report(rows[-1])

    return report


def _device(cfg: Config) -> torch.device:
    if cfg.ray.workers:
        from ray.train.torch import get_device

        return torch.device(get_device())
    return torch.device("cuda" if cfg.ray.gpus == "auto" and torch.cuda.is_available() else "cpu")
