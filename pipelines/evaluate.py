"""Evaluate tokenizers downstream: train every retriever and ranker of ``evaluate`` on every tokenizer's SIDs, seed by
seed; write one table and one page.

A cell is a tokenizer, a model and a seed. Its result is written as soon as it is computed, so an interrupted command
resumes with the next cell.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from adasid import tables
from adasid.config import Config, Ranking, Retrieval
from adasid.data.sequences import Histories
from adasid.errors import InputError
from adasid.files import Location
from adasid.metrics.retrieval import DEEPEST, averages, gains
from adasid.report import evaluation
from adasid.report.cells import flat
from adasid.tokenizers import artifact
from adasid.tokenizers.artifact import Manifest
from adasid.training.retrieval import Ranked, by_stratum
from pipelines import report, stage
from pipelines.engines import cluster, tracking
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.features import layout, pairs
from pipelines.publish.collisions import ranked
from pipelines.publish.encode import encode
from pipelines.run import Run
from pipelines.sources import in_place
from pipelines.stage import Inputs, Stage
from pipelines.training import downstream, tokenizer
from pipelines.training.payload import Catalogue, Task

Row = dict[str, Any]
_KIND = "compare"
_TOKENIZER = tokenizer.declare(_KIND)


class Cell(NamedTuple):
    """A cell is one training. ``model``: label of the retriever or ranker; ``config``: with the cell's seed, tokenizer
    and model; ``sids``: whether items are represented by SIDs."""

    task: Task
    tokenizer: str
    model: str
    config: Config
    sids: bool


def run(cfg: Config, context: StageContext, train_cells: bool = True) -> None:
    """Train every cell that has no result yet, then write ``<run>/report/evaluation``. Without ``train_cells``: report
    the existing results alone."""
    cells = _cells(cfg)
    if not cells:
        raise InputError(
            "evaluate names no tokenizer with a model, and no control: name what to evaluate (conf/demo.yaml shows how)"
        )
    if train_cells:
        if any(cell.config.tokenizer.pairs for cell in cells if cell.sids):
            stage.run(pairs.ITEM_PAIRS, cfg, context)
        try:
            results = _results(cfg, cells, context)
        finally:
            cluster.shutdown()
    else:
        results = {index: row for index, cell in enumerate(cells) if (row := _known(cell, context.lake)) is not None}
    rows = [_popularity(cfg, context.lake)] if any(cell.task == "retrieval" for cell in cells) else []
    rows += [
        {"task": cells[index].task, "tokenizer": cells[index].tokenizer, "model": cells[index].model, **results[index]}
        for index in sorted(results)
    ]
    if not rows:
        raise InputError("no cell of evaluate has a result yet: run jobs/evaluate.py without --report")
    folder = Run(cfg).report("evaluation")
    report.write(
        folder, evaluation.build(cfg.name, rows, cfg.evaluate, len(cells) - len(results)), [flat(row) for row in rows]
    )
    context.artifact(folder)
    context.facts.update(cells=len(results), missing=len(cells) - len(results), page=str(folder / "index.html"))
    print(evaluation.text(rows))


def _results(cfg: Config, cells: list[Cell], context: StageContext) -> dict[int, Row]:
    """Return the result of each cell by its index, training ``evaluate.parallel`` cells at a time. The first failure
    ends the command once the running cells have finished."""
    results: dict[int, Row] = {
        index: row for index, cell in enumerate(cells) if (row := _known(cell, context.lake)) is not None
    }
    todo = [index for index in range(len(cells)) if index not in results]
    tokenizers = {
        (cell.tokenizer, cell.config.seed): Lock() for cell in cells
    }  # the first cell that needs a tokenizer trains it, the others wait
    started = time.monotonic()
    with ThreadPoolExecutor(cfg.evaluate.parallel) as pool:
        running = {
            pool.submit(_result, cells[index], tokenizers[cells[index].tokenizer, cells[index].config.seed]): index
            for index in todo
        }
        try:
            for number, future in enumerate(as_completed(running), 1):
                results[running[future]] = future.result()
                left = (time.monotonic() - started) / number * (len(todo) - number) / 60
                context.note(f"{len(cells) - len(todo) + number} of {len(cells)} done, about {left:.0f} min left")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _result(cell: Cell, lock: Lock) -> Row:
    with tracking.stage(
        cell.config, f"evaluate {cell.tokenizer}, {cell.model}, seed {cell.config.seed}", journal=False
    ) as context:
        catalogue: Catalogue | None = None
        if cell.sids:
            with lock:
                catalogue = _catalogue(cell, context)
        return _of(downstream.fit(cell.config, context, cell.task, catalogue), catalogue)


def _cells(cfg: Config) -> list[Cell]:
    e = cfg.evaluate
    models: list[tuple[Task, str, Retrieval | Ranking]] = [("retrieval", *pair) for pair in e.retrievers.items()]
    models += [("ranking", *pair) for pair in e.rankers.items()]
    controls: list[tuple[Task, str, Retrieval | Ranking]] = [("retrieval", *pair) for pair in e.controls.items()]
    controls += [("ranking", *pair) for pair in e.ranking_controls.items()]

    def cells(label: str, chosen: list[tuple[Task, str, Retrieval | Ranking]], sids: bool) -> list[Cell]:
        update = {"tokenizer": cfg.compare.tokenizers[label]} if sids else {}
        seeds = (*e.seeds, *e.more_seeds.get(label, ()))
        everything = {model: seeds for _, model, _ in chosen}
        wanted = e.models.get(label, everything) if sids else everything
        return [
            Cell(
                task,
                label,
                model if sids else "item ids",
                cfg.model_copy(update={"seed": seed, task: settings, **update}),
                sids,
            )
            for seed in dict.fromkeys(seed for some in wanted.values() for seed in some)
            for task, model, settings in chosen
            if seed in wanted.get(model, ())
        ]

    few = [model for index, model in enumerate(models) if index == 0 or model[0] == "ranking"]
    result = [
        cell
        for label in e.labels
        for cell in cells(label, models if label in (*e.tokenizers, *e.models) else few, True)
    ]
    return result + [cell for control in controls for cell in cells(control[1], [control], False)]


def _known(cell: Cell, lake: Lake) -> Row | None:
    """Return the cell's result if it exists, without any training."""
    catalogue: Catalogue | None = None
    if cell.sids:
        if cell.config.tokenizer.pairs and not (
            lake.exists(pairs.TABLE) and stage.check_fresh(pairs.ITEM_PAIRS, cell.config, lake)
        ):
            return None
        inputs = stage.resolve(_TOKENIZER, cell.config, lake)
        model = tokenizer.folder_of(inputs, _KIND) / "model"
        if not (model / "manifest.json").exists():
            return None
        manifest = artifact.read_manifest(model)
        table = _table(inputs)
        if not lake.fresh(manifest.digest, table):
            return None
        catalogue = Catalogue.of(table, lake.version(table), manifest)
    inputs = downstream.resolve(cell.config, lake, cell.task, catalogue)
    path = downstream.folder_of(inputs, cell.task) / "result.json"
    return _of(json.loads(path.read_text(encoding="utf-8")), catalogue) if path.exists() else None


