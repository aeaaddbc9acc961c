"""Start the Spark session, and read and write Delta tables through it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyspark
from py4j.protocol import Py4JJavaError
from pyspark import SparkConf, SparkContext
from pyspark.logger import PySparkLogger
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from adasid import config
from adasid.errors import InputError
from adasid.faults import wrapped
from adasid.files import Location
from pipelines.engines import code
from pipelines.engines.lake import Lake, stamped

JARS = ("delta-spark_4.2_2.13-4.4.0.jar", "delta-storage-4.4.0.jar")
S3_JAR = "hadoop-aws-3.5.0.jar"
LOG_STORE_JAR = "adasid-log-store-2.jar"
_TASK_LOGS = (
    "org.apache.spark.util.Utils",
    "org.apache.spark.executor.Executor",
    "org.apache.spark.scheduler.TaskSetManager",
    "org.apache.spark.sql.execution.datasources.FileFormatWriter",
    "org.apache.spark.sql.delta.files.DeltaFileFormatWriter",
)
"""These loggers of the driver print a task's stack trace before its error reaches the job, which prints one line and
writes the trace to a file."""
_ROW_GROUP = "parquet.block.size"
_QUERY_LOG = "SQLQueryContextLogger"
"""PySpark's logger prints a SQL error with its stack trace before the error reaches the job."""
_EXTENSION = "io.delta.sql.DeltaSparkSessionExtension"
_LOG_STORE = "adasid.ExclusiveLogStore"


_PARTITIONS = "spark.sql.shuffle.partitions"
_PARTITION_BYTES = 32 * 2**20
_COMPRESSED = "spark.sql.inMemoryColumnarStorage.compressed"
_UNCOMPRESSED_BYTES = 2**29
"""Up to so many bytes of input files, cached frames are not compressed."""
_PROGRESS = "spark.ui.showConsoleProgress"
_DEFAULTS = {
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    "spark.sql.autoBroadcastJoinThreshold": "64MB",
    # a join or a group by user keeps the partitions of its input
    "spark.sql.requireAllClusterKeysForCoPartition": "false",
    # arrays are formed of sorted rows, in bounded memory; by hash, Spark sorts from 128 groups on all the same
    "spark.sql.execution.useObjectHashAggregateExec": "false",
    # beyond it Java would interpret a generated method, ten times as slow as Spark without generated stages
    "spark.sql.codegen.hugeMethodLimit": "8000",
    "spark.ui.enabled": "false",
    _PROGRESS: "false",
    "spark.log.level": "ERROR",
}
"""``spark-submit --conf`` and spark-defaults.conf may replace these settings."""
_S3A = {"attempts.maximum": "3", "retry.limit": "4", "connection.establish.timeout": "5s"}
"""A store that does not answer ends the job within a minute, not ten."""
_REQUIRED = {
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # commits exclude each other: ExclusiveLogStore.java
    "spark.delta.logStore.file.impl": _LOG_STORE,
    "spark.delta.logStore.s3a.impl": _LOG_STORE,
    "spark.databricks.delta.properties.defaults.enableDeletionVectors": "false",
    # versions that a generation needs stay readable
    "spark.databricks.delta.properties.defaults.enableExpiredLogCleanup": "false",
    "spark.sql.session.timeZone": "UTC",
    # a task that writes few partitions of a table does not sort its rows again by partition
    "spark.sql.maxConcurrentOutputFileWriters": "4",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",  # compaction outside Spark overflows INT96
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
    "spark.sql.legacy.parquet.nanosAsLong": "true",  # 19 digits are nanoseconds
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",  # 00001 is not 1
    "spark.sql.execution.arrow.pyspark.enabled": "true",
}
"""Without these settings values would be read or written wrongly; only ``spark.conf`` replaces them."""


