"""Drive the training stages: behaviour embeddings, tokenizer and downstream models. ``pipelines/workers.py`` fits them
on Ray Train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file

from adasid import tables
from adasid.config import Config
from adasid.errors import InputError
from adasid.files import write_json
from adasid.report.words import DASH
from adasid.tokenizers import artifact
from adasid.tokenizers.artifact import Manifest
from adasid.training.checkpoint import Checkpoints
from pipelines import scores, stage, staleness, workers
from pipelines.engines import cluster
from pipelines.engines.lake import Lake
from pipelines.engines.spark import session
from pipelines.engines.spark import versions as library_versions
from pipelines.engines.tracking import StageContext
from pipelines.features import items, pairs
from pipelines.publish import generations
from pipelines.run import Run
from pipelines.stage import Inputs, Stage

_CHUNK = 50_000
_FORMAT = 1
"""Bump when downstream results change meaning, so that stale results are not reused."""

Task = Literal["retrieval", "ranking"]
Catalogue = dict[str, Any]
"""The SIDs that a downstream model reads are given by ``table``, ``version``, and ``slots`` of their tokenizer."""


def behavior(cfg: Config, context: StageContext) -> None:
    """Train SASRec on ``sequences`` and ``item_stats``; write ``behavior_embeddings``. Skipped where the items bring
    the embeddings."""
    if skipped := behavior_skipped(cfg, context.lake):
        context.status, text = skipped
        context.note(text)
    elif stage.run(BEHAVIOR, cfg, context) is None:
        context.status = "up to date"


def behavior_skipped(cfg: Config, lake: Lake) -> tuple[str, str] | None:
    """Return status and reason where the config asks for no training of behaviour embeddings, else None."""
    if cfg.behavior.source == "column":
        return "not needed", "the items bring their behaviour embeddings: nothing to train"
    if cfg.behavior.refresh == "keep" and lake.exists("behavior_embeddings"):
        text = "the existing embeddings are used; items without one count as without behaviour"
        return "kept", f"behavior.refresh is keep: {text}"
    return None


def _train_behavior(inputs: Inputs, context: StageContext) -> dict[str, int]:
    cfg, lake, read = inputs.cfg, inputs.lake, inputs.versions
    _same_run(inputs.input_hashes)
    folder = Run(cfg).artifact("behavior", inputs.hash)
    shown = ("loss", "validation_ndcg@10", "validation_recall@10", "test_recall@10", "spearman", "seconds")
    show = _progress(context, cfg.behavior.epochs, shown, folder)
    cluster.fit(workers.behavior, _payload(cfg, lake, read, folder), cfg.ray, f"behavior-{inputs.hash}", folder, show)
    result = load_file(folder / "result.safetensors")
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


def _same_run(input_hashes: Mapping[str, str]) -> None:
    """Raise InputError where tables of one stage come from different runs of it."""
    if len(set(input_hashes.values())) > 1:
        raise InputError(
            f"{' and '.join(input_hashes)} come from different runs of build_features (was one cut off?): run "
            "jobs/build_features.py again"
        )


def tokenizer(cfg: Config, context: StageContext) -> None:
    """Train on ``item_features``; write the artifact to ``artifacts/tokenizer/<key>/model`` and register it in MLflow
    as candidate."""
    inputs = stage.resolve(tokenizer_stage(), cfg, context.lake)
    staleness.check(context, inputs.versions["item_features"])
    manifest = fit_tokenizer(cfg, context, inputs=inputs)
    register(cfg, context, tokenizer_folder(inputs) / "model", manifest.digest, "candidate")


def tokenizer_stage(kind: str = "tokenizer") -> Stage:
    """Declare the training of ``cfg.tokenizer``, into a folder of ``artifacts/<kind>``."""

    def train(inputs: Inputs, context: StageContext) -> dict[str, int]:
        train_tokenizer(inputs.cfg, context, inputs.versions, tokenizer_folder(inputs, kind))
        return {}

    return Stage(
        "tokenizer",
        "ray",
        reads=lambda cfg: ("item_features", "item_pairs") if cfg.tokenizer.pairs else ("item_features",),
        writes=stage.nothing,
        settings=lambda cfg, lake: {"tokenizer": cfg.tokenizer, "seed": cfg.seed},
        body=train,
        prefix="tokenizer",
        makes=("tokenizer",),
        fresh=lambda inputs, lake: (tokenizer_folder(inputs, kind) / "model" / "manifest.json").exists(),
    )


def tokenizer_folder(inputs: Inputs, kind: str = "tokenizer") -> Path:
    """Return the folder of the tokenizer of these inputs; it may not exist yet."""
    return Run(inputs.cfg).artifact(kind, inputs.hash)


def fit_tokenizer(
    cfg: Config, context: StageContext, kind: str = "tokenizer", inputs: Inputs | None = None
) -> Manifest:
    """Train or fit ``cfg.tokenizer`` unless its artifact exists; return its manifest."""
    step = tokenizer_stage(kind)
    inputs = inputs or stage.resolve(step, cfg, context.lake)
    if cfg.tokenizer.pairs:
        items.check(cfg, context.lake)
        pairs.check(cfg, context.lake)
    model = tokenizer_folder(inputs, kind) / "model"
    if stage.run(step, cfg, context, inputs) is None:
        context.status = "up to date"
    return artifact.read_manifest(model)


class PreviousTable(TypedDict):
    """A ``version`` of ``previous_codes`` has the ``slots`` of its codes (kind and size of each) and the tolerance
    ``slack``."""

    version: int
    slots: list[list[str | int]]
    slack: float


def train_tokenizer(
    cfg: Config,
    context: StageContext,
    read: Mapping[str, int],
    folder: Path,
    start: Path | None = None,
    previous: PreviousTable | None = None,
) -> Manifest:
    """Train or fit the tokenizer on the versions ``read`` into ``folder/model``; return its manifest. ``start``:
    continue from this artifact, under ``retokenize.warm``; ``previous``: previous codes that training retains within
    its tolerance."""
    read = {**read, **({"previous_codes": previous["version"]} if previous else {})}
    shown = ("loss", "reconstruction", "codebook", "alignment", "sparsity", "utilisation", "entropy", "seconds")
    show = _progress(context, cfg.tokenizer.epochs.epochs if cfg.tokenizer.epochs else 1, shown, folder)
    payload = {
        **_payload(cfg, context.lake, read, folder),
        "start": str(start) if start else None,
        "previous": previous,
    }
    cluster.fit(workers.tokenizer, payload, cfg.ray, f"tokenizer-{folder.name}", folder, show)
    manifest = artifact.read_manifest(folder / "model")
    Checkpoints(folder / "checkpoints").clear()
    quality = manifest.metrics
    if quality.get("least_active", 1.0) < 0.001:
        context.note(
            "warning: the gate has switched a behaviour slot off for all items; it cannot come back: lower "
            "router.sparsity or router.item_weight"
        )
    facts = {"utilisation": round(quality["utilisation"], 4), "entropy": round(quality["entropy"], 3)}
    context.facts.update({"tokenizer": manifest.digest, **facts})
    context.facts.update({f"FVU {m}": round(value, 3) for m, value in quality["fvu"].items()})
    return manifest


def retrieval(cfg: Config, context: StageContext) -> None:
    """Train a retriever on ``sequences`` and the live ``sids`` in ``artifacts/retrieval/<key>``; log its metrics in
    MLflow."""
    result = fit_downstream(cfg, context, "retrieval", _live(context.lake))
    _told(context, result, ("recall@10", "ndcg@10", "recall@50"))
    if cfg.retrieval.repeatable and not result["repeats"]:
        context.facts["hint"] = (
            "no test user takes an item again; retrieval.repeatable: false leaves a user's items out of the lists"
        )


def ranking(cfg: Config, context: StageContext) -> None:
    """Train a click-through model on ``ranking_samples`` and the live ``sids`` in ``artifacts/ranking/<key>``; log its
    metrics in MLflow."""
    result = fit_downstream(cfg, context, "ranking", _live(context.lake))
    _told(context, result, ("auc", "gauc"))


def _live(lake: Lake) -> Catalogue:
    """Return the live generation's SIDs."""
    generation = generations.live(lake)
    manifest = artifact.read_manifest(Path(generation.artifact))
    return {"table": "sids", "version": generation.sids_version, "slots": manifest.slots}


