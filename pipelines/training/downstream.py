"""The stages that train downstream models on SIDs: a retriever and a click-through model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adasid import tables
from adasid.config import Config
from adasid.errors import InputError
from adasid.files import Location, remove, write_json
from adasid.tokenizers import artifact
from adasid.training.checkpoint import Checkpoints
from pipelines import scores, stage
from pipelines.engines.lake import Lake
from pipelines.engines.spark import session, uri
from pipelines.engines.tracking import StageContext
from pipelines.features import items, layout
from pipelines.publish import generations
from pipelines.run import Run
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage
from pipelines.training import launch, workers
from pipelines.training.payload import Catalogue, Task

_FORMAT = 7
"""Bump when downstream results change meaning, so that stale results are not reused."""
_SHOWN = ("loss", "validation_ndcg@10", "validation_recall@10", "validation_auc", "seconds", "validation_seconds")


def retrieval(cfg: Config, context: StageContext) -> None:
    """Train a retriever on ``sequences`` and the live ``sids`` in ``artifacts/retrieval/<key>``; log its metrics in
    MLflow."""
    result = fit(cfg, context, "retrieval", _live(cfg, context.lake))
    _show_result(context, result, ("recall@10", "ndcg@10", "recall@50"))
    if cfg.retrieval.repeatable and not result["repeats"]:
        context.facts["hint"] = (
            "no test user takes an item again; retrieval.repeatable: false leaves a user's items out of the lists"
        )


def ranking(cfg: Config, context: StageContext) -> None:
    """Train a click-through model on ``ranking_samples`` and the live ``sids`` in ``artifacts/ranking/<key>``; log its
    metrics in MLflow."""
    result = fit(cfg, context, "ranking", _live(cfg, context.lake))
    _show_result(context, result, ("auc", "gauc"))


def _live(cfg: Config, lake: Lake) -> Catalogue:
    """Return the live generation's SIDs."""
    generation = generations.live(lake)
    manifest = artifact.read_manifest(Run(cfg).of_name(generation.artifact))
    return Catalogue.of("sids", generation.sids_version, manifest)


def _show_result(context: StageContext, result: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Add the test metrics ``names`` of a result to the summary of the stage."""
    if "note" in result:
        context.note(result["note"])
    context.facts.update(
        {
            "best epoch": result["best_epoch"],
            **{f"test {name}": round(result["test"][name], 4) for name in names if name in result["test"]},
        }
    )
    context.facts.update({key: result[key] for key in ("labels", "split") if key in result})


def fit(cfg: Config, context: StageContext, task: Task, catalogue: Catalogue | None) -> dict[str, Any]:
    """Train ``cfg.retrieval`` or ``cfg.ranking`` on the SIDs of ``catalogue``, or on one token an item, unless its
    result exists; return the result."""
    step = declare(task, catalogue)
    inputs = resolve(cfg, context.lake, task, catalogue)
    if stage.run(step, cfg, context, inputs) is None:
        context.status = "up to date"
    done = folder_of(inputs, task) / "result.json"
    return dict(json.loads(done.read_text(encoding="utf-8")))


def resolve(cfg: Config, lake: Lake, task: Task, catalogue: Catalogue | None) -> Inputs:
    """Resolve the inputs of a downstream model, with the SIDs at the catalogue's version."""
    pins = {**lake.pins, catalogue.table: catalogue.version} if catalogue else lake.pins
    return stage.resolve(declare(task, catalogue), cfg, Lake(lake.root, pins))


def declare(task: Task, catalogue: Catalogue | None) -> Stage:
    """Declare the training of ``cfg.retrieval`` or ``cfg.ranking`` on the SIDs of ``catalogue``; None: on one token an
    item."""
    events = "sequences" if task == "retrieval" else "ranking_samples"

    def train(inputs: Inputs, context: StageContext) -> dict[str, int]:
        _train_downstream(inputs, context, task, events, catalogue)
        return {}

    return Stage(
        task,
        "ray",
        reads=lambda cfg: (events, "item_stats", *((catalogue.table,) if catalogue else ())),
        writes=stage.nothing,
        also=("catalog_stats",),
        settings=lambda cfg, lake: {"format": _FORMAT, task: getattr(cfg, task), "seed": cfg.seed},
        body=train,
        prefix=task,
        uses=("tokenizer",) if catalogue else (),
        makes=(task,),
        fresh=lambda inputs, lake: (folder_of(inputs, task) / "result.json").exists(),
    )


def _train_downstream(
    inputs: Inputs, context: StageContext, task: Task, events: str, catalogue: Catalogue | None
) -> None:
    cfg, lake, outer = inputs.cfg, inputs.lake, Run(inputs.cfg).lake
    folder = folder_of(inputs, task)
    launch.check_same_run({table: inputs.input_hashes[table] for table in (events, "item_stats")})
    layout.check(lake, events)
    if task == "ranking" and "in_history" not in lake.schema("ranking_samples").names:
        raise InputError(
            "ranking_samples has no column 'in_history', so that it is of another version of adasid: run "
            "jobs/build_features.py again"
        )
    if catalogue:
        items.check(cfg, outer)
        items.check_split(cfg, outer)  # SIDs of another split could know its test events
    if not (folder / workers.OUTCOME).exists():
        payload = launch.payload(cfg, lake, inputs.versions, folder).model_copy(update={"catalogue": catalogue})
        launch.fit(getattr(workers, task), payload, context, task, getattr(cfg, task).epochs, _SHOWN)
    split = {"split": _ranking_split(cfg, lake)} if task == "ranking" else {}
    result: dict[str, Any] = {**split, **_outcome(cfg, folder), "mlflow_run": context.run_id}
    figures = {
        f"{part}_{name}": value for part in ("test", "test_repeatable") for name, value in result.get(part, {}).items()
    }
    context.metrics(figures)
    context.artifact(folder / workers.OUTCOME)
    write_json(folder / "result.json", result)  # written last: its existence means that the metrics were logged
    Checkpoints(folder / "checkpoints").clear()


def folder_of(inputs: Inputs, task: Task) -> Location:
    """Return the folder of the model of these inputs; it may not exist yet."""
    return Run(inputs.cfg).artifact(task, inputs.hash)


def _outcome(cfg: Config, folder: Location) -> dict[str, Any]:
    """Return the workers' outcome; where they wrote their scores in shards, add the metrics that Spark computes from
    them."""
    outcome: dict[str, Any] = json.loads((folder / workers.OUTCOME).read_text(encoding="utf-8"))
    if "scores" in outcome:
        shards = [uri(folder / "scores" / name) for name in outcome.pop("scores")]
        spark = session(cfg.spark, size=in_place.size(Run(cfg).lake, "ranking_samples"))
        strata = scores.ranking_metrics(spark.read.parquet(*shards))
        outcome["test"] = {key: strata["all"][key] for key in ("auc", "gauc") if key in strata["all"]}
        outcome["strata"] = {name: strata[name] for name in ("all", *tables.STRATA) if name in strata}
        write_json(folder / workers.OUTCOME, outcome)
    remove(folder / "scores")
    return outcome


def _ranking_split(cfg: Config, lake: Lake) -> str:
    """Return how ``ranking_samples`` are split, as build_features recorded in ``catalog_stats``."""
    row = lake.read("catalog_stats").to_pylist()[0]
    return str(row.get("ranking_split") or cfg.features.split)
