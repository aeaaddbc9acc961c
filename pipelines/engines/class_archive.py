"""Write an archive of the classes that Spark and Delta load, which halves the start of every job's JVM (Java's dynamic
class data sharing, JEP 350).

Usage: ``python -m pipelines.engines.class_archive``. Java ignores an archive of other jars or of another version of
Java; without an archive jobs only start more slowly.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from adasid.config import Spark
from adasid.errors import AdasidError
from pipelines import log
from pipelines.engines.lake import Lake
from pipelines.engines.spark import class_archive, read, session, write

_SCHEMA = pa.schema([("user", pa.string()), ("item", pa.int64()), ("vector", pa.list_(pa.float32()))])
_SECONDS = 120


def main() -> int:
    """Write the archive if there is none; return the exit code, 0 also where Java cannot write it."""
    target = class_archive()
    if target.exists():
        return 0
    draft = target.with_suffix(f".{os.getpid()}.draft")
    options = f"-XX:ArchiveClassesAtExit={draft} -XX:TieredStopAtLevel=1 -Xlog:disable -Xlog:all=error:stderr"
    os.environ["SPARK_SUBMIT_OPTS"] = options
    with tempfile.TemporaryDirectory() as folder:
        try:
            spark = session(Spark(master="local[2]", driver_memory="1g", shuffle_partitions=2), "class archive")
        except AdasidError as error:
            log.line(str(error), "ERROR")
            return 1
        _load_classes(spark, Lake(folder, {}))
        gateway = spark.sparkContext._gateway
        spark.stop()
        gateway.shutdown()  # type: ignore[union-attr]
        gateway.proc.stdin.close()  # type: ignore[union-attr]
        gateway.proc.wait(_SECONDS)  # type: ignore[union-attr]
    if draft.exists():
        draft.replace(target)
    else:
        log.line("Java wrote no class archive: jobs start more slowly", "WARN")
    return 0


def _load_classes(spark: SparkSession, lake: Lake) -> None:
    """Run what jobs run: writes and reads of Parquet and Delta, joins, windows, aggregates and Python functions."""
    rows = spark.range(200).select(
        (F.col("id") % 7).cast("string").alias("user"), F.col("id").alias("item"), F.array(F.rand(1)).alias("vector")
    )
    for digest in ("first", "second"):
        write(rows, lake, "rows", _SCHEMA, digest)
    write(rows.where("user = '1'"), lake, "rows", _SCHEMA, "third", replace="user = '1'", few=True)
    table = read(spark, lake, "rows")
    counts = table.groupBy("user").agg(F.count("*").alias("n"), F.collect_list("item").alias("items"))
    ranked = table.withColumn("rank", F.expr("row_number() over (partition by user order by item)"))
    joined = ranked.join(counts, "user").withColumn("hash", F.xxhash64("user", "item"))
    joined.mapInArrow(lambda batches: batches, joined.schema).orderBy("hash").toArrow()
    joined.approxQuantile("n", [0.5], 0.01)
    joined.groupBy("user").applyInPandas(lambda frame: frame, joined.schema).count()
    plain = str(Path(lake.root) / "plain")
    joined.write.partitionBy("user").parquet(plain)
    spark.read.parquet(plain).distinct().collect()


if __name__ == "__main__":
    sys.exit(main())