def _told(context: StageContext, result: Mapping[str, Any], names: tuple[str, ...]) -> None:
    if "note" in result:
        context.note(result["note"])
    context.facts.update(
        {
            "best epoch": result["best_epoch"],
            **{f"test {name}": round(result["test"][name], 4) for name in names if name in result["test"]},
        }
    )
    context.facts.update({key: result[key] for key in ("labels", "split") if key in result})


def fit_downstream(cfg: Config, context: StageContext, task: Task, catalogue: Catalogue | None) -> dict[str, Any]:
    """Train ``cfg.retrieval`` or ``cfg.ranking`` on the SIDs of ``catalogue``, or on one token an item, unless its
    result exists; return the result."""
    step = downstream_stage(task, catalogue)
    inputs = resolve_downstream(cfg, context.lake, task, catalogue)
    if stage.run(step, cfg, context, inputs) is None:
        context.status = "up to date"
    done = downstream_folder(inputs, task) / "result.json"
    return dict(json.loads(done.read_text(encoding="utf-8")))


def resolve_downstream(cfg: Config, lake: Lake, task: Task, catalogue: Catalogue | None) -> Inputs:
    """Resolve the inputs of a downstream model, with the SIDs at the catalogue's version."""
    pins = {**lake.pins, catalogue["table"]: catalogue["version"]} if catalogue else lake.pins
    return stage.resolve(downstream_stage(task, catalogue), cfg, Lake(lake.root, pins))


