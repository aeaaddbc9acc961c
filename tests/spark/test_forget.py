"""Test that Spark and Arrow read and filter a table of Spark's from which a user was removed."""

import pyarrow as pa
import pyarrow.compute as pc

from adasid.tables import SEQUENCES, USER_STATS
from pipelines.engines import spark as engine
from pipelines.engines.tracking import stage
from pipelines.nightly.forget import forget
from tests.unit.test_forget import mentions


def test_a_table_of_sparks_can_be_read_and_filtered_afterwards(spark, make_config):
    cfg, user = make_config(), "Zoë O'Hara"
    with stage(cfg, "features", journal=False) as context:
        lake = context.lake
        for number in (1, 2):
            rows = [(user, 0, number, 1), ("u1", 1, number, 1), ("u2", 2, number, 1)]
            frame = spark.createDataFrame(rows, engine.struct(USER_STATS))
            engine.write(frame, lake, "user_stats", USER_STATS, f"features {number}", sources={"interactions": number})
            rows = [(index % 2, name, index, "test", [number], 1) for index, name in enumerate((user, "u1", "u2"))]
            frame = spark.createDataFrame(rows, engine.struct(SEQUENCES))
            engine.write(frame, lake, "sequences", SEQUENCES, f"features {number}", partition=("bucket",))
        assert len(mentions(lake.root, user)) >= 4
        forget(cfg, context, [user])
        assert not mentions(lake.root, user)
        table = spark.read.format("delta").load(lake.path("user_stats"))
        assert sorted(table.filter("interactions = 2").toPandas()["user_id"]) == ["u1", "u2"]
        assert table.filter("user_id = 'u2'").count() == 1
        assert pa.Table.from_batches(lake.batches("user_stats", None, None, pc.field("user_id") == "u2")).num_rows == 1
        assert lake.fresh("features 2", "user_stats") and lake.lineage("user_stats") == {"interactions": 2}
        table = spark.read.format("delta").load(lake.path("sequences"))
        assert sorted(table.filter("bucket = 0").toPandas()["user_id"]) == ["u2"]
        assert lake.open("sequences").metadata().partition_columns == ["bucket"]
        left = pa.Table.from_batches(lake.batches("sequences", None, None, pc.field("bucket") == 1))
        assert left["user_id"].to_pylist() == ["u1"] and lake.fresh("features 2", "sequences")
        again = spark.createDataFrame([("u3", 0, 3, 1)], engine.struct(USER_STATS))
        engine.write(again, lake, "user_stats", USER_STATS, "features 3")
        assert spark.read.format("delta").load(lake.path("user_stats")).count() == 1
