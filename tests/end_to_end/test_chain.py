"""The main job as users run it: real processes, real Ray, Spark, Delta and MLflow, on a small synthetic catalogue."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient

from adasid import tables
from adasid.config import load
from adasid.errors import InputError
from adasid.tokenizers import artifact
from pipelines import chain, cli, compare
from pipelines import sids as sids_stage
from pipelines.engines.lake import Lake

ROOT = Path(__file__).parents[2]
ITEMS = 600
SMALL = {
    "source": {
        "synthetic": {"items": ITEMS, "users": 400, "interactions": 6000, "topics": 8, "text_width": 16, "visual_width": 12, "chunk_users": 200}
    },
    "features": {"pairs": {"method": "cooccurrence", "min_users": 1}},
    "behavior": {"width": 16, "blocks": 1, "epochs": 3, "batch_users": 64, "negatives": 128, "early_epochs": 3},
    "tokenizer": {
        "codebook_size": 16,
        "latent_width": 16,
        "hidden": [32, 24],
        "decoder_hidden": [24, 32],
        "projector_width": 24,
        "training": {"epochs": 40, "batch": 128, "checkpoint_epochs": 2, "log_epochs": 10},
    },
    "sids": {"gates": {"max_collision": 1.0}},
    "spark": {"shuffle_partitions": 2, "driver_memory": "2g"},
    "ray": {"cpus_per_worker": 0.5, "gpus": "never"},
}
TABLES = (
    "items",
    "interactions",
    "truth",
    "item_stats",
    "user_stats",
    "sequences",
    "ranking_samples",
    "behavior_embeddings",
    "item_features",
    "catalog_stats",
    "sids",
    "generations",
)


def config_file(folder, name, workers=0, **changes):
    data = {**SMALL, "name": name, "runs_dir": str(folder / "runs"), "ray": {**SMALL["ray"], "workers": workers}, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def job(name, path, *arguments):
    return subprocess.run([sys.executable, f"jobs/{name}.py", "--config", path, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=540)


def run_stage(cfg, name):
    """A stage in this process, in the Spark session that is there."""
    with chain.tracking.stage(cfg, name) as track:
        dict(chain.STAGES)[name](cfg, track)


def lake_of(folder, name):
    return Lake(str(folder / "runs" / name / "lake"), {})


def sids(lake):
    return lake.read("sids", columns=["item_id", "codes", "weights", "active", "tokens", "collision_rank"]).sort_by("item_id")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def on_ray(folder):
    """The chain in its own process, with two Ray Train workers."""
    path = config_file(folder, "ray", workers=2)
    done = job("run_all", path)
    assert done.returncode == 0, done.stderr[-3000:]
    return path, done


@pytest.fixture(scope="module")
def in_process(folder, spark):
    """The same chain in this process, without Ray."""
    path = config_file(folder, "alone")
    chain.run(load(path))
    return path


def test_every_table_is_there_and_every_item_has_one_sid(on_ray, folder):
    lake = lake_of(folder, "ray")
    for table in TABLES:
        assert lake.read(table).num_rows > 0, table
    table = sids(lake)
    assert table["item_id"].to_pylist() == sorted(set(lake.read("items", columns=["item_id"])["item_id"].to_pylist()))
    assert table.num_rows == ITEMS
    strata = dict(zip(*(lake.read("item_features", columns=["item_id", "stratum"])[c].to_pylist() for c in ("item_id", "stratum"))))
    for row in table.to_pylist():
        assert len(row["codes"]) == len(row["weights"]) == len(row["active"]) == len(row["tokens"]) == 6
        assert row["active"] == [weight > 0 for weight in row["weights"]]
        if strata[row["item_id"]] == "cold":
            assert row["codes"][3:] == [tables.PAD] * 3
            assert row["tokens"][5] == "<b2_pad>"


def test_collision_ranks_follow_count_then_id(on_ray, folder):
    lake = lake_of(folder, "ray")
    counts = dict(zip(*(lake.read("item_stats", columns=["item_id", "interactions"])[c].to_pylist() for c in ("item_id", "interactions"))))
    groups = {}
    for row in sids(lake).to_pylist():
        groups.setdefault(tuple(row["codes"]), []).append((row["collision_rank"], -counts[row["item_id"]], row["item_id"]))
    assert any(len(group) > 1 for group in groups.values())
    for group in groups.values():
        by_rank = sorted(group)
        assert [rank for rank, _, _ in by_rank] == list(range(len(group)))
        assert [g[1:] for g in by_rank] == sorted(g[1:] for g in group)


def test_generation_pins_what_was_published(on_ray, folder):
    lake = lake_of(folder, "ray")
    (row,) = lake.read("generations").to_pylist()
    assert row["live"]
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
    children = {run.data.tags["stage"]: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == {name for name, _ in chain.STAGES}
    assert all(run.info.status == "FINISHED" for run in runs)
    assert parent.data.params["tokenizer.codebook_size"] == "16"
    tokenizer = children["tokenizer"]
    assert [i.dataset.name for i in tokenizer.inputs.dataset_inputs] == ["item_features"]
    assert len(client.get_metric_history(tokenizer.info.run_id, "reconstruction")) == 4
    version = client.get_model_version_by_alias("adasid-ray", "candidate")
    assert version.run_id == tokenizer.info.run_id
    assert {f.path for f in client.list_artifacts(tokenizer.info.run_id, "model")} == {"model/manifest.json", "model/weights.safetensors"}


def test_a_second_run_changes_nothing(on_ray, folder):
    path, _ = on_ray
    lake = lake_of(folder, "ray")
    before = lake.versions(*TABLES)
    chain.run(load(path))
    assert lake.versions(*TABLES) == before
    rows = [json.loads(line) for line in (load(path).run_dir / "stages.jsonl").read_text().splitlines()][-7:]
    assert [row["status"] for row in rows[:-1]] == ["up to date"] * 6


def test_the_same_seed_gives_the_same_sids(in_process, folder, spark):
    chain.run(load(config_file(folder, "again")))
    assert sids(lake_of(folder, "alone")).equals(sids(lake_of(folder, "again")))
    assert lake_of(folder, "alone").stamp("sids") == lake_of(folder, "again").stamp("sids")


def test_one_worker_and_two_give_the_same_quality(in_process, on_ray, folder):
    one, two = (json.loads(lake_of(folder, name).read("generations")["metrics"][0].as_py()) for name in ("alone", "ray"))
    for name in ("entropy", "utilisation"):
        assert sum(one[name]) / 6 == pytest.approx(sum(two[name]) / 6, rel=0.08)
    fvu = [
        artifact.read_manifest(next((folder / "runs" / name / "artifacts" / "tokenizer").iterdir()) / "model")["metrics"]["fvu"]
        for name in ("alone", "ray")
    ]
    for modality in ("text", "visual", "behavior"):
        assert fvu[0][modality] == pytest.approx(fvu[1][modality], rel=0.15)


def test_a_failed_gate_publishes_nothing(in_process, folder, capsys):
    lake = lake_of(folder, "alone")
    before = lake.versions("sids", "generations")
    arguments = ["--config", str(in_process), "--set", "sids.gates.max_group=1", "--set", "sids.gates.max_collision=0.0"]
    assert cli.run(cli.choose(arguments, "write_sids"), cli.stage("sids", sids_stage.run)) == 4
    told = capsys.readouterr().err
    assert "largest group is" in told
    assert "live generation is unchanged" in told
    assert lake.versions("sids", "generations") == before


def test_an_artifact_from_other_features_is_refused(in_process, tmp_path):
    settings = load(in_process).tokenizer
    other = artifact.write(tmp_path, artifact.build(settings, {"text": 10, "visual": 12, "behavior": 16}), settings, {})
    with pytest.raises(InputError, match=f"item_features.text has width 16 but the tokenizer {other['digest']} was trained on 10"):
        run_stage(load(in_process, [f"sids.artifact={tmp_path}"]), "sids")


def test_tokenizers_are_compared_and_a_second_run_trains_nothing(in_process, capsys):
    small = {"codebook_size": 16, "hidden": [24], "training": {"epochs": 15, "batch": 128, "lr": 0.003}}
    chosen = {
        "rq-vae": {"name": "rq-vae", "levels": 3, **small},
        "quasid": {"name": "quasid", "levels": 3, **small},
        "rq-kmeans, by modality": {"name": "rq-kmeans", "codebook_size": 16, "levels": {"text": 2, "behavior": 1}},
        "random": {"name": "random", "codebook_size": 16, "levels": 3},
    }
    cfg = load(in_process, [f"compare.tokenizers={json.dumps(chosen)}", "compare.more_seeds={rq-vae: [18]}"])
    client = MlflowClient(f"sqlite:///{cfg.run_dir.resolve()}/mlflow.db")

    def cells():
        with chain.tracking.stage(cfg, "compare") as track:
            compare.run(cfg, track)
        experiment = client.get_experiment_by_name("adasid").experiment_id
        return sorted(run.info.run_name for run in client.search_runs([experiment]) if run.info.run_name.startswith("compare "))

    first = cells()
    assert first == ["compare quasid, seed 17", "compare random, seed 17", "compare rq-kmeans, by modality, seed 17"] + [
        f"compare rq-vae, seed {seed}" for seed in (17, 18)
    ]
    printed = capsys.readouterr().out
    assert "FVU text" in printed
    assert "rq-kmeans, by modality" in printed
    with (cfg.run_dir / "report" / "tokenizers" / "cells.csv").open() as file:
        rows = {(row["label"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 5
    for (label, _), row in rows.items():
        assert int(row["items"]) == ITEMS
        assert (float(row["readout_text"]) > 0.95) == (label == "random")
        assert (float(row["agreement"]) < 0.25) == (label == "random")
    assert rows["rq-vae", "17"]["artifact"] != rows["rq-vae", "18"]["artifact"]
    page = (cfg.run_dir / "report" / "tokenizers" / "index.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert "±" in page
    assert cells() == first, "a cell that has its result is not run again"


def killed(arguments, ready, deadline=240):
    """Start a job, SIGKILL it with all its processes as soon as ``ready()``; returns whether it was still running then."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + deadline
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)  # the job and its JVM
    process.wait()
    return alive


