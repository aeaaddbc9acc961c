"""Test tables that stay at their source: what follows is as of a copy, and only the lake's table is changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from adasid import tables
from adasid.config import Spark
from adasid.errors import ConfigError, InputError
from adasid.storage import delta_options
from pipelines import features, ingest
from pipelines.engines import catalog, tracking
from pipelines.engines import spark as engine
from pipelines.nightly import forget, upkeep
from pipelines.sources import in_place
from tests import s3

FOLLOWING = ("item_stats", "user_stats", "sequences", "ranking_samples", "catalog_stats", "item_features")


@pytest.fixture
def source(tmp_path) -> tuple[str, str]:
    """Two Delta tables whose columns have other types than the lake's, and some more."""
    rng = np.random.default_rng(3)
    vectors = [rng.normal(size=4).tolist() if i % 5 else None for i in range(30)]
    items = {"item_id": np.arange(30), "text": vectors, "behavior": rng.normal(size=(30, 3)).tolist()}
    write_deltalake(str(tmp_path / "items"), pa.table({**items, "price": rng.random(30)}))
    events = 400
    rating = np.where(np.arange(events) % 7 == 0, np.nan, rng.integers(1, 6, events))
    interactions = {
        "user_id": rng.integers(0, 25, events),
        "item_id": rng.integers(0, 31, events),  # 30 is unknown
        "timestamp": 1_500_000_000 + rng.integers(0, 10**7, events),
        "rating": rating,
    }
    write_deltalake(str(tmp_path / "events"), pa.table(interactions))
    return str(tmp_path / "items"), str(tmp_path / "events")


@pytest.fixture
def make(make_config, source):
    """A config of the source, with the tables ``placed`` in place."""

    def config(*placed: str, name: str = "t", named: tuple[str, str] = source, **options):
        paths = {"items": named[0], "interactions": named[1], "format": "delta", "in_place": list(placed), **options}
        return make_config(
            name=name,
            source={"kind": "tables", "tables": paths},
            features={"content": ["text"], "max_rejected": 0.2},
            behavior={"source": "column"},
            retokenize={"grace_hours": 0, "lineage_days": 0},
        )

    return config


def ran(cfg, function=ingest.run):
    with tracking.stage(cfg, function.__module__.rpartition(".")[2], journal=True) as context:
        function(cfg, context)
    return context


def table(lake, name: str) -> list[dict]:
    """All rows but the input hash, in an order."""
    rows = lake.read(name)
    rows = rows.drop_columns(["input_hash"]) if "input_hash" in rows.column_names else rows
    return sorted(rows.to_pylist(), key=repr)


@pytest.mark.usefixtures("spark")
def test_all_that_follows_is_as_of_a_copy(make):
    copy, placed = make(name="copy"), make("items", "interactions", name="placed")
    facts = [ran(cfg).facts for cfg in (copy, placed)]
    assert facts[0] == facts[1] == {"items": 30, "interactions": 400}
    lakes = [ran(cfg, features.run).lake for cfg in (copy, placed)]
    for name in (*FOLLOWING, "rejected_rows"):
        rows = [table(lake, name) for lake in lakes]
        assert rows[0] == rows[1] and rows[0], name
    assert lakes[1].read("items").to_pylist() == [{"location": placed.source.tables.items, "version": 0}]
    assert lakes[0].input_hashes(lakes[0].versions("items")) == lakes[1].input_hashes(lakes[1].versions("items"))


@pytest.mark.usefixtures("spark")
def test_the_version_that_ingest_has_checked_is_read_until_ingest_runs_again(make, source):
    cfg = make("interactions")
    context = ran(cfg)
    new = {"user_id": [99], "item_id": [1], "timestamp": [1_500_000_000], "rating": [5.0]}
    write_deltalake(source[1], pa.table(new), mode="append")
    assert "99" not in ran(cfg, features.run).lake.read("user_stats")["user_id"].to_pylist()
    assert ran(cfg, features.run).status == "up to date"
    assert ran(cfg).facts == {"items": 30, "interactions": 401}
    assert ran(cfg).status == "up to date"
    assert "99" in ran(cfg, features.run).lake.read("user_stats")["user_id"].to_pylist()
    assert in_place.reference(context.lake, "interactions") == (source[1], 1)
    assert in_place.reference(context.lake, "items") is None


@pytest.mark.usefixtures("spark")
def test_a_copy_takes_the_place_of_a_reference_and_nothing_else_runs(make):
    for placed in ((), ("items", "interactions"), ("items",)):
        context = ran(make(*placed))
        assert context.status == "done" and ran(make(*placed)).status == "up to date"
        there = {name for name in in_place.TABLES if in_place.reference(context.lake, name)}
        assert there == {*placed}
        assert ran(make(*placed), features.run).status == ("up to date" if placed else "done")


