"""Test what jobs/maintain.py removes and keeps: thirty generations on real Delta tables, with their files and runs."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from adasid import tables
from pipelines.engines.tracking import stage
from pipelines.nightly import retention, upkeep
from pipelines.publish import generations
from pipelines.publish.lease import Lease
from pipelines.run import Run
from pipelines.training.register import model_name
from tests.unit.test_generations import candidate

NIGHTS = 8
OLD = time.time() - 100 * 86_400
RETOKENIZE = {
    "keep": 5,
    "lineage_days": 0,
    "grace_hours": 0,
    "retention": {"sources": 2, "exports": 3, "artifact_days": 30, "tracking_days": 90, "rejected": 2},
}


def write(lake, name, text, digest):
    rows = pa.table({"item_id": [text] * 1000})
    return lake.write(name, rows.schema, rows.to_batches(), digest)


def aged(folder):
    """Make a folder and its files a hundred days old."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (OLD, OLD))


def model(cfg, kind, key, digest):
    folder = Run(cfg).artifact(kind, key)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "manifest.json").write_text(json.dumps({"digest": digest, "inputs": {"item_features": 0}}))
    (folder / "model" / "weights").write_bytes(bytes(1000))
    aged(folder)
    return folder


def night(cfg, context, number):
    """A generation with its own tokenizer, exports and refused rows."""
    lake, folder = context.lake, model(cfg, "tokenizer", f"key{number}", f"digest{number}")
    inputs = {"item_features": write(lake, "item_features", f"f{number}", f"features{number}")}
    row = {"input_hash": f"features{number}", "table": "items", "row_hash": "h", "reason": "r", "row": "{}"}
    refused = pa.Table.from_pylist([{**row, "copies": 1}], tables.REJECTED_ROWS)
    lake.put("rejected_rows", refused, f"input_hash = 'features{number}'", f"features{number}")
    made = candidate(generation=number, tokenizer=f"digest{number}", artifact=str(folder / "model"), inputs=inputs)
    parent = generations.pointer(lake)
    generations.publish(
        context, f"night{number}", made, parent, lambda: write(lake, "sids", f"s{number}", f"night{number}"), None
    )
    for name in (str(number), f".{number}.draft"):
        (Run(cfg).exports / name).mkdir(parents=True)
        (Run(cfg).exports / name / "codes.npy").write_bytes(bytes(1000))


@pytest.fixture
def run(make_config):
    cfg = make_config(retokenize=RETOKENIZE)
    with stage(cfg, "nights", journal=False) as context:
        for number in range(1, NIGHTS + 1):
            night(cfg, context, number)
        write(context.lake, "items", "i", "ingest")
    return cfg


def maintained(cfg):
    with stage(cfg, "maintain", journal=False) as context:
        upkeep.maintain(cfg, context)
    return context


def readable(lake, name):
    return [version for version in range(lake.version(name) + 1) if not lake.missing(name, version)]


def test_tables_models_and_exports_are_bounded_and_what_is_needed_stays(run):
    before = {row.generation: row for row in generations.history(Run(run).lake)}
    model(run, "tokenizer", "unused", "other")
    model(run, "retrieval", "last", "other")
    record = Run(run).record("retrieval")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"hash": "last"}))
    young = model(run, "ranking", "young", "other")
    os.utime(young / "model" / "weights")
    context = maintained(run)
    lake = context.lake
    models = {path.name for path in Run(run).artifacts.glob("*/key*")}
    assert models == {f"key{number}" for number in (4, 5, 6, 7, 8)}
    assert not Run(run).artifact("tokenizer", "unused").exists() and young.exists()
    assert Run(run).artifact("retrieval", "last").exists()
    assert {path.name for path in Run(run).exports.glob("*")} == {"6", "7", "8"}
    for number, row in before.items():
        assert bool(lake.missing("sids", row.sids_version)) == (number < 4)
        assert bool(lake.missing("item_features", row.inputs["item_features"])) == (number < 7)
    assert set(lake.read("rejected_rows")["input_hash"].to_pylist()) == {"features7", "features8"}
    assert "4 models removed" in context.facts["artifacts"] and "13 generations" in context.facts["exports"]
    again = maintained(run)
    assert "0 models removed" in again.facts["artifacts"] and "0 generations removed" in again.facts["exports"]


def test_after_a_roll_back_the_live_generation_and_its_parent_stay(run):
    with stage(run, "rollback", journal=False) as context:
        generations.go_back(context, 2)
    context = maintained(run)
    kept = {row.generation: row for row in generations.history(context.lake) if row.generation in {1, 2, 4, 8}}
    for row in kept.values():
        assert not context.lake.missing("sids", row.sids_version) and Path(row.artifact).exists()
    assert not context.lake.missing("item_features", kept[2].inputs["item_features"])
    assert {path.name for path in Run(run).exports.glob("*")} == {"1", "2", "6", "7", "8"}


def test_models_with_an_alias_stay_and_files_of_old_runs_go_but_not_their_metrics(run, monkeypatch):
    name = model_name(run)
    stages = {}
    for label, digest, alias in (("aliased", "digest1", "previous"), ("unused", "digest2", None)):
        with stage(run, label, journal=False) as context:
            client = context.client
            context.metrics({"figure": 7.0})
            context.artifact(Run(run).artifact("tokenizer", digest.replace("digest", "key")) / "model")
            if label == "aliased":
                client.create_registered_model(name)
            source = f"{client.get_run(context.run_id).info.artifact_uri}/model"
            version = client.create_model_version(name, source, context.run_id, tags={"digest": digest})
            if alias:
                client.set_registered_model_alias(name, alias, version.version)
            stages[label] = context.run_id
    folders = {label: Run(run).tracked_artifacts / number for label, number in stages.items()}
    maintained(run)
    assert all((folder / "artifacts" / "config.yaml").exists() for folder in folders.values())
    assert Run(run).artifact("tokenizer", "key1").exists() and not Run(run).artifact("tokenizer", "key2").exists()
    later = time.time() + 91 * 86_400
    monkeypatch.setattr("pipelines.nightly.retention.time.time", lambda: later)
    context = maintained(run)
    assert (folders["aliased"] / "artifacts" / "model" / "manifest.json").exists()
    assert not (folders["unused"] / "artifacts").exists()
    assert client.get_run(stages["unused"]).data.metrics["figure"] == 7.0
    assert [version.tags["digest"] for version in client.search_model_versions(f"name = '{name}'")] == ["digest1"]
    assert maintained(run).facts["tracking"] == "files of 0 runs removed"


def test_what_a_job_at_work_has_read_stays(run):
    with stage(run, "training", journal=False) as training:
        training.inputs({"item_features": 1})
        lake = maintained(run).lake
        assert not lake.missing("item_features", 1) and lake.missing("item_features", 2)
    assert maintained(run).lake.missing("item_features", 1)


def test_files_and_log_of_the_lease_are_bounded(run, monkeypatch):
    lake = Run(run).lake
    lease = Lease(lake, 60.0)
    lease.take(0)
    for _ in range(40):
        assert lease.renew()
    lease.give_back()
    folder = Path(lake.path("leases"))
    assert len(list(folder.glob("*.parquet"))) >= 40
    monkeypatch.setattr(retention, "_HOUR", 0)
    maintained(run)
    assert len(list(folder.glob("*.parquet"))) < 20
    aged(folder)  # as a nightly run leaves it
    maintained(run)
    assert len(list(folder.glob("_delta_log/*.json"))) < 40
    assert DeltaTable(str(folder)).metadata().configuration["delta.logRetentionDuration"] == "interval 1 days"
    Lease(lake, 60.0).take(0)