def session(settings: config.Spark, name: str = "adasid", size: int | None = None) -> SparkSession:
    """Get or start a session with Delta. ``size``: bytes of the files that it will read, from which settings follow
    (:func:`sized`); None: they stay as they are.

    Under spark-submit its master and memory win over the config's, and what `--conf` and spark-defaults.conf set wins
    over :data:`_DEFAULTS`. Raises InputError with the cause and the fix where Spark does not start, or where Java or
    Delta's jars are missing.
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    start = SparkConf(loadDefaults=False)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        for key, value in _launch(settings).items():
            start.set(key, value)
    try:
        SparkContext._ensure_initialized(conf=start)
        builder, running = SparkSession.builder.appName(name), SparkSession._instantiatedSession is not None
        given = dict(SparkConf().getAll())
        options = chosen(settings, given, dict(start.getAll()))
        for key, value in options.items():
            builder = builder.config(key, value)
        spark = builder.getOrCreate()
        follow = sized(size or 0, spark.sparkContext.defaultParallelism) if size is not None or not running else {}
        for key in follow.keys() - {**given, **options}.keys():
            spark.conf.set(key, follow[key])
        hadoop = spark.sparkContext._jsc.hadoopConfiguration()
        for key, value in options.items():
            if key.startswith("spark.hadoop."):  # a context that runs already does not take it from its session
                hadoop.set(key.removeprefix("spark.hadoop."), value)
    except Exception as error:
        raise wrapped(error, f"Spark did not start ({root_cause(error)}): {_start_fix(error)}") from error
    try:
        thread = spark._jvm.java.lang.Thread.currentThread()  # type: ignore[union-attr]
        for required in (_EXTENSION, _LOG_STORE):
            thread.getContextClassLoader().loadClass(required)
    except Exception as error:
        raise InputError(
            f"Delta's jars are not in {jar_folder()} ({', '.join((*JARS, LOG_STORE_JAR))}): run "
            "`python -m pipelines.engines.jars`, or `make setup`"
        ) from error
    if not str(spark.sparkContext.master).startswith("local") and not _sent(spark):
        spark.sparkContext.addPyFile(str(code.archive()))
    log4j = spark._jvm.org.apache.logging.log4j  # type: ignore[union-attr]
    PySparkLogger.getLogger(_QUERY_LOG).setLevel(logging.CRITICAL)
    for logger in _TASK_LOGS:
        log4j.core.config.Configurator.setLevel(logger, log4j.Level.OFF)
    return spark


def sized(size: int, cores: int) -> dict[str, str]:
    """Return the settings that follow from the bytes of the input's files. A cached frame is read a few times: to
    compress it costs more than it saves, as long as it fits in memory."""
    return {_PARTITIONS: str(partitions(size, cores)), _COMPRESSED: str(size > _UNCOMPRESSED_BYTES).lower()}


def partitions(size: int, cores: int) -> int:
    """Return the number of shuffle partitions for an input of ``size`` bytes in compressed files: a partition then has
    about 100 MB in memory, and each core has some. Adaptive execution joins those that turn out small."""
    return max(2 * cores, -(-size // _PARTITION_BYTES))


def _sent(spark: SparkSession) -> bool:
    """Return whether the executors have the packages' code: by an earlier call, or by spark-submit --py-files."""
    return any(re.search(r"adasid[^/]*\.(zip|whl|egg|py)$", file) for file in spark.sparkContext.listFiles)


def _launch(settings: config.Spark) -> dict[str, str]:
    """Return the settings that the JVM needs at its start."""
    options = f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties')}"
    if class_archive().exists():  # Java says nothing where it does not fit, and goes without
        options = f"{options} -XX:SharedArchiveFile={class_archive()} -Xlog:disable -Xlog:all=error:stderr"
    extra = settings.conf.get("spark.driver.extraJavaOptions")
    return {
        "spark.master": settings.master,
        "spark.driver.memory": settings.driver_memory,
        # a Python process counts as a shell, for which Spark would set it to true
        _PROGRESS: settings.conf.get(_PROGRESS, "false"),
        "spark.driver.extraJavaOptions": f"{options} {extra}" if extra else options,
    }


def chosen(settings: config.Spark, given: Mapping[str, str], launch: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the settings of a session. ``given``: those of spark-submit and spark-defaults.conf; ``launch``: those
    with which the JVM was started."""
    own = {_PARTITIONS: str(settings.shuffle_partitions)} if settings.shuffle_partitions else {}
    defaults = {**own, **_DEFAULTS, **_object_store()}
    extensions = [part for part in given.get("spark.sql.extensions", "").split(",") if part and part != _EXTENSION]
    return {
        **{key: value for key, value in defaults.items() if key not in given},
        "spark.sql.extensions": ",".join((_EXTENSION, *extensions)),
        **_REQUIRED,
        **{key: str(value) for key, value in settings.conf.items()},
        **(launch or {}),
    }


def _object_store() -> dict[str, str]:
    """Return the settings of s3a that the environment implies. Its keys are no part: Hadoop reads AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, or the machine's role, itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    settings = {"endpoint.region": region} if region else {}
    if endpoint:
        secure = str(not endpoint.startswith("http:")).lower()
        settings |= {"endpoint": endpoint, "path.style.access": "true", "connection.ssl.enabled": secure}
    return {f"spark.hadoop.fs.s3a.{key}": value for key, value in {**_S3A, **settings}.items()}


def _start_fix(error: Exception) -> str:
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        return "it needs Java 17 or newer on PATH or JAVA_HOME: run `make setup`"
    home = os.environ.get("SPARK_HOME")
    if home and Path(home).resolve() != Path(pyspark.__file__).parent.resolve():
        return (
            f"SPARK_HOME is {home}, which must be Spark {pyspark.__version__} with Delta's jars: unset it, or set it so"
        )
    if "GATEWAY" in str(error):
        return "the JVM says why above; check spark.master, spark.driver_memory and spark.conf, or run `make setup`"
    return "check spark.master, spark.conf and what spark-submit and spark-defaults.conf set"


def jar_folder() -> Path:
    """Return the folder in which Spark looks for jars, however it is started."""
    return Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent) / "jars"