def downstream_stage(task: Task, catalogue: Catalogue | None) -> Stage:
    """Declare the training of ``cfg.retrieval`` or ``cfg.ranking`` on the SIDs of ``catalogue``; None: on one token an
    item."""
    events = "sequences" if task == "retrieval" else "ranking_samples"

    def train(inputs: Inputs, context: StageContext) -> dict[str, int]:
        _train_downstream(inputs, context, task, events, catalogue)
        return {}

    return Stage(
        task,
        "ray",
        reads=lambda cfg: (events, "item_stats", *((catalogue["table"],) if catalogue else ())),
        writes=stage.nothing,
        also=("catalog_stats",),
        settings=lambda cfg, lake: {"format": _FORMAT, task: getattr(cfg, task), "seed": cfg.seed},
        body=train,
        prefix=task,
        uses=("tokenizer",) if catalogue else (),
        makes=(task,),
        fresh=lambda inputs, lake: (downstream_folder(inputs, task) / "result.json").exists(),
    )


def _train_downstream(
    inputs: Inputs, context: StageContext, task: Task, events: str, catalogue: Catalogue | None
) -> None:
    cfg, lake, outer = inputs.cfg, inputs.lake, Run(inputs.cfg).lake
    folder = downstream_folder(inputs, task)
    _same_run({table: inputs.input_hashes[table] for table in (events, "item_stats")})
    if task == "ranking" and "in_history" not in lake.schema("ranking_samples").names:
        raise InputError(
            "ranking_samples has no column 'in_history', so that it is of another version of adasid: run "
            "jobs/build_features.py again"
        )
    if catalogue:
        items.check(cfg, outer)
        items.check_split(cfg, outer)  # SIDs of another split could know its test events
    if not (folder / workers.OUTCOME).exists():
        shown = (
            "loss",
            "validation_ndcg@10",
            "validation_recall@10",
            "validation_auc",
            "seconds",
            "validation_seconds",
        )
        payload = {**_payload(cfg, lake, inputs.versions, folder), "catalogue": catalogue}
        show = _progress(context, getattr(cfg, task).epochs, shown, folder)
        cluster.fit(getattr(workers, task), payload, cfg.ray, f"{task}-{folder.name}", folder, show)
    split = {"split": _ranking_split(cfg, lake)} if task == "ranking" else {}
    result: dict[str, Any] = {**split, **_measured(cfg, folder), "mlflow_run": context.run_id}
    figures = {
        f"{part}_{name}": value for part in ("test", "test_repeatable") for name, value in result.get(part, {}).items()
    }
    context.metrics(figures)
    context.artifact(folder / workers.OUTCOME)
    write_json(folder / "result.json", result)  # written last: its existence means that the metrics were logged
    Checkpoints(folder / "checkpoints").clear()


