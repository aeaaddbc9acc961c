"""Delta commits of Spark."""

import pyarrow as pa
import pytest

from pipelines.engines import spark as engine

SCHEMA = pa.schema([("id", pa.int64())])


@pytest.mark.parametrize("few", [False, True])
def test_a_table_that_is_merged_into_has_few_files_whatever_the_partitions(spark, lake, few):
    spark.conf.set("spark.sql.adaptive.coalescePartitions.enabled", "false")
    try:
        engine.write(spark.range(10_000).repartition(30, "id"), lake, "many", SCHEMA, "stamp", few=few)
    finally:
        spark.conf.unset("spark.sql.adaptive.coalescePartitions.enabled")
    assert sorted(lake.read("many")["id"].to_pylist()) == list(range(10_000)) and lake.stamp("many") == "stamp"
    assert (len(lake.open("many").file_uris()) == 1) == few
