"""Run every job on a run that lies in a bucket: the chain, three nightly runs, a roll-back, downstream models and
maintenance; then faults of the store in the middle of a nightly run."""

import json
import os
from datetime import date
from pathlib import Path

import pytest

from adasid import load as load_tokenizer
from adasid.config import load
from adasid.errors import AdasidError, InputError, TransientError
from adasid.storage import ObjectPath
from pipelines import chain
from pipelines.engines import tracking
from pipelines.nightly import retokenize, upkeep
from pipelines.publish import generations
from pipelines.run import Run
from pipelines.training import downstream
from tests import s3
from tests.end_to_end.nights import by_item, copied, next_day, put
from tests.end_to_end.running import config_on_s3, lake_of, run_stage, sids

OPEN = {
    "gates": {"max_churn": 1.0, "max_weighted_churn": 1.0, "max_error_ratio": 100.0},
    "lease": {"seconds": 6.0, "wait": 60.0},
    "exports": ["parquet", "array", "changes"],
}


@pytest.fixture(scope="module")
def on_s3(spark, server, tmp_path_factory):
    """A run in a bucket after the whole chain: its config."""
    folder = tmp_path_factory.mktemp("s3")
    cfg = load(config_on_s3(folder, "shop", "s3://lake/runs", retokenize=OPEN))
    for name, _ in chain.STAGES:
        run_stage(cfg, name)
    return cfg


def night(cfg, day, **changes):
    with tracking.stage(cfg, "retokenize") as context:
        retokenize.run(cfg, context, day, **changes)
    return context


def test_the_chain_gives_the_same_sids_as_on_a_disk(on_s3, shop):
    here, there = sids(lake_of(shop, "shop")), sids(Run(on_s3).lake)
    assert there["codes"].equals(here["codes"])
    assert there["item_id"].equals(here["item_id"])
    assert (Run(on_s3).report() / "index.html").exists()
    exported = Run(on_s3).exports / "1"
    assert (exported / "manifest.json").exists()
    assert len((exported / "item_ids.txt").read_text().split()) == there.num_rows


@pytest.mark.parametrize("task", ["retrieval", "ranking"])
def test_downstream_models_train_and_their_results_are_in_the_bucket(on_s3, task):
    few = on_s3.model_copy(
        update={
            "retrieval": on_s3.retrieval.model_copy(update={"epochs": 1}),
            "ranking": on_s3.ranking.model_copy(update={"epochs": 1}),
            "spark": on_s3.spark.model_copy(update={"scores_from": 1}),  # Spark reads the workers' scores
        }
    )
    with tracking.stage(few, task) as context:
        getattr(downstream, task)(few, context)
    (result,) = (Run(on_s3).artifacts / task).glob("*/result.json")
    assert json.loads(result.read_text())["test"]


def test_three_nightly_runs_a_roll_back_and_maintenance(on_s3):
    lake = Run(on_s3).lake
    for day in (1, 2, 3):
        put(lake, next_day(lake.read("item_features"), seed=day), f"day {day}")
        night(on_s3, date(2026, 2, day))
    assert [generation.generation for generation in generations.history(lake)] == [1, 2, 3, 4]
    live = generations.live(lake)
    assert live.run_date == "2026-02-03"
    assert live.artifact.startswith("artifacts/tokenizer/")
    with tracking.stage(on_s3, "rollback") as context:
        upkeep.rollback(on_s3, context, 3)
    assert json.loads((Run(on_s3).exports / "live.json").read_text())["folder"] == "3"
    before = by_item(lake, generations.live(lake).sids_version)
    with tracking.stage(on_s3, "maintain") as context:
        upkeep.maintain(on_s3, context)
    assert by_item(lake, generations.live(lake).sids_version).equals(before)
    tokenizer = load_tokenizer(str(Run(on_s3).folder))
    features = lake.read("item_features", generations.live(lake).inputs["item_features"])
    assert tokenizer.encode(features).codes.shape == (len(features), 6)


def test_no_secret_is_in_anything_that_the_run_left(on_s3):
    secret = s3.ENVIRONMENT["AWS_SECRET_ACCESS_KEY"].encode()
    files = list(ObjectPath.of(on_s3.runs_dir).files())
    assert len(files) > 100
    assert [str(path) for path in files if secret in path.read_bytes()] == []
    store = Path(on_s3.tracking.uri.removeprefix("sqlite:///"))
    assert secret not in store.read_bytes()


@pytest.mark.parametrize(("fault", "error"), [("down", TransientError), ("read-only", InputError)])
def test_a_store_that_fails_at_the_start_is_told_of_in_one_line(fault, error, on_s3, server):
    s3.ask(server, "/_fault", "PUT", fault.encode())
    try:
        with pytest.raises(error, match="s3://lake"):
            night(on_s3, date(2026, 2, 9))
    finally:
        s3.ask(server, "/_fault", "PUT")


@pytest.mark.parametrize("commit", range(1, 7) if "ADASID_DRILLS" in os.environ else (3, 5))
def test_a_store_that_dies_at_a_commit_leaves_the_old_or_the_new_table(commit, shop, server, bucket, tmp_path):
    path, lake = copied(shop, tmp_path / "shop", bucket, retokenize=OPEN)
    cfg = load(path)
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    before = by_item(lake, generations.live(lake).sids_version)
    s3.ask(server, "/_fault", "PUT", f"dies {commit}".encode())
    try:
        with pytest.raises(AdasidError) as caught:
            night(cfg, date(2026, 2, 1))
    finally:
        s3.ask(server, "/_fault", "PUT")
    assert "\n" not in str(caught.value)
    assert by_item(lake, generations.live(lake).sids_version).equals(before)
    night(cfg, date(2026, 2, 1))
    assert [generation.generation for generation in generations.history(lake)] == [1, 2]
    assert generations.live(lake).generation == 2
