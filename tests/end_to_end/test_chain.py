"""Run the main job as users do: real processes, real Ray, Spark, Delta and MLflow, on a small synthetic catalogue."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from adasid import tables
from adasid.config import load
from adasid.tokenizers import artifact
from pipelines import chain
from pipelines.training import tokenizer
from tests.end_to_end.running import ITEMS, ROOT, TABLES, config_file, job, lake_of, sids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def on_ray(folder):
    """The chain in its own process, with two Ray Train workers."""
    path = config_file(folder, "ray", workers=2, retokenize={"exports": ["array"]})
    done = job("run_all", path)
    assert done.returncode == 0, done.stderr[-3000:]
    return path, done


def test_every_table_is_there_and_every_item_has_one_sid(on_ray, folder):
    lake = lake_of(folder, "ray")
    for table in TABLES:
        assert lake.read(table).num_rows > 0, table
    table = sids(lake)
    assert table["item_id"].to_pylist() == sorted(set(lake.read("items", columns=["item_id"])["item_id"].to_pylist()))
    assert table.num_rows == ITEMS
    exports = load(on_ray[0]).run_dir / "exports" / "1"
    codes = dict(zip((exports / "item_ids.txt").read_text().split(), np.load(exports / "codes.npy").tolist()))
    assert codes == dict(zip(table["item_id"].to_pylist(), table["codes"].to_pylist()))
    strata = dict(
        zip(
            *(lake.read("item_features", columns=["item_id", "stratum"])[c].to_pylist() for c in ("item_id", "stratum"))
        )
    )
    for row in table.to_pylist():
        assert len(row["codes"]) == len(row["weights"]) == len(row["active"]) == len(row["tokens"]) == 6
        assert row["active"] == [weight > 0 for weight in row["weights"]]
        if strata[row["item_id"]] == "cold":
            assert row["codes"][4:] == [tables.PAD] * 2
            assert row["tokens"][5] == "<b1_pad>"


def test_collision_ranks_follow_count_then_id(on_ray, folder):
    lake = lake_of(folder, "ray")
    counts = dict(
        zip(
            *(
                lake.read("item_stats", columns=["item_id", "interactions"])[c].to_pylist()
                for c in ("item_id", "interactions")
            )
        )
    )
    groups = {}
    for row in sids(lake).to_pylist():
        groups.setdefault(tuple(row["codes"]), []).append(
            (row["collision_rank"], -counts[row["item_id"]], row["item_id"])
        )
    assert any(len(group) > 1 for group in groups.values())
    for group in groups.values():
        by_rank = sorted(group)
        assert [rank for rank, _, _ in by_rank] == list(range(len(group)))
        assert [g[1:] for g in by_rank] == sorted(g[1:] for g in group)


def test_generation_pins_what_was_published(on_ray, folder):
    lake = lake_of(folder, "ray")
    (row,) = lake.read("generations").to_pylist()
    assert lake.read("live").to_pylist() == [{"generation": 1, "sids_version": row["sids_version"], "hold": False}]
    assert lake.read("sids", row["sids_version"]).num_rows == row["items"] == ITEMS
    metrics = json.loads(row["metrics"])
    assert sum(map(sum, metrics["codes"])) + sum(round(p * ITEMS) for p in metrics["pad"]) == ITEMS * 6
    assert all(gate["passed"] for gate in json.loads(row["gates"]))
    assert set(sids(lake).column_names) <= set(tables.SIDS.names)


def test_summary_report_and_tracking(on_ray, folder):
    path, done = on_ray
    cfg = load(path)
    for word in ("ray: done in", "generation: 1", "report/index.html", "mlflow ui", "lake/sids"):
        assert word in done.stdout
    page = (cfg.run_dir / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64") >= 10
    client = MlflowClient(f"sqlite:///{cfg.run_dir.resolve()}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("adasid").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {
        run.data.tags["stage"]: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert set(children) == {name for name, _ in chain.STAGES}
    assert all(run.info.status == "FINISHED" for run in runs)
    assert parent.data.params["tokenizer.codebook_size"] == "16"
    tokenizer = children["tokenizer"]
    assert [i.dataset.name for i in tokenizer.inputs.dataset_inputs] == ["item_features"]
    assert len(client.get_metric_history(tokenizer.info.run_id, "reconstruction")) == 5
    version = client.get_model_version_by_alias("adasid-ray", "candidate")
    assert version.run_id == tokenizer.info.run_id
    assert {f.path for f in client.list_artifacts(tokenizer.info.run_id, "model")} == {
        "model/manifest.json",
        "model/weights.safetensors",
        "model/card.md",
    }


def test_a_second_run_changes_nothing(on_ray, folder):
    path, _ = on_ray
    lake = lake_of(folder, "ray")
    before = lake.versions(*TABLES)
    chain.run(load(path))
    assert lake.versions(*TABLES) == before
    rows = [json.loads(line) for line in (load(path).run_dir / "stages.jsonl").read_text().splitlines()][-8:]
    assert [row["status"] for row in rows[:-1]] == ["up to date", "not needed", *["up to date"] * 5]


@pytest.mark.skipif(not shutil.which("airflow"), reason="Airflow is not on the PATH")
def test_airflow_runs_the_nightly_job(on_ray, folder, tmp_path):
    path, _ = on_ray
    own = {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "infra" / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    night = {"ADASID_HOME": str(ROOT), "ADASID_CONFIG": str(path), "ADASID_DRIVER_MEMORY": "2g"}
    environment = (
        {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}} | own | night
    )
    for words in (["db", "migrate"], ["dags", "test", "adasid_nightly", "2026-01-05"]):
        found = subprocess.run(["airflow", *words], env=environment, capture_output=True, text=True, timeout=540)
        assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    told = found.stdout + found.stderr
    assert "[DAG TEST] running task <TaskInstance: adasid_nightly.maintain" in told and "state=success" in told, told[
        -3000:
    ]
    assert "no item is new, changed or removed since generation 1" in told


def test_one_worker_and_two_give_the_same_quality(on_ray, folder, tmp_path):
    path, _ = on_ray
    with chain.tracking.stage(load(path, ["ray.workers=0"]), "tokenizer", journal=False) as context:
        one = tokenizer.fit(context.cfg, context, "one_worker").metrics
    two = artifact.read_manifest(
        next((folder / "runs" / "ray" / "artifacts" / "tokenizer").iterdir()) / "model"
    ).metrics
    assert context.status == "done"
    for name in ("entropy", "utilisation"):
        assert one[name] == pytest.approx(two[name], rel=0.08)
    for modality in ("text", "visual", "behavior"):
        assert one["fvu"][modality] == pytest.approx(two["fvu"][modality], rel=0.15)
