"""Test what a session that runs already takes from later calls, and which joins broadcast."""

from adasid.config import Spark
from pipelines.engines import spark as engine

PARTITIONS = "spark.sql.shuffle.partitions"


def test_the_number_of_partitions_of_a_stage_stays_until_a_call_with_another_size(spark):
    before = spark.conf.get(PARTITIONS)
    try:
        engine.session(Spark(), size=100 * 2**30)
        assert spark.conf.get(PARTITIONS) == "3200"
        engine.session(Spark())
        assert spark.conf.get(PARTITIONS) == "3200"
        engine.session(Spark(), size=0)
        assert spark.conf.get(PARTITIONS) == str(2 * spark.sparkContext.defaultParallelism)
    finally:
        spark.conf.set(PARTITIONS, before)


def test_a_small_table_fits_a_broadcast_whatever_it_is_computed_from(spark):
    small, large = spark.range(10), spark.range(10**9)
    assert engine.fits_broadcast(small)
    assert not engine.fits_broadcast(large)
    assert not engine.fits_broadcast(large.join(small, "id").persist())
