"""Run the same chain in one process, without Ray: repeated, refused, compared, killed."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from mlflow.tracking import MlflowClient

from adasid.config import load
from adasid.errors import InputError
from adasid.tokenizers import artifact
from pipelines import chain, cli, compare
from pipelines import evaluate as pipeline
from pipelines import sids as sids_stage
from pipelines.training import downstream
from tests.end_to_end.running import ITEMS, config_file, killed, lake_of, run_stage, sids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def in_process(folder, spark):
    """The same chain in this process, without Ray."""
    path = config_file(folder, "alone")
    chain.run(load(path))
    return path


def test_the_same_seed_gives_the_same_sids(in_process, folder, spark):
    chain.run(load(config_file(folder, "again")))
    assert sids(lake_of(folder, "alone")).equals(sids(lake_of(folder, "again")))
    assert lake_of(folder, "alone").input_hash("sids") == lake_of(folder, "again").input_hash("sids")


def test_a_failed_gate_publishes_nothing(in_process, folder, capsys):
    lake = lake_of(folder, "alone")
    before = lake.versions("sids", "generations")
    arguments = [
        "--config",
        str(in_process),
        "--set",
        "sids.gates.max_group=1",
        "--set",
        "sids.gates.max_collision=0.0",
    ]
    assert cli.run(cli.choose(arguments, "write_sids"), cli.stage("sids", sids_stage.run)) == 4
    told = capsys.readouterr().err
    assert "largest group is" in told
    assert "live generation is unchanged" in told
    assert lake.versions("sids", "generations") == before


def test_an_artifact_from_other_features_is_refused(in_process, tmp_path):
    settings = load(in_process).tokenizer
    other = artifact.write(tmp_path, artifact.build(settings, {"text": 10, "visual": 12, "behavior": 16}), settings, {})
    with pytest.raises(
        InputError, match=f"item_features.text has width 16, not 10 as the tokenizer {other.digest} was trained on"
    ):
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
        with chain.tracking.stage(cfg, "compare") as context:
            compare.run(cfg, context)
        experiment = client.get_experiment_by_name("adasid").experiment_id
        return sorted(
            run.info.run_name for run in client.search_runs([experiment]) if run.info.run_name.startswith("compare ")
        )

    first = cells()
    assert first == [
        "compare quasid, seed 17",
        "compare random, seed 17",
        "compare rq-kmeans, by modality, seed 17",
    ] + [f"compare rq-vae, seed {seed}" for seed in (17, 18)]
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
    assert page.count("data:image/png;base64") == 3  # none of the three has a gate to draw
    assert "±" in page
    assert cells() == first, "a cell that has its result is not run again"


def test_semantic_ids_are_put_to_use_and_a_second_run_trains_nothing(in_process, capsys):
    chosen = {
        "rq-kmeans": {"name": "rq-kmeans", "codebook_size": 16, "levels": {"text": 2, "behavior": 1}},
        "random": {"name": "random", "codebook_size": 16, "levels": 3},
    }
    small = {"repeatable": False, "width": 16, "blocks": 1, "epochs": 3, "batch_users": 64, "negatives": 128}
    retrievers = {head: {"head": head, **small} for head in ("item", "parallel", "autoregressive")}
    evaluate = {
        "tokenizers": list(chosen),
        "retrievers": retrievers,
        "controls": {"sasrec": retrievers["item"]},
        "rankers": {"ppnet": {"width": 12, "hidden": [16], "epochs": 2, "batch": 512}},
        "ranking_controls": {"item id": {"width": 12, "hidden": [16], "epochs": 2, "batch": 512}},
        "reference": "rq-kmeans",
        "models": {"rq-kmeans": {"item": [17, 18], "parallel": [17], "autoregressive": [17], "ppnet": [18]}},
        "more_seeds": {"sasrec": [18]},
        "published": "beauty",
    }
    cfg = load(
        in_process,
        [f"compare.tokenizers={json.dumps(chosen)}", f"evaluate={json.dumps(evaluate)}", "retrieval.repeatable=false"],
    )
    client = MlflowClient(f"sqlite:///{cfg.run_dir.resolve()}/mlflow.db")

    def cells(cfg=cfg, train=True):
        with chain.tracking.stage(cfg, "evaluate") as context:
            pipeline.run(cfg, context, train)
        experiment = client.get_experiment_by_name("adasid").experiment_id
        return sorted(
            run.info.run_name for run in client.search_runs([experiment]) if run.info.run_name.startswith("evaluate ")
        )

    first = cells()
    assert len(first) == 5 + 4 + 2 + 1
    printed = capsys.readouterr().out
    assert "rq-kmeans / autoregressive" in printed
    assert "popularity / item ids" in printed
    folder = cfg.run_dir / "report" / "evaluation"
    with (folder / "cells.csv").open() as file:
        rows = {(row["tokenizer"], row["model"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 13
    assert {(model, seed) for name, model, seed in rows if name == "rq-kmeans"} == {
        ("item", "17"),
        ("item", "18"),
        ("parallel", "17"),
        ("autoregressive", "17"),
        ("ppnet", "18"),
    }
    lake = chain.tracking.open_lake(cfg)
    users = lake.read("sequences").filter(pc.field("split") == "test").num_rows
    assert {int(row["all_users"]) for row in rows.values() if row["task"] == "retrieval"} == {users}
    held_out = lake.read("sequences").filter(pc.field("split") == "test").select(["history", "target"]).to_pylist()
    again = np.array([row["target"] in row["history"] for row in held_out])
    counts = lake.read("item_stats").sort_by("item_index")["interactions"].to_numpy()

    def ahead(row, least):
        """Items outside the history with at least ``least`` events, but for the target."""
        return int((np.delete(counts, [*{*row["history"]} - {row["target"]}, row["target"]]) >= least).sum())

    best = np.array([ahead(row, counts[row["target"]] + 1) for row in held_out])  # items of equal counts come at random
    worst = np.array([ahead(row, counts[row["target"]]) for row in held_out])
    assert (again & (best < 50)).any() and (best < worst).any()
    found = float(rows["popularity", "item ids", "17"]["all_recall@50"])
    assert ((worst < 50) & ~again).mean() <= found <= ((best < 50) & ~again).mean()
    page = (folder / "index.html").read_text()
    assert {(row["labels"], row["split"]) for row in rows.values() if row["task"] == "ranking"} == {
        ("sampled", "leave_one_out")
    }
    assert all(0 < float(row["all_auc"]) < 1 for row in rows.values() if row["task"] == "ranking")
    assert page.count("data:image/png;base64") == 3
    assert "last event. Labels are sampled" in page
    assert "the best other tokenizer, random" in page
    assert "ADC-SID, table 2" in page
    assert "still to be evaluated" not in page
    assert cells() == first, "a cell that has its result is not run again"
    more = cfg.model_copy(update={"evaluate": cfg.evaluate.model_copy(update={"more_seeds": {"sasrec": (18, 19)}})})
    assert cells(more, train=False) == first, "the report alone trains nothing"
    assert "1 cell of the config still to be evaluated" in (folder / "index.html").read_text()


def test_a_retriever_learns_from_the_live_table(in_process):
    small = "{width: 16, blocks: 1, epochs: 2, batch_users: 64, negatives: 128}"
    cfg = load(in_process, [f"retrieval={small}"])
    with chain.tracking.stage(cfg, "retrieval") as context:
        downstream.retrieval(cfg, context)
        assert 0 <= context.facts["test recall@10"] <= 1
    with chain.tracking.stage(cfg, "retrieval") as context:
        downstream.retrieval(cfg, context)
        assert context.status == "up to date"
    with chain.tracking.stage(load(in_process, ["ranking={epochs: 1}"]), "ranking") as context:
        downstream.ranking(context.cfg, context)
        assert (context.facts["labels"], context.facts["split"]) == ("sampled", "leave_one_out")


def test_a_trainer_killed_in_mid_run_resumes_and_ends_as_it_would_have(in_process, folder):
    run = folder / "runs" / "alone" / "artifacts" / "tokenizer"
    (whole,) = run.iterdir()
    expected = artifact.read_manifest(whole / "model").digest
    whole.rename(folder / "kept")
    try:
        checkpoints = whole / "checkpoints"
        alive = killed(
            ["jobs/train.py", "--config", str(in_process), "--stage", "tokenizer"],
            lambda: len(list(checkpoints.glob("step-*"))) >= 2,
        )
        assert alive, "the job ended before it could be killed: make the training longer"
        assert not (whole / "model").exists()
        reached = max(int(p.name[5:]) for p in checkpoints.glob("step-*"))
        assert 0 < reached < 40
        run_stage(load(in_process), "tokenizer")
        assert artifact.read_manifest(whole / "model").digest == expected
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
        lambda: (
            table / "_delta_log" / f"{version + 1:020d}.json"
        ).exists(),  # the table's commit, before the generation's
    )
    for ready in moments:
        arguments = [argument for change in changes for argument in ("--set", change)]
        assert killed(["jobs/write_sids.py", "--config", str(in_process), *arguments], ready), (
            "the job ended before it could be killed"
        )
        assert sids(lake).equals(expected), "readers see a whole table"
    for again, settings in enumerate((load(in_process, changes), load(in_process)), start=1):
        run_stage(settings, "sids")  # first what was cut off, then what was live before it: both are publications
        assert sids(lake).equals(expected)
        assert lake.version("sids") == version + again
        assert sorted(lake.read("generations")["generation"].to_pylist()) == list(range(1, generations + again + 1))
        run_stage(settings, "sids")
        assert lake.version("sids") == version + again