def _of(result: Row, catalogue: Catalogue | None) -> Row:
    """Add the size of the SIDs to ``result``, such as 6×100."""
    sizes = Counter(slot.size for slot in catalogue.slots) if catalogue else {}
    return {**result, "codes": " + ".join(f"{slots}×{size}" for size, slots in sizes.items())}


def _catalogue(cell: Cell, context: StageContext) -> Catalogue:
    """Return the SIDs of the cell's tokenizer; train and write them first if they are missing."""
    cfg = cell.config
    inputs = stage.resolve(_TOKENIZER, cfg, context.lake)
    model = tokenizer.folder_of(inputs, _KIND) / "model"
    if not (model / "manifest.json").exists():
        with tracking.stage(cfg, f"tokenizer {cell.tokenizer}, seed {cfg.seed}", journal=False) as inner:
            tokenizer.fit(cfg, inner, _KIND, inputs)
    manifest, table = artifact.read_manifest(model), _table(inputs)
    stage.run(_trial_sids(table, model, manifest), cfg, context)
    return Catalogue.of(table, context.lake.version(table), manifest)


def _trial_sids(table: str, model: Location, manifest: Manifest) -> Stage:
    """Declare the stage that writes the SIDs of a compared tokenizer into the trial table ``table``."""

    def write(inputs: Inputs, context: StageContext) -> dict[str, int]:
        cfg, lake = inputs.cfg, inputs.lake
        spark = engine.session(cfg.spark, size=in_place.size(lake, "item_features"))
        features = engine.read(spark, lake, "item_features")
        encoded = encode(spark, features, model, manifest, cfg.sids.batch)
        rows = ranked(encoded, manifest.digest, 0)
        return {table: engine.write(rows, lake, table, tables.SIDS, manifest.digest, sources=inputs.versions)}

    return Stage(
        f"sids of {table}",
        "spark",
        reads=lambda cfg: ("item_features",),
        writes=lambda cfg: (table,),
        settings=lambda cfg, lake: {"tokenizer": manifest.digest},
        body=write,
        prefix="trial sids",
        fresh=lambda inputs, lake: lake.fresh(manifest.digest, table),
    )


def _table(inputs: Inputs) -> str:
    return f"trials/{inputs.hash}"


def _popularity(cfg: Config, lake: Lake) -> Row:
    """Evaluate the popularity baseline: every user gets the items in the order of their training counts, ties at
    random."""
    layout.check(lake, "sequences")
    stats = lake.read("item_stats", columns=["item_index", "stratum", "interactions"]).sort_by("item_index")
    strata = pc.index_in(stats["stratum"].combine_chunks(), pa.array(tables.STRATA))
    kinds = torch.from_numpy(strata.to_numpy().astype(np.int64))
    chance = np.random.default_rng(0).permutation(stats.num_rows)
    popularity_rank = np.lexsort((chance, -stats["interactions"].to_numpy())).argsort()
    ranked = Ranked.none()
    for rows in lake.batches("sequences", None, ["user_index", "history", "target"], pc.field("split") == "test"):
        if rows.num_rows:
            users = Histories.from_batches([rows])
            target = torch.from_numpy(users.targets)
            target_rank = popularity_rank[users.targets]
            ranks = everywhere = torch.from_numpy(target_rank + 1)
            if not cfg.retrieval.repeatable:
                user = np.repeat(np.arange(len(users)), np.diff(users.starts))
                user, seen = np.unique(np.stack([user, users.items]), axis=1)
                ranks = ranks - torch.from_numpy(
                    np.bincount(user[popularity_rank[seen] < target_rank[user]], minlength=len(users))
                )
                ranks[user[seen == users.targets[user]]] = DEEPEST + 1
            ranked += Ranked.of(ranks, everywhere, ranks, kinds[target], torch.ones_like(target))
    return {
        "task": "retrieval",
        "tokenizer": "popularity",
        "model": "item ids",
        "seed": cfg.seed,
        "test": averages(ranked.targets.numpy(), gains()),
        "test_users": int(ranked.targets.sum()),
        "test_repeatable": averages(ranked.everywhere.numpy(), gains()),
        "strata": by_stratum(ranked, cfg.seed),
    }
