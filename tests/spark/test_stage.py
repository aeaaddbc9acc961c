"""Test that stages read what they hashed, whatever is committed meanwhile, and only what they declare; a plan says why
a stage runs."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from adasid import tables
from adasid.config import Config, build
from adasid.errors import InputError
from adasid.tokenizers import artifact
from pipelines import chain, evaluate, ingest, report, sids, stage
from pipelines.engines import tracking
from pipelines.engines.lake import Lake
from pipelines.features import events, items, pairs
from pipelines.nightly import upkeep
from pipelines.run import Run
from pipelines.training import behavior, downstream, tokenizer
from tests.spark.test_features_run import catalogue, config, embed, prepare, run

KMEANS = {"name": "rq-kmeans", "levels": 2, "codebook_size": 4, "content": ["text"]}
PAIRS = {"features": {"max_rejected": 0.2, "ranking_split": "same", "pairs": {"method": "cooccurrence"}}}
COUNTED = "item_stats", "interactions", "item_id"


def declared(cfg: Config) -> list[stage.Stage]:
    lake = Run(cfg).lake
    own = [
        *(step for step in chain.declared(cfg, lake) if isinstance(step, stage.Stage)),
        behavior.BEHAVIOR,
        pairs.ITEM_PAIRS,
        downstream.declare("retrieval", None),
        downstream.declare("ranking", None),
        evaluate._trial_sids("trials/x", Path("x"), {"digest": "d"}),
    ]
    return list({step.name: step for step in own}.values())


def settings(folder):
    return config(folder, tokenizer=KMEANS, ray={"workers": 0}, **PAIRS)


@pytest.fixture(scope="module")
def made(spark, tmp_path_factory):
    """Folder of a run with features."""
    folder = tmp_path_factory.mktemp("stages")
    cfg = settings(folder)
    lake = prepare(spark, cfg, *catalogue())
    run(cfg, "events")
    embed(lake)
    run(cfg, "items")
    return folder


@pytest.fixture
def ready(made, tmp_path):
    """A config and its lake: a copy of the run, one for each test."""
    cfg = settings(tmp_path)
    shutil.copytree(settings(made).run_dir, cfg.run_dir, dirs_exist_ok=True)
    return cfg, Run(cfg).lake


def meanwhile(monkeypatch, table, commit):
    """Let another process commit to ``table`` as soon as a stage has hashed its inputs."""
    original, waiting = Lake.input_hashes, [table]

    def input_hashes(self, versions):
        found = original(self, versions)
        if waiting and table in versions:
            waiting.clear()
            commit()
        return found

    monkeypatch.setattr(Lake, "input_hashes", input_hashes)


def changed(lake, table, schema, change):
    """Commit the table with its rows changed."""
    rows = change(lake.read(table).to_pylist())
    lake.write(table, schema, pa.Table.from_pylist(rows, schema).to_batches(), "another process")


def without_first_user(rows):
    return [row for row in rows if row["user_id"] != rows[0]["user_id"]]


@pytest.mark.parametrize(
    ("step", "table", "schema", "change"),
    [
        (events.EVENTS, "interactions", tables.INTERACTIONS, without_first_user),
        (pairs.ITEM_PAIRS, "ranking_samples", tables.RANKING_SAMPLES, lambda rows: rows[: len(rows) // 2]),
        (items.ITEM_FEATURES, "items", tables.items(("text", "visual")), lambda rows: rows[1:]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_output_is_made_of_the_version_that_was_hashed(ready, step, table, schema, change, monkeypatch):
    cfg, lake = ready
    percentiles = cfg.features.model_copy(update={"norm_percentiles": (5.0, 95.0)})
    cfg = cfg.model_copy(update={"seed": cfg.seed + 1, "features": percentiles})
    output = step.writes(cfg)[0]
    meanwhile(monkeypatch, table, lambda: changed(lake, table, schema, change))
    if step is events.EVENTS:  # one run of ingest writes both tables
        meanwhile(monkeypatch, "items", lambda: changed(lake, "items", tables.items(("text", "visual")), list))
    with tracking.stage(cfg, step.name) as context:
        inputs = stage.run(step, cfg, context)
    assert inputs and inputs.versions[table] == 0 and lake.version(table) == 1
    assert (lake.lineage(output)[table], lake.input_hash(output)) == (0, inputs.hash)
    assert not stage.check_fresh(step, cfg, lake), "the next run must notice the commit"
    rows = sorted(map(str, lake.read(output).to_pylist()))
    with tracking.stage(cfg, step.name) as context:
        assert stage.run(step, cfg, context)
    assert sorted(map(str, lake.read(output).to_pylist())) != rows, (
        "the rows were of the version that was committed meanwhile"
    )


def test_a_tokenizer_is_trained_on_the_version_that_was_hashed(ready, monkeypatch):
    cfg, lake = ready
    schema = tables.item_features(("text", "visual"))
    meanwhile(monkeypatch, "item_features", lambda: changed(lake, "item_features", schema, lambda rows: rows[1:]))
    with tracking.stage(cfg, "tokenizer") as context:
        tokenizer.run(cfg, context)
    step = tokenizer.declare()
    pinned = stage.resolve(step, cfg, Lake(lake.root, {"item_features": 0}))
    manifest = artifact.read_manifest(tokenizer.folder_of(pinned) / "model")
    assert manifest.inputs == {"item_features": 0} and lake.version("item_features") == 1
    assert not stage.check_fresh(step, cfg, lake), "the next run must notice the commit"


def test_a_body_reads_and_writes_only_what_its_stage_declares(ready):
    cfg, lake = ready
    inputs = stage.resolve(pairs.ITEM_PAIRS, cfg, lake)
    assert inputs.lake.read("item_stats").num_rows == 30
    with pytest.raises(stage.Undeclared, match="stage item pairs reads sequences, which it does not declare"):
        inputs.lake.read("sequences")
    with pytest.raises(stage.Undeclared, match="stage item pairs writes item_stats, which it does not declare"):
        inputs.lake.write_rows("item_stats", tables.ITEM_STATS, [], "x")


@pytest.mark.parametrize("kind", ["synthetic", "tables"])
def test_no_table_has_two_writers(kind, tmp_path):
    source = {"kind": kind, **({"tables": {"items": "i", "interactions": "e"}} if kind == "tables" else {})}
    cfg = build({"name": "t", "runs_dir": str(tmp_path), "source": source, "tokenizer": {"name": "quasid"}})
    writers = Counter(table for step in declared(cfg) for table in step.writes(cfg))
    assert {table: number for table, number in writers.items() if number > 1} == {}
    assert {"items", "item_stats", "item_features", "richness_stats", "catalog_stats", "sids"} <= set(writers)
    added = {
        table for step in (ingest.INGEST, events.EVENTS, report.REPORT, sids.declare(cfg)) for table in step.appends
    }
    assert added == {"rejected_rows"} and not added & set(writers)


def test_the_plan_says_what_runs_and_why(ready, capsys):
    cfg, lake = ready
    shutil.rmtree(lake.path("behavior_embeddings"))
    steps = {step.stage: step for step in plan_of(cfg, lake)}
    assert (steps["features"].status, steps["item pairs"].status) == ("up to date", "runs")
    assert steps["item pairs"].why == "no output yet (table item_pairs)"
    assert steps["behavior"].status == "runs"
    assert steps["item features"].why == "reads behavior_embeddings, which behavior writes"
    assert steps["sids"].why == "reads item_features, which item features writes and tokenizer, which tokenizer makes"
    core = cfg.model_copy(update={"features": cfg.features.model_copy(update={"k_core": 5})})
    assert {step.stage: step.why for step in plan_of(core, lake)}["features"] == "features.k_core 0 -> 5"
    changed(lake, "interactions", tables.INTERACTIONS, without_first_user)
    changed(lake, "items", tables.items(("text", "visual")), list)
    why = "items is at version 1, was 0; interactions is at version 1, was 0"
    assert {step.stage: step.why for step in plan_of(cfg, lake)}["features"] == why
    capsys.readouterr()
    run(cfg, "events")
    assert f"features runs: {why}" in capsys.readouterr().err


def plan_of(cfg, lake):
    """The plan without ingest, whose tables the test has written itself."""
    quasid = cfg.model_copy(update={"tokenizer": build({"tokenizer": {"name": "quasid"}}).tokenizer})
    return [step for step in chain.plan(quasid, after="ingest")]


def as_format_1(lake):
    """What the version before format 2 left of the same run."""
    row = lake.read("richness_stats").to_pylist()[0] | lake.read("catalog_stats").to_pylist()[0]
    old = pa.schema(
        [pa.field("run", pa.string(), False), *list(tables.CATALOG_STATS)[1:], *list(tables.RICHNESS_STATS)[1:]]
    )
    row |= {"run": row["input_hash"]}
    lake.write_rows("catalog_stats", old, [row], lake.input_hash("item_features"))
    rejected = lake.read("rejected_rows")
    rejected = rejected.rename_columns(["run", *rejected.column_names[1:]])
    lake.write("rejected_rows", rejected.schema, rejected.to_batches(), lake.input_hash("rejected_rows"))
    shutil.rmtree(lake.path("richness_stats"))
    (Path(lake.root) / "format.json").unlink()


def test_a_lake_of_the_version_before_is_refused_then_migrated(ready):
    cfg, lake = ready
    names = ("catalog_stats", "richness_stats", "rejected_rows")

    def rows():
        return {name: sorted(lake.read(name).to_pylist(), key=str) for name in names}  # a table has no order

    before = rows()
    as_format_1(lake)
    with pytest.raises(
        InputError, match=r"has format 1, this version .* reads 2: run `python jobs/maintain.py .* --migrate`"
    ):
        run(cfg)
    with tracking.stage(cfg, "migrate", migrates=True) as context:
        upkeep.migrate(cfg, context)
    assert rows() == before
    assert stage.check_fresh(events.EVENTS, cfg, lake) and stage.check_fresh(items.ITEM_FEATURES, cfg, lake)
    with tracking.stage(cfg, "migrate", migrates=True) as context:
        upkeep.migrate(cfg, context)
    assert context.status == "up to date"
    (Path(lake.root) / "format.json").write_text('{"format": 3}')
    with pytest.raises(InputError, match=r"has format 3, this version .* reads 2: it was written by a newer version"):
        run(cfg)
