"""Training stages on Ray Train: behaviour embeddings, then the tokenizer. The maths is in ``adasid/training``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from adasid import tables
from adasid.config import Config, digest
from adasid.errors import InputError
from adasid.tables import BEHAVIOR
from adasid.tokenizers import artifact
from adasid.training.behavior import BehaviorData, BehaviorTraining
from adasid.training.checkpoint import Checkpoints, write_json, write_text
from adasid.training.sequences import Histories
from adasid.training.shards import Shard
from adasid.training.tokenizer import TokenizerTraining
from adasid.training.workers import Workers
from pipelines.engines import cluster
from pipelines.engines.lake import Lake
from pipelines.engines.spark import versions as library_versions
from pipelines.engines.tracking import Track, tracking_uri

_CHUNK = 50_000


def behavior(cfg: Config, track: Track) -> None:
    """``sequences`` and ``item_stats`` -> ``behavior_embeddings``: SASRec. Skipped where the items bring the embeddings."""
    if cfg.behavior.source == "column":
        track.status = "not needed"
        track.note("the items bring their behaviour embeddings: nothing to train")
        return
    read = track.lake.versions("sequences", "item_stats")
    key = digest("behavior", cfg.behavior, cfg.seed, track.lake.stamps(read))
    track.inputs(read)
    if len(set(track.lake.stamps(read).values())) > 1:
        raise InputError("sequences and item_stats come from different runs of build_features (was one cut off?): run jobs/build_features.py again")
    if track.lake.fresh(key, "behavior_embeddings"):
        track.status = "up to date"
        return
    folder = (cfg.run_dir / "artifacts" / "behavior" / key).resolve()
    shown = ("loss", "validation_ndcg@10", "validation_recall@10", "test_recall@10", "spearman", "seconds")
    show = _progress(track, cfg.behavior.epochs, shown)
    cluster.fit(_behavior_worker, _payload(cfg, track, read, folder), cfg.ray, f"behavior-{key}", folder, show)
    result = load_file(folder / "result.safetensors")
    items = _item_ids(track.lake, read["item_stats"], len(result["norms"]))
    track.outputs(
        {"behavior_embeddings": track.lake.write("behavior_embeddings", tables.BEHAVIOR_EMBEDDINGS, _embedding_batches(items, result), key)}
    )
    Checkpoints(folder / "checkpoints").clear()
    summary = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    track.artifact(folder / "result.json")
    track.facts.update(
        {
            "best epoch": summary["best_epoch"],
            "test R@10": round(summary["test"]["recall@10"], 4),
            "Spearman(norm, count)": round(summary["spearman"], 3),
        }
    )


def tokenizer(cfg: Config, track: Track) -> None:
    """``item_features`` -> the tokenizer's artifact in ``artifacts/tokenizer/<key>/model``, registered in MLflow as candidate."""
    read = track.lake.versions("item_features")
    folder = tokenizer_folder(cfg, track.lake)
    track.inputs(read)
    if (folder / "model" / "manifest.json").exists():
        _, manifest = artifact.read(folder / "model")
        _register(cfg, track, folder / "model", manifest)
        track.status = "up to date"
        return
    shown = ("loss", "reconstruction", "codebook", "alignment", "sparsity", "utilisation", "entropy", "seconds")
    show = _progress(track, cfg.tokenizer.training.epochs, shown)
    cluster.fit(_tokenizer_worker, _payload(cfg, track, read, folder), cfg.ray, f"tokenizer-{folder.name}", folder, show)
    manifest = artifact.read_manifest(folder / "model")
    _register(cfg, track, folder / "model", manifest)
    Checkpoints(folder / "checkpoints").clear()
    quality = manifest["metrics"]
    track.facts.update({"tokenizer": manifest["digest"], "utilisation": round(quality["utilisation"], 4), "entropy": round(quality["entropy"], 3)})
    track.facts.update({f"FVU {m}": round(value, 3) for m, value in quality["fvu"].items()})


def tokenizer_folder(cfg: Config, lake: Lake) -> Path:
    """Where the tokenizer of this config, seed and ``item_features`` is, or will be."""
    key = digest("tokenizer", cfg.tokenizer, cfg.seed, lake.stamps(lake.versions("item_features")))
    return (cfg.run_dir / "artifacts" / "tokenizer" / key).resolve()


def _payload(cfg: Config, track: Track, read: Mapping[str, int], folder: Path) -> dict[str, Any]:
    return {
        "config": cfg.model_dump(mode="json"),
        "lake": track.lake.root,
        "read": dict(read),
        "folder": str(folder),
        "tracking": {"uri": tracking_uri(cfg), "run": track.run_id},
        "versions": library_versions(),
    }


def _device(cfg: Config) -> torch.device:
    if cfg.ray.workers:
        from ray.train.torch import get_device

        return torch.device(get_device())
    return torch.device("cuda" if cfg.ray.gpus == "auto" and torch.cuda.is_available() else "cpu")


def _progress(track: Track, epochs: int, shown: tuple[str, ...]) -> Callable[[dict[str, float]], None]:
    """One line on the screen for a row of metrics."""

    def show(row: dict[str, float]) -> None:
        figures = "  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
        track.note(f"epoch {int(row['epoch'])}/{epochs}  {figures}")

    return show