def class_archive() -> Path:
    """Return the path of the archive of Spark's classes (:mod:`pipelines.engines.class_archive`)."""
    return jar_folder().parent / "adasid-classes.jsa"


def struct(schema: pa.Schema) -> StructType:
    """Return the Spark schema of an Arrow schema."""
    return from_arrow_schema(schema)


def read(spark: SparkSession, lake: Lake, table: str, version: int | None = None) -> DataFrame:
    """Read the table at ``version``, its pin, or its latest version."""
    check_scheme(lake.root)
    version = lake.open(table, version).version()
    return spark.read.format("delta").option("versionAsOf", version).load(uri(lake.path(table)))


def write(
    frame: DataFrame,
    lake: Lake,
    table: str,
    schema: pa.Schema,
    digest: str,
    replace: str | None = None,
    few: bool = False,
    sources: Mapping[str, int] | None = None,
    partition: Sequence[str] = (),
) -> int:
    """Replace the table by ``frame``, cast to its schema, in one commit with the input hash ``digest`` and the versions
    of ``sources``; return the version.

    ``replace``: replace only the rows that satisfy this condition, which all of ``frame`` must satisfy. ``few``: write
    few large files, whatever the partitions, at the price of a shuffle. ``partition``: columns by whose values the
    table is partitioned; rows stay in the order that they have.
    """
    check_scheme(lake.root)
    target = struct(schema)
    columns = [F.col(field.name).cast(field.dataType).alias(field.name) for field in target]
    writer = frame.select(*columns).write.format("delta").mode("overwrite").partitionBy(*partition)
    writer = writer.option("userMetadata", stamped(digest, sources))
    writer = writer.option("optimizeWrite", "true") if few else writer
    writer = (
        writer.option("replaceWhere", replace)
        if replace and lake.exists(table)
        else writer.option("overwriteSchema", "true")
    )
    writer.save(uri(lake.target(table)))
    return lake.open(table).version() if table not in lake.pins else Lake(lake.root, {}).version(table)


@contextmanager
def row_groups(spark: SparkSession, size: int) -> Iterator[None]:
    """Make the files that are written meanwhile have row groups of about ``size`` bytes."""
    spark.conf.set(_ROW_GROUP, size)
    try:
        yield
    finally:
        spark.conf.unset(_ROW_GROUP)


def fits_broadcast(frame: DataFrame) -> bool:
    """Return whether ``frame`` is small enough to be broadcast in a join."""
    session: Any = frame.sparkSession
    limit = session._jsparkSession.sessionState().conf().autoBroadcastJoinThreshold()
    size = frame._jdf.queryExecution().optimizedPlan().stats().sizeInBytes()
    return bool(int(str(size)) <= limit)


def uri(path: str | Location) -> str:
    """Return a path as Spark takes it: with a scheme, whatever its default file system is."""
    text = str(path)
    if text.startswith("s3://"):
        return f"s3a{text[2:]}"
    return text if "://" in text or text.startswith("file:") else f"file://{Path(text).absolute()}"


def check_scheme(path: str) -> None:
    """Raise InputError where Spark lacks the jars of the path's scheme."""
    if uri(path).startswith("s3a://") and not (jar_folder() / S3_JAR).exists():
        raise InputError(
            f"{path}: {S3_JAR} is not in {jar_folder()}, so Spark cannot read s3://: run `make setup EXTRAS=s3`, or "
            "`python -m pipelines.engines.jars --s3`"
        )


def escaped(path: str, key: str) -> str:
    """Escape ``path`` so that Hadoop takes it literally, not as a pattern. Raises InputError for a local path with a
    colon, which Hadoop cannot parse."""
    if "://" in path:
        return path
    if ":" in path:
        raise InputError(f"{key} {path}: Spark cannot read a path with a colon: rename the file")
    return re.sub(r"([\\*?{}\[\]])", r"\\\1", path)


def input_error(error: Exception) -> InputError | None:
    """Return the InputError that a Python function raised on a Spark worker; None for any other error."""
    match = re.search(r"adasid\.errors\.InputError: ([^\n]+)", str(error))
    return InputError(match.group(1).strip()) if match else None


def root_cause(error: Exception) -> str:
    """Return the first line of an error, of its root cause where it comes from Java, with the name of the file
    concerned."""
    if isinstance(error, Py4JJavaError):
        cause = error.java_exception
        while cause.getCause() is not None:
            cause = cause.getCause()
        line = str(cause.toString()).splitlines()[0]
    else:
        line = next(line for line in [*str(error).strip().splitlines(), type(error).__name__] if line)
    file = re.search(r"(?<=reading file )\S+(?=[.,]?\s)|[^\s/]+\.parquet", str(error))
    name = file.group().rstrip(".,") if file else ""
    return f"{line}, file {name}" if name and name not in line else line


def versions() -> dict[str, str]:
    """Return the versions of the libraries that affect a result, for manifests and tracking."""
    return {name: importlib.metadata.version(name) for name in ("pyspark", "delta-spark", "torch", "numpy", "pyarrow")}
