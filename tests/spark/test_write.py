"""Test Spark's Delta commits."""

from datetime import datetime, timedelta, timezone

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyspark.sql import functions as F

from pipelines.engines import spark as engine

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
SCHEMA = pa.schema([("id", pa.int64())])


@pytest.mark.parametrize("few", [False, True])
def test_a_table_that_is_merged_into_has_few_files_whatever_the_partitions(spark, lake, few):
    spark.conf.set("spark.sql.adaptive.coalescePartitions.enabled", "false")
    try:
        engine.write(spark.range(10_000).repartition(30, "id"), lake, "many", SCHEMA, "stamp", few=few)
    finally:
        spark.conf.unset("spark.sql.adaptive.coalescePartitions.enabled")
    assert sorted(lake.read("many")["id"].to_pylist()) == list(range(10_000)) and lake.input_hash("many") == "stamp"
    assert (len(lake.open("many").file_uris()) == 1) == few


def test_compaction_outside_spark_keeps_every_time(spark, lake):
    """Times are written in microseconds; INT96 wraps around where another engine reads it in nanoseconds."""
    moments = [
        datetime(1, 1, 1, tzinfo=timezone.utc),
        datetime(1969, 7, 20, 20, 17, 40, 123456, tzinfo=timezone.utc),
        datetime(9999, 12, 31, tzinfo=timezone.utc),
    ]
    schema = pa.schema([("time", pa.timestamp("us", tz="UTC"))])
    micros = F.array(*(F.lit(int((moment - EPOCH) / timedelta(microseconds=1))) for moment in moments))
    rows = spark.range(0, len(moments), 1, len(moments)).select(
        F.timestamp_micros(F.get(micros, F.col("id").cast("int"))).alias("time")
    )
    engine.write(rows, lake, "times", schema, "d")
    assert DeltaTable(lake.path("times")).optimize.compact()["numFilesRemoved"] == 3
    assert sorted(lake.read("times")["time"].to_pylist()) == moments
    micros = engine.read(spark, lake, "times").select(F.unix_micros("time").alias("at")).collect()
    assert sorted(row["at"] for row in micros) == [
        int((moment - EPOCH) / timedelta(microseconds=1)) for moment in moments
    ]