def test_only_delta_tables_stay_in_place(make, spark, tmp_path, source):
    with pytest.raises(ConfigError, match=r"in_place names 'items', a path, but source.tables.format is 'parquet'"):
        make("items", format="parquet")
    spark.sql(f"CREATE SCHEMA placed LOCATION '{tmp_path}/house'")
    try:
        spark.sql("CREATE TABLE placed.old USING parquet AS SELECT 1 AS user_id, 1 AS item_id, 5L AS timestamp")
        spark.sql(
            "CREATE TABLE placed.items USING delta AS SELECT string(item_id) AS item_id, CAST(text AS array<float>) AS "
            f"text, CAST(behavior AS array<float>) AS behavior FROM delta.`{source[0]}`"
        )
        with pytest.raises(InputError, match=r"^source.tables.interactions placed.old: is a parquet table; only Delta"):
            ran(make("interactions", named=("placed.items", "placed.old")))
        cfg = make("items", named=("placed.items", source[1]))
        context = ran(cfg)
        at = in_place.reference(context.lake, "items")
        assert at.location.startswith("/") and Path(at.location, "_delta_log").is_dir() and at.version == 0
        assert ran(cfg, features.run).lake.read("item_features").num_rows == 30
    finally:
        spark.sql("DROP SCHEMA placed CASCADE")


def test_a_table_of_the_catalogue_in_a_bucket(make, spark, bucket, source, tmp_path):
    for path, name in zip(source, ("items", "events")):
        write_deltalake(f"{bucket}/{name}", DeltaTable(path).to_pyarrow_table(), storage_options=delta_options(bucket))
    keys = {"access.key": "AWS_ACCESS_KEY_ID", "secret.key": "AWS_SECRET_ACCESS_KEY"}
    engine.session(Spark(conf={f"spark.hadoop.fs.s3a.{key}": s3.ENVIRONMENT[name] for key, name in keys.items()}))
    spark.sql(f"CREATE SCHEMA remote LOCATION '{tmp_path}/house'")
    try:
        for name in ("items", "events"):
            catalog.create(spark, "key", f"remote.{name}", f"{bucket}/{name}")
            assert catalog.entry(spark, "key", f"remote.{name}") == catalog.Entry("delta", f"{bucket}/{name}")
        cfg = make("items", "interactions", named=("remote.items", "remote.events"))
        context = ran(cfg)
        assert context.facts == {"items": 30, "interactions": 400}
        assert in_place.reference(context.lake, "interactions") == (f"{bucket}/events", 0)
        assert ran(cfg, features.run).lake.read("item_features").num_rows == 30
    finally:
        spark.sql("DROP SCHEMA remote CASCADE")


@pytest.mark.usefixtures("spark")
def test_values_are_checked_by_ingest_and_a_version_that_is_gone_is_named(make, source):
    lake = ran(make("interactions")).lake
    whole = DeltaTable(source[1])
    write_deltalake(source[1], pa.table({"user_id": [1], "item_id": [1], "pos": [0.5]}), mode="overwrite",
                    schema_mode="overwrite")  # fmt: skip
    line = r"^source.tables.interactions .*: column 'pos' is double and has a value that is no whole"
    with pytest.raises(InputError, match=line):
        ran(make("interactions"))
    assert in_place.reference(lake, "interactions").version == 0
    for file in whole.file_uris():
        Path(file).unlink()
    line = rf"^interactions is read in place, and {source[1]} cannot be read at version 0 \(.*\): run jobs/ingest.py"
    with pytest.raises(InputError, match=line):
        ran(make("interactions"), features.run)
    cfg = make("interactions")
    same = cfg.model_copy(update={"features": cfg.features.model_copy(update={"ranking_split": "same"})})
    with pytest.raises(InputError, match=line) as caught:
        ran(same, features.run)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("spark")
def test_maintenance_and_forgetting_change_the_lake_alone(make, source, capsys):
    ran(make())
    cfg = make("items", "interactions")
    ran(cfg)
    ran(cfg, features.run)
    before = {file: file.stat().st_mtime_ns for path in source for file in Path(path).rglob("*") if file.is_file()}
    with tracking.stage(cfg, "maintain", journal=False) as context:
        upkeep.maintain(cfg, context)
    reference = in_place.reference(context.lake, "interactions")
    assert reference == (source[1], 0) and context.lake.input_hash("interactions")
    folder = Path(context.lake.path("interactions"))
    for config in (make(), cfg):  # a copy lies below the reference now
        ran(config)
    assert len(list(folder.glob("*.parquet"))) > 1
    with tracking.stage(cfg, "maintain", journal=False) as context:
        forget.forget(cfg, context, ["7"])
    assert len(list(folder.glob("*.parquet"))) == 1
    assert in_place.reference(context.lake, "interactions") == reference
    assert f"its rows are at {source[1]}, which is yours to clean" in capsys.readouterr().err
    assert "7" not in context.lake.read("user_stats")["user_id"].to_pylist()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    ran(make())
    with tracking.stage(cfg, "maintain", journal=False) as context:
        forget.forget(cfg, context, ["7"])
    assert "7" not in context.lake.read("interactions")["user_id"].to_pylist()
    assert context.lake.schema("interactions").equals(tables.INTERACTIONS)
