"""Test the registration of published tables in Spark's catalogue; each test works on a copy of one published shop."""

import json
import subprocess
import sys

import pytest

from adasid.config import load
from adasid.errors import InputError
from pipelines import sids
from pipelines.engines import catalog
from pipelines.nightly import upkeep
from pipelines.publish import generations
from tests.end_to_end.nights import copied, next_day, put
from tests.end_to_end.running import ROOT
from tests.end_to_end.test_publishing import night, stage, state

NIGHT = """
import sys
from datetime import date
from pyspark import SparkContext
from adasid.config import load
from pipelines.engines import tracking
from pipelines.nightly import retokenize
with tracking.stage(load(sys.argv[1], sys.argv[2:]), "retokenize") as context:
    retokenize.run(context.cfg, context, date(2026, 1, 5))
print(context.facts["generation"], SparkContext._active_spark_context is None)
"""


@pytest.fixture
def schema(spark, tmp_path):
    spark.sql(f"CREATE SCHEMA published LOCATION '{tmp_path}/house'")
    yield "published"
    spark.sql("DROP SCHEMA IF EXISTS published CASCADE")


def named(**names):
    return f"publish.tables={json.dumps(names)}"


def registered(path):
    file = load(path).run_dir / "registered.json"
    return sorted(json.loads(file.read_text())) if file.exists() else []


def test_a_publication_registers_the_tables_once(spark, schema, shop, tmp_path):
    path, lake = copied(shop, tmp_path / "shop")
    names = named(sids="published.sids", live="spark_catalog.published.`live`", sid_changes="published.sid_changes")
    assert stage(path, sids.run, names).status == "up to date"
    assert registered(path) == ["live", "sids"]  # sid_changes begins with the second generation
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    assert night(path, names).facts["generation"] == 2
    assert registered(path) == ["live", "sid_changes", "sids"]
    version = spark.table("published.live").first()["sids_version"]
    rows = spark.sql(f"SELECT * FROM published.sids VERSION AS OF {version}")
    assert rows.count() == generations.live(lake).items
    assert spark.table("published.sid_changes").count() == lake.read("sid_changes").num_rows > 0
    spark.sql("DROP TABLE published.live")
    assert night(path, names).status == "up to date"
    assert spark.table("published.live").first()["generation"] == 2
    spark.sql("DROP TABLE published.live")
    assert stage(path, lambda cfg, context: upkeep.rollback(cfg, context, 1), names).status == "done"
    assert spark.table("published.live").first()["generation"] == 1


def test_a_name_of_another_table_is_refused_before_anything_is_published(spark, schema, shop, tmp_path):
    path, lake = copied(shop, tmp_path / "shop")
    spark.sql("CREATE TABLE published.other USING parquet AS SELECT 1 AS n")
    spark.sql("CREATE VIEW published.seen AS SELECT 1 AS n")
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    before = state(lake)
    for name, line in (
        ("published.other", r"the name is taken by a parquet table at /.*other, not by /.*/lake/sids: choose another"),
        ("published.seen", r"the name is taken by a view, not by /.*/lake/sids: choose another name, or drop"),
        ("absent.sids", r"no schema `absent` in the catalogue: create it \(CREATE SCHEMA `absent`\)"),
        ("main.recsys.sids", r"Spark has no catalogue 'main': set spark.sql.catalog.main"),
    ):
        with pytest.raises(InputError, match=rf"^publish.tables.sids {name}: {line}"):
            night(path, named(sids=name))
    model = generations.live(lake).artifact
    with pytest.raises(InputError, match=r"^publish.tables.live published.other: the name is taken"):
        stage(path, sids.run, named(live="published.other"), f"sids.artifact={load(path).run_dir / model}")
    assert state(lake) == before and registered(path) == []


def test_a_fault_of_the_catalogue_is_a_warning_that_the_next_run_mends(spark, shop, tmp_path, capsys):
    path, _ = copied(shop, tmp_path / "shop")
    names = named(live="published.live")
    assert stage(path, sids.run, names).status == "up to date"
    assert "publish.tables.live published.live is not registered; the next run tries again (" in capsys.readouterr().err
    spark.sql(f"CREATE SCHEMA published LOCATION '{tmp_path}/house'")
    try:
        assert stage(path, sids.run, names).status == "up to date"
        assert spark.table("published.live").first()["generation"] == 1
    finally:
        spark.sql("DROP SCHEMA published CASCADE")


def test_a_small_night_starts_no_spark_for_what_is_recorded(spark, schema, shop, tmp_path):
    path, lake = copied(shop, tmp_path / "shop")
    names = named(sids="published.sids", live="published.live")
    stage(path, sids.run, names)
    put(lake, next_day(lake.read("item_features"), seed=1), "tomorrow")
    command = [sys.executable, "-c", NIGHT, str(path), names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "True"], done.stderr


def test_an_entry_whose_folder_is_gone_is_still_of_its_location(spark, schema, shop, tmp_path):
    """A lake that is built again at the same place finds its entries."""
    path, lake = copied(shop, tmp_path / "shop")
    stage(path, sids.run, named(sids="published.sids"))
    load(path).run_dir.rename(path.parent / "elsewhere")
    assert catalog.entry(spark, "key", "published.sids") == catalog.Entry("delta", lake.path("sids"))
