"""Test the public Python API on a run of the pipeline: its live tokenizer, published codes, features and MLflow
store."""

import shutil
import sys

import numpy as np
import pytest

import adasid
from adasid.errors import InputError
from pipelines.publish import generations
from tests.end_to_end.running import SMALL, lake_of, sids


@pytest.fixture(scope="module")
def features(shop):
    lake = lake_of(shop, "shop")
    inputs = generations.live(lake).inputs
    return lake.read("item_features", inputs["item_features"]).sort_by("item_index")


def test_codes_equal_the_published_ones(shop, features):
    tokenizer, lake = adasid.load(shop / "runs" / "shop"), lake_of(shop, "shop")
    assert tokenizer.digest == generations.live(lake).tokenizer
    result = tokenizer.encode(features)
    rows = {row["item_id"]: row for row in sids(lake).to_pylist()}
    published = [rows[item] for item in result.item_ids]
    for column in ("codes", "active", "tokens"):
        assert getattr(result, column).tolist() == [row[column] for row in published], column
    assert np.allclose(result.weights, [row["weights"] for row in published], rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="the artifact has no scale of richness; pass richness="):
        plain = tokenizer.encode({m: features[m] for m in tokenizer.widths})
    assert np.array_equal(plain.codes, result.codes)


def test_a_fit_on_the_runs_features_gives_the_runs_weights(shop, features):
    tokenizer = adasid.load(shop / "runs" / "shop")
    again = adasid.fit("adc-sid", features, progress=False, **SMALL["tokenizer"])
    assert again.settings == tokenizer.settings
    assert again.digest == tokenizer.digest
    assert again.manifest.metrics == tokenizer.manifest.metrics


def test_a_copied_run_is_loaded_with_and_without_delta(shop, tmp_path, monkeypatch):
    run, number = tmp_path / "copy", adasid.load(shop / "runs" / "shop").digest
    shutil.copytree(shop / "runs" / "shop", run)
    assert adasid.load(run).digest == number
    monkeypatch.setitem(sys.modules, "deltalake", None)
    assert (run / "exports" / "live.json").exists() and adasid.load(run).digest == number
    (folder,) = {path.parent for path in (run / "artifacts").glob("tokenizer/*/model")}
    (folder / "matched").mkdir()
    shutil.move(folder / "model", folder / "matched" / "model")  # where a refit leaves the renamed tokenizer
    (folder / "model").mkdir()
    (folder / "model" / "manifest.json").write_text("{}", encoding="utf-8")
    assert adasid.load(run).digest == number
    shutil.rmtree(run / "artifacts")
    with pytest.raises(InputError, match=f"tokenizer {number}, which is live in .*, is in no folder of"):
        adasid.load(run)
    shutil.rmtree(run / "exports")
    with pytest.raises(InputError, match="the package deltalake is missing; run `pip install deltalake`"):
        adasid.load(run)


def test_a_run_without_a_generation_is_refused(shop, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(shop / "runs" / "shop" / "lake", run / "lake")
    shutil.rmtree(run / "lake" / "live")
    with pytest.raises(InputError, match=r"nothing is published in .*; run jobs/write_sids.py first"):
        adasid.load(run)


def test_a_model_of_the_registry_is_loaded(shop, tmp_path, monkeypatch):
    import mlflow

    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(f"sqlite:///{(shop / 'runs' / 'shop' / 'mlflow.db').resolve()}")
        tokenizer = adasid.load("models:/adasid-shop@champion")
        assert tokenizer.digest == adasid.load(shop / "runs" / "shop").digest
        with pytest.raises(InputError, match=r"MLflow cannot download models:/adasid-nothing@champion"):
            adasid.load("models:/adasid-nothing@champion")
    finally:
        mlflow.set_tracking_uri(before)
