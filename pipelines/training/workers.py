"""Run on every training worker: read its part of the tables, train with ``adasid/training``, write the result into the
folder of the training.

Each worker process imports this module, which imports neither MLflow nor Spark.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from adasid.config import Config, TokenizerSettings
from adasid.data.events import read_events
from adasid.data.samples import Sample
from adasid.data.sequences import Histories, read_histories
from adasid.data.shards import Pairs, Shard
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location, write_json, write_text
from adasid.storage import configure
from adasid.tokenizers import artifact
from adasid.tokenizers.relabel import Relabelled
from adasid.training.behavior import BehaviorData, BehaviorTraining
from adasid.training.ranking import RankingData, RankingTraining
from adasid.training.retrieval import RetrievalData, RetrievalTraining
from adasid.training.tokenizer import TokenizerTraining, summary
from pipelines.engines import cluster
from pipelines.engines.lake import Lake
from pipelines.training import parts
from pipelines.training.parts import ItemPart
from pipelines.training.payload import Payload
from pipelines.training.sids import read_catalogue

OUTCOME = "outcome.json"
_PAIR = ["item_index", "partner_index"]


def behavior(payload: Payload) -> None:
    """Train SASRec; write embeddings and norms, each worker its rows of the table to a Parquet file in ``result``, and
    ``result.json``, which names these files."""
    cfg, workers, lake, folder = _opened(payload)
    read = payload.read
    version = read["item_stats"]
    counts = np.zeros(lake.open("item_stats", version).to_pyarrow_dataset().count_rows(), np.int32)
    for rows in parts.rows(lake, "item_stats", version, ["item_index", "interactions"]):
        number = rows.column("interactions").to_numpy()
        counts[rows.column("item_index").to_numpy()] = np.minimum(number, np.iinfo(np.int32).max)
    length = cfg.behavior.max_length
    lengths, most = {"train": length + 1, "validation": length, "test": length}, cfg.behavior.eval_users
    users = _histories(lake, read, workers, cfg, lengths, {"validation": most, "test": most})
    data = BehaviorData(
        users["train"], users["validation"], users["test"], counts, f"sequences version {read['sequences']}"
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
    mine = parts.item_part(lake, "item_features", version, workers)
    shard = Shard(
        parts.reader(lake, "item_features", version, items=mine),
        settings.inputs,
        everyone=parts.reader(lake, "item_features", version),
        pairs=_pairs(lake, payload.read, mine) if settings.pairs else None,
        scratch=cfg.ray.scratch,
        workers=workers,
        device=_device(cfg),
    )
    torch.manual_seed(cfg.seed)
    tokenizer = started_from or artifact.build(settings, shard.widths)
    tokenizer.unfreeze()
    previous = payload.previous
    if previous and tuple((slot.kind, slot.size) for slot in tokenizer.slots) == previous.slots:
        shard.hold(
            parts.rows(lake, "previous_codes", previous.version, ["item_index", "codes"], items=mine),
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
            **({"encoders": payload.encoders} if payload.encoders else {}),
        }
        artifact.write(folder / "model", tokenizer, settings, facts)


def retrieval(payload: Payload) -> None:
    """Train a retriever on the SIDs of ``payload.catalogue`` (table, version and slots; None: one token an item);
    write the weights of the best epoch and ``outcome.json``."""
    cfg, workers, lake, folder = _opened(payload)
    read, settings = payload.read, cfg.retrieval
    catalogue, counts, strata = read_catalogue(lake, payload, settings)
    del counts  # of all items
    length = settings.max_length
    whole = None if not settings.repeatable else length  # lists leave out all items of a history
    lengths, most = {"train": length + 1, "validation": whole, "test": None}, settings.test_users
    users = _histories(lake, read, workers, cfg, lengths, {"validation": settings.eval_users, "test": most})
    data = RetrievalData(
        users["train"], users["validation"], users["test"], strata, f"sequences version {read['sequences']}"
    )
    training = RetrievalTraining(settings, catalogue, data, folder, cfg.seed, workers, _device(cfg))
    del catalogue  # the model has it, on its device
    _finish(payload, workers, training.run(_report(payload, workers)))


def ranking(payload: Payload) -> None:
    """Train a click-through model on the same SIDs; write the weights of the best epoch and ``outcome.json``."""
    cfg, workers, lake, folder = _opened(payload)
    version, settings = payload.read["ranking_samples"], cfg.ranking
    catalogue, counts, strata = read_catalogue(lake, payload, settings)
    mine = parts.buckets_of(lake, "ranking_samples", version, cfg, workers)
    events = read_events(parts.reader(lake, "ranking_samples", version, mine))
    cluster.release_unused()
    data = RankingData(events, counts, strata, f"ranking_samples version {version}")
    training = RankingTraining(
        settings, catalogue, data, folder, cfg.seed, workers, _device(cfg), cfg.spark.scores_from
    )
    del catalogue, counts, data  # the model has the catalogue, on its device
    _finish(payload, workers, training.run(_report(payload, workers)))


def _finish(payload: Payload, workers: Workers, result: dict[str, Any]) -> None:
    if workers.rank == 0:
        facts = {"seed": payload.config.seed, "inputs": payload.read, "versions": payload.library_versions}
        write_json(payload.folder / OUTCOME, {**result, **facts})


def _histories(
    lake: Lake,
    read: dict[str, int],
    workers: Workers,
    cfg: Config,
    lengths: Mapping[str, int | None],
    most: Mapping[str, int],
) -> dict[str, Histories]:
    """Return the histories of this worker's users in each split, cut to their latest ``lengths[split]`` items (None:
    all); of the splits of ``most``, those of a sample of so many users of all workers."""
    version = read["sequences"]
    mine = parts.reader(lake, "sequences", version, parts.buckets_of(lake, "sequences", version, cfg, workers))
    device = _device(cfg) if workers.world > 1 else "cpu"
    samples = {split: Sample(users, workers, device) for split, users in most.items()}
    found = read_histories(mine, lengths, samples)
    cluster.release_unused()
    if not workers.agree(len(found["train"]) > 0, device):
        raise InputError(
            f"sequences version {version} has no user with at least two training events for one of "
            f"{workers.world} workers: bring more interactions, lower ray.workers, or raise features.user_buckets "
            "and run jobs/build_features.py again"
        )
    return found


def _pairs(lake: Lake, read: dict[str, int], mine: ItemPart) -> Pairs:
    """Return the pairs whose first item belongs to this worker."""
    found = [
        [batch.column(name).to_numpy().astype(np.int32) for name in _PAIR]
        for batch in parts.rows(lake, "item_pairs", read["item_pairs"], _PAIR, items=mine, size=1 << 16)
    ]
    if not found:
        raise InputError(
            f"item_pairs version {read['item_pairs']} has no pair for this worker: lower features.pairs.min_users, or "
            "bring more interactions"
        )
    items, partners = (np.concatenate(columns) for columns in zip(*found))
    return Pairs(items, partners)


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
