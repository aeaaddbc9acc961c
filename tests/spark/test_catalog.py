"""Test sources that are named in Spark's catalogue, on Spark's own catalogue."""

from __future__ import annotations

import pytest
from pyspark.errors import AnalysisException

from adasid.config.names import is_table_name, table_parts
from adasid.errors import InputError
from pipelines.engines import catalog
from pipelines.sources import check
from tests.spark.test_ingest import ingested, rows

ITEMS = "SELECT 'x' AS item_id, array(1.0D, 2.0D) AS text, 'X' AS title, 7 AS price"
EVENTS = "SELECT 'a' AS user_id, 'x' AS item_id, 5L AS timestamp"


@pytest.fixture
def schema(spark, tmp_path):
    """An empty schema of the catalogue, below the test's folder."""
    spark.sql(f"CREATE SCHEMA shop LOCATION '{tmp_path}/house'")
    yield "shop"
    spark.sql("DROP SCHEMA shop CASCADE")


def named(make_config, items: str, interactions: str, **options):
    tables = {"items": items, "interactions": interactions, **options}
    return make_config(source={"kind": "tables", "tables": tables}, features={"content": ["text"]})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("items", ["items"]),
        ("main.recsys.items", ["main", "recsys", "items"]),
        ("recsys.`items of ``2026``.v1`", ["recsys", "items of `2026`.v1"]),
    ],
)
def test_names_of_tables(text, parts):
    assert is_table_name(text) and table_parts(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "/data/items",
        "./items",
        "s3://bucket/items",
        "items.parquet",
        "a.b.c.d",
        "my items",
        "items-1",
        "delta.`/x`",
        "",
    ],
)
def test_paths_are_no_names(text):
    assert not is_table_name(text)


def test_tables_of_the_catalogue_follow_their_version_and_their_files(spark, schema, make_config):
    spark.sql(f"CREATE TABLE shop.items USING delta AS {ITEMS}")
    spark.sql(f"CREATE TABLE shop.events USING parquet AS {EVENTS}")
    cfg = named(make_config, "shop.items", "spark_catalog.shop.`events`")
    first = ingested(cfg)
    assert first.facts == {"items": 1, "interactions": 1}
    assert rows(first, "items", "item_id") == [{"item_id": "x", "title": "X", "text": [1.0, 2.0]}]
    assert rows(first, "interactions", "user_id")[0]["timestamp"] == "5"
    assert ingested(cfg).status == "up to date"
    spark.sql(f"INSERT INTO shop.items {ITEMS.replace(chr(39) + 'x' + chr(39), chr(39) + 'y' + chr(39))}")
    assert ingested(cfg).facts == {"items": 2, "interactions": 1}
    assert ingested(cfg).status == "up to date"
    spark.sql(f"INSERT INTO shop.events {EVENTS}")
    assert ingested(cfg).facts == {"items": 2, "interactions": 2}
    assert ingested(cfg).status == "up to date"
    said = check.check(cfg, print)
    assert said[0] == "source.tables.items is read by Spark alone and was not opened"


def test_a_delta_table_is_read_at_the_version_that_was_hashed(spark, schema):
    spark.sql(f"CREATE TABLE shop.items USING delta AS {ITEMS}")
    identity = catalog.fingerprint(spark, "source.tables.items", "shop.items")
    spark.sql(f"INSERT INTO shop.items {ITEMS}")
    assert identity[1] == 0 and catalog.fingerprint(spark, "key", "shop.items") == [identity[0], 1]
    assert catalog.read(spark, "shop.items", identity[1]).count() == 1


def test_names_that_cannot_be_read_are_named_with_the_fix(spark, schema, make_config, capfd):
    spark.sql(f"CREATE TABLE shop.items USING delta AS {ITEMS}")
    spark.sql(f"CREATE VIEW shop.seen AS {ITEMS}")
    spark.sql(f"CREATE TABLE shop.bare USING delta AS {EVENTS}")
    spark.range(1).createOrReplaceTempView("passing")
    view = r"is a view, whose content has no version: name the table below it"
    for name, message in (
        ("shop.none", r"no table of this name in Spark's catalogue; correct the name, .* write ./shop.none for a path"),
        ("nowhere.items", r"no table of this name"),
        ("items", r"no table of this name"),
        ("main.shop.items", r"Spark has no catalogue 'main': set spark.sql.catalog.main in spark.conf"),
        ("shop.seen", view),
        ("passing", view),
        ("shop.bare", r"column 'text' is missing \(found: user_id, item_id, timestamp\)"),
    ):
        with pytest.raises(InputError, match=rf"^source.tables.items {name}: {message}") as caught:
            ingested(named(make_config, name, "shop.items"))
        assert "\n" not in str(caught.value)
    assert "Exception" not in capfd.readouterr().err


def test_a_refusal_of_the_catalogue_names_the_permission():
    error = AnalysisException("[INSUFFICIENT_PERMISSIONS] Insufficient privileges: User has no SELECT on shop.items")
    line = str(catalog._fault(error, "source.tables.items", "shop.items"))
    assert line.startswith("source.tables.items shop.items: no permission ([INSUFFICIENT_PERMISSIONS] ")
    assert line.endswith("; let the user of this job read the table and its files")