def test_a_trainer_killed_in_mid_run_resumes_and_ends_as_it_would_have(in_process, folder):
    run = folder / "runs" / "alone" / "artifacts" / "tokenizer"
    (whole,) = run.iterdir()
    expected = artifact.read_manifest(whole / "model")["digest"]
    whole.rename(folder / "kept")
    try:
        checkpoints = whole / "checkpoints"
        alive = killed(["jobs/train.py", "--config", str(in_process), "--stage", "tokenizer"], lambda: len(list(checkpoints.glob("step-*"))) >= 2)
        assert alive, "the job ended before it could be killed: make the training longer"
        assert not (whole / "model").exists()
        reached = max(int(p.name[5:]) for p in checkpoints.glob("step-*"))
        assert 0 < reached < 40
        run_stage(load(in_process), "tokenizer")
        assert artifact.read_manifest(whole / "model")["digest"] == expected
    finally:
        if not (whole / "model").exists():
            (folder / "kept").rename(whole)


def test_write_sids_killed_twice_and_run_again_loses_and_doubles_nothing(in_process, folder):
    lake = lake_of(folder, "alone")
    expected, version, generations = sids(lake), lake.version("sids"), lake.read("generations").num_rows
    model = next((load(in_process).run_dir / "artifacts" / "tokenizer").iterdir()) / "model"
    table = Path(lake.path("sids"))
    files = len(list(table.glob("*.parquet")))
    # other thresholds make it a new publication of the same codes
    changes = ["sids.gates.max_group=900", f"sids.artifact={model}"]
    moments = (
        lambda: len(list(table.glob("*.parquet"))) > files,  # the first data file
        lambda: (table / "_delta_log" / f"{version + 1:020d}.json").exists(),  # the table's commit, before the generation's
    )
    for ready in moments:
        arguments = [argument for change in changes for argument in ("--set", change)]
        assert killed(["jobs/write_sids.py", "--config", str(in_process), *arguments], ready), "the job ended before it could be killed"
        assert sids(lake).equals(expected), "readers see a whole table"
    for again, settings in enumerate((load(in_process, changes), load(in_process)), start=1):
        run_stage(settings, "sids")  # first what was cut off, then what was live before it: both are publications
        assert sids(lake).equals(expected)
        assert lake.version("sids") == version + again
        assert sorted(lake.read("generations")["generation"].to_pylist()) == list(range(1, generations + again + 1))
        run_stage(settings, "sids")
        assert lake.version("sids") == version + again