def _reporter(payload: dict[str, Any], workers: Workers) -> Callable[[list[dict[str, float]]], None]:
    """Rank 0 keeps ``metrics.jsonl`` and MLflow up to date (a resumed run logs its earlier rows again); Ray Train hears from every rank."""
    logged = 0
    client = MlflowClient(payload["tracking"]["uri"]) if workers.rank == 0 else None
    on_ray = bool(payload["config"]["ray"]["workers"])

    def report(rows: list[dict[str, float]]) -> None:
        nonlocal logged
        if client is not None:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(Path(payload["folder"]) / cluster.METRICS, lines)
            for row in rows[logged:]:
                Track.log(client, payload["tracking"]["run"], row, int(row["epoch"]))
            logged = len(rows)
        if on_ray:
            import ray.train

            ray.train.report(rows[-1])

    return report


def _behavior_worker(payload: dict[str, Any]) -> None:
    cfg, workers, lake, folder = (
        Config.model_validate(payload["config"]),
        Workers.current(),
        Lake(payload["lake"], {}),
        Path(payload["folder"]),
    )
    read = payload["read"]
    columns = ["user_id", "history", "target"]
    histories = {
        split: Histories.from_batches(lake.batches("sequences", read["sequences"], columns, pc.field("split") == split)) for split in tables.SPLITS
    }
    counts = lake.read("item_stats", read["item_stats"], ["item_index", "interactions"]).sort_by("item_index")["interactions"].to_numpy()
    if len(histories["train"]) < workers.world:
        raise InputError(
            f"sequences version {read['sequences']} has {len(histories['train'])} users with at least two training events, "
            f"fewer than ray.workers {workers.world}: bring more interactions"
        )
    parts = {split: histories[split].part(workers.rank, workers.world) for split in tables.SPLITS}
    data = BehaviorData(parts["train"], parts["validation"], parts["test"], counts.astype(np.int64), f"sequences version {read['sequences']}")
    training = BehaviorTraining(cfg.behavior, data, folder, cfg.seed, workers, _device(cfg))
    result = training.run(_reporter(payload, workers))
    if workers.rank == 0:
        save_file({"embeddings": result.embeddings.contiguous(), "norms": result.norms.contiguous()}, folder / "result.safetensors")
        write_json(folder / "result.json", result.summary)


def _tokenizer_worker(payload: dict[str, Any]) -> None:
    cfg, workers, lake, folder = (
        Config.model_validate(payload["config"]),
        Workers.current(),
        Lake(payload["lake"], {}),
        Path(payload["folder"]),
    )
    version, settings = payload["read"]["item_features"], cfg.tokenizer
    mine = _modulo("item_index", workers) if workers.world > 1 else None
    shard = Shard(lambda columns: lake.batches("item_features", version, columns, mine), (*settings.content, BEHAVIOR))
    torch.manual_seed(cfg.seed)
    training = TokenizerTraining(
        artifact.build(settings, shard.widths),
        settings.training,
        shard,
        folder,
        cfg.seed,
        workers,
        f"item_features version {version}",
        _device(cfg),
    )
    rows = training.run(_reporter(payload, workers))
    if workers.rank == 0:
        last = rows[-1]
        quality = {name: last[name] for name in ("reconstruction", "utilisation", "entropy", "sparsity", "sparsity_target")}
        metrics = {**quality, "fvu": {m: last[f"fvu_{m}"] for m in training.tokenizer.widths}}
        facts = {"metrics": metrics, "inputs": payload["read"], "seed": cfg.seed, "versions": payload["versions"], "run": cfg.name}
        artifact.write(folder / "model", training.tokenizer, settings, facts)


def _modulo(column: str, workers: Workers) -> pc.Expression:
    """Rows whose ``column`` modulo the number of workers is this worker's rank."""
    field = pc.field(column)
    return pc.subtract(field, pc.multiply(pc.divide(field, workers.world), workers.world)) == workers.rank


def _item_ids(lake: Lake, version: int, items: int) -> pa.Array:
    table = lake.read("item_stats", version, ["item_index", "item_id"]).sort_by("item_index")
    assert table.num_rows == items
    return table["item_id"].combine_chunks()


def _embedding_batches(items: pa.Array, result: Mapping[str, torch.Tensor]) -> Iterator[pa.RecordBatch]:
    width = result["embeddings"].shape[1]
    for start in range(0, len(items), _CHUNK):
        part = result["embeddings"][start : start + _CHUNK].numpy()
        vectors = pa.ListArray.from_arrays(np.arange(0, part.size + 1, width, dtype=np.int32), pa.array(part.reshape(-1)))
        index, norms = np.arange(start, start + len(part)), result["norms"][start : start + _CHUNK].numpy()
        yield pa.RecordBatch.from_arrays(
            [items.slice(start, len(part)), pa.array(index), vectors, pa.array(norms)], schema=tables.BEHAVIOR_EMBEDDINGS
        )


def _register(cfg: Config, track: Track, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Log and register the artifact, unless it is, and let the alias ``candidate`` point at it."""
    name, client = cfg.tracking.model or f"adasid-{cfg.name}", track.client
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("digest") == manifest["digest"]]
    if known:
        version = known[0]
    else:
        track.artifact(folder)
        source = f"{client.get_run(track.run_id).info.artifact_uri}/{folder.name}"
        tags = {"digest": manifest["digest"], "tokenizer": manifest["tokenizer"]}
        version = client.create_model_version(name, source, track.run_id, tags=tags)
    client.set_registered_model_alias(name, "candidate", version.version)
