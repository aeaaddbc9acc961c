"""Test that a commit of Spark never replaces another writer's: on a bucket and on a disk."""

import json
from pathlib import Path

import pytest
from py4j.protocol import Py4JJavaError

from adasid.config import Spark
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from tests import s3
from tests.conftest import INTERPRETED

_RIVAL = {
    "commitInfo": {
        "timestamp": 1_700_000_000_000,
        "operation": "WRITE",
        "operationParameters": {"mode": "Append"},
        "userMetadata": "rival",
        "isBlindAppend": True,
    }
}


@pytest.fixture
def on_s3(spark, server):
    """The suite's session with the server's settings; the scheme s3 has Delta's default log store there."""
    session = engine.session(Spark(master="local[2]", driver_memory="2g", shuffle_partitions=2, conf=INTERPRETED))
    hadoop = session.sparkContext._jsc.hadoopConfiguration()
    for key, name in {"access.key": "AWS_ACCESS_KEY_ID", "secret.key": "AWS_SECRET_ACCESS_KEY"}.items():
        hadoop.set(f"fs.s3a.{key}", s3.ENVIRONMENT[name])  # the JVM was started before the server
    hadoop.set("fs.s3.impl", "org.apache.hadoop.fs.s3a.S3AFileSystem")
    return session


@pytest.mark.parametrize(("scheme", "kept"), [("s3a", True), ("s3", False)], ids=["ours", "delta's default"])
def test_a_commit_between_check_and_put_is_never_lost(on_s3, bucket, server, scheme, kept):
    lake = Lake(bucket, {})
    lake.write_rows("rows", s3.SCHEMA, [{"item_id": "a"}], "first")
    rows = on_s3.createDataFrame([("b",)], "item_id string")
    s3.ask(server, "/_rival", "PUT", json.dumps(_RIVAL).encode())
    rows.write.format("delta").mode("append").save(f"{scheme}://{lake.path('rows').partition('://')[2]}")
    writers = [entry.get("userMetadata") for entry in lake.open("rows").history()]
    assert ("rival" in writers) == kept
    assert lake.version("rows") == (2 if kept else 1)
    assert sorted(lake.read("rows")["item_id"].to_pylist()) == ["a", "b"]


@pytest.fixture
def commit(spark, lake):
    """A function that commits through our log store into a table's folder on the disk, and that folder."""
    hadoop, folder = spark._jsc.hadoopConfiguration(), Path(lake.path("rows")) / "_delta_log"

    def write(name: str, content: dict, overwrite: bool) -> None:
        lines = spark._jvm.java.util.ArrayList()
        lines.add(json.dumps(content))
        target = spark._jvm.org.apache.hadoop.fs.Path(engine.uri(folder / name))
        spark._jvm.adasid.ExclusiveLogStore(hadoop).write(target, lines.iterator(), overwrite, hadoop)

    return write, folder


def test_a_commit_on_a_disk_is_refused_where_one_is(commit, lake):
    write, folder = commit
    lake.write_rows("rows", s3.SCHEMA, [{"item_id": "a"}], "first")
    write(f"{1:020}.json", _RIVAL, False)
    assert lake.version("rows") == 1
    with pytest.raises(Py4JJavaError, match=r"java\.nio\.file\.FileAlreadyExistsException"):
        write(f"{1:020}.json", {"commitInfo": {}}, False)
    assert sorted(path.name for path in folder.iterdir()) == [f"{number:020}.json" for number in (0, 1)]
    assert json.loads((folder / f"{1:020}.json").read_text()) == _RIVAL


def test_a_file_that_hadoop_wrote_is_replaced_with_its_checksum(commit, spark):
    """The checksum of the old content would make the new one unreadable."""
    write, folder = commit
    target = spark._jvm.org.apache.hadoop.fs.Path(engine.uri(folder / "_last_checkpoint"))
    files = target.getFileSystem(spark._jsc.hadoopConfiguration())
    old = files.create(target, True)
    old.writeBytes("{}")
    old.close()
    assert (folder / "._last_checkpoint.crc").exists()
    write("_last_checkpoint", {"version": 10}, True)
    new = files.open(target)
    assert bytes(new.read() for _ in range(15)) == b'{"version": 10}'
    new.close()


def test_another_default_file_system_does_not_split_the_lake(spark, lake):
    hadoop = spark.sparkContext._jsc.hadoopConfiguration()
    before = hadoop.get("fs.defaultFS")
    hadoop.set("fs.defaultFS", "hdfs://127.0.0.1:9")
    try:
        rows = spark.createDataFrame([("a",)], "item_id string")
        version = engine.write(rows, lake, "rows", s3.SCHEMA, "first")
        assert engine.read(spark, lake, "rows", version).collect() == [("a",)]
    finally:
        hadoop.set("fs.defaultFS", before)
    assert lake.read("rows")["item_id"].to_pylist() == ["a"]