def downstream_folder(inputs: Inputs, task: Task) -> Path:
    """Return the folder of the model of these inputs; it may not exist yet."""
    return Run(inputs.cfg).artifact(task, inputs.hash)


def _measured(cfg: Config, folder: Path) -> dict[str, Any]:
    """Return the workers' outcome; where they wrote their scores in shards, add the metrics that Spark computes from
    them."""
    outcome: dict[str, Any] = json.loads((folder / workers.OUTCOME).read_text(encoding="utf-8"))
    if "scores" in outcome:
        shards = [str(folder / "scores" / name) for name in outcome.pop("scores")]
        strata = scores.ranking_metrics(session(cfg.spark).read.parquet(*shards))
        outcome["test"] = {key: strata["all"][key] for key in ("auc", "gauc") if key in strata["all"]}
        outcome["strata"] = {name: strata[name] for name in ("all", *tables.STRATA) if name in strata}
        write_json(folder / workers.OUTCOME, outcome)
    shutil.rmtree(folder / "scores", ignore_errors=True)
    return outcome


def _ranking_split(cfg: Config, lake: Lake) -> str:
    """Return how ``ranking_samples`` are split, as build_features recorded in ``catalog_stats``."""
    row = lake.read("catalog_stats").to_pylist()[0]
    return str(row.get("ranking_split") or cfg.features.split)


def _payload(cfg: Config, lake: Lake, read: Mapping[str, int], folder: Path) -> dict[str, Any]:
    return {
        "config": cfg.model_dump(mode="json"),
        "lake": lake.root,
        "read": dict(read),
        "folder": str(folder),
        "versions": library_versions(),
    }


def _progress(
    context: StageContext, epochs: int, shown: tuple[str, ...], folder: Path
) -> Callable[[dict[str, float]], None]:
    """Log every epoch's metrics to MLflow (those of a resumed run at once), and print one line an epoch."""
    earlier = cluster.rows(folder)
    for row in earlier:
        context.metrics(row, int(row["epoch"]))
    logged = {row["epoch"] for row in earlier}

    def show(row: dict[str, float]) -> None:
        if row["epoch"] not in logged:
            logged.add(row["epoch"])
            context.metrics(row, int(row["epoch"]))
        figures = "  ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
        context.note(f"epoch {int(row['epoch'])}/{epochs}  {figures}")

    return show


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


def register(
    cfg: Config, context: StageContext, folder: Path, tokenizer: str, alias: Literal["candidate", "champion"]
) -> None:
    """Set ``alias`` of the registered model to the tokenizer (its digest), whose artifact in ``folder`` is logged
    unless it was: ``candidate`` is the one trained last by jobs/train.py, ``champion`` that of the live semantic
    IDs."""
    name, client = cfg.tracking.model or f"adasid-{cfg.name}", context.client
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("digest") == tokenizer]
    if known:
        version = known[0]
    elif (folder / "manifest.json").exists():
        context.artifact(folder)
        source = f"{client.get_run(context.run_id).info.artifact_uri}/{folder.name}"
        tags = {"digest": tokenizer, "tokenizer": artifact.read_manifest(folder).tokenizer}
        version = client.create_model_version(name, source, context.run_id, tags=tags)
    else:
        context.note(f"tokenizer {tokenizer} is neither in MLflow nor in {folder}: {alias} stays")
        return
    client.set_registered_model_alias(name, alias, version.version)
