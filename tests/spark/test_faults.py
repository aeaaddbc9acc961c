"""Test which of Spark's faults pass, on real jobs: a worker that is killed, a full disk of a task, bad queries and
data."""

import errno
import os
import signal

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException

from adasid.errors import InputError, TransientError
from adasid.faults import passing, wrapped
from pipelines.engines import spark as engine


def killed(batches):
    os.kill(os.getpid(), signal.SIGKILL)
    yield from batches


def disk_is_full(batches):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    yield from batches


def store_is_away(batches):
    raise TransientError("source.tables.items s3://bucket/items: not readable; write the file again")
    yield from batches


def broken(batches):
    raise ValueError("row 503 has no status")
    yield from batches


def error_of(call):
    with pytest.raises((Py4JJavaError, PySparkException)) as found:
        call()
    return found.value


@pytest.mark.parametrize(
    ("function", "passes"), [(killed, True), (disk_is_full, True), (store_is_away, True), (broken, False)]
)
def test_a_task_that_fails(spark, function, passes):
    error = error_of(lambda: spark.range(4).mapInArrow(function, "id long").collect())
    assert passing(error) == passes, engine.root_cause(error)
    assert wrapped(error, "a").exit_code == (75 if passes else 3)


def test_queries_and_files_that_are_wrong(spark, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 is not enough")
    for call in (
        lambda: spark.range(4).select("absent").collect(),
        lambda: spark.read.parquet(str(tmp_path / "absent")),
        lambda: spark.read.schema("a long").parquet(str(tmp_path / "broken.parquet")).collect(),
        lambda: spark.sql("select raise_error('not a number')").collect(),
    ):
        error = error_of(call)
        assert not passing(error), engine.root_cause(error)
        assert isinstance(wrapped(error, "a"), InputError)
