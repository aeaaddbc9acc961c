"""Look up tables of Spark's catalogues by name, and register tables of the lake in them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from adasid.config.names import table_parts
from adasid.errors import AdasidError, InputError
from adasid.faults import wrapped
from pipelines.engines import spark as engine

_PERMISSION = re.compile(
    r"permission|not authori[sz]ed|unauthori[sz]ed|AccessControlException|AccessDenied|access denied|forbidden"
    r"|privilege|\b40[13]\b",
    re.I,
)
_GONE = re.compile(r"(\w+:/\S+) doesn't exist, or is not a Delta table")
_SESSION = "spark_catalog"


class Entry(NamedTuple):
    """An entry of a catalogue. ``provider``: the table's format, such as delta, empty for a view; ``location``: of its
    files, as a local path or a URI."""

    provider: str
    location: str


def entry(spark: SparkSession, key: str, name: str) -> Entry | None:
    """Return the entry of a name, None where there is no such table. Raises InputError that names ``key``, ``name`` and
    the fix where no catalogue answers for it or it may not be read, TransientError for a passing fault."""
    _configured(spark, key, name)
    try:
        if not spark.catalog.tableExists(name):
            return None
        described = [row.asDict() for row in spark.sql(f"DESCRIBE TABLE EXTENDED {name}").collect()]
    except (Py4JJavaError, PySparkException) as error:
        if gone := _GONE.search(str(error)):  # registered, but its folder is not there (yet)
            return Entry("delta", plain(gone[1]))
        raise _fault(error, key, name) from error
    names = [row["col_name"] for row in described]
    if "# Detailed Table Information" not in names:  # a temporary view
        return Entry("", "")
    rows = described[names.index("# Detailed Table Information") :]
    values = {row["col_name"]: row["data_type"] for row in rows}
    if values.get("Type") == "VIEW":
        return Entry("", "")
    return Entry(str(values.get("Provider", "")).lower(), plain(values.get("Location", "")))


def source(spark: SparkSession, key: str, name: str) -> Entry:
    """Return the entry of a table to read. Raises InputError as :func:`entry`, and for an unknown name or a view."""
    found = entry(spark, key, name)
    if found is None:
        raise InputError(
            f"{key} {name}: no table of this name in Spark's catalogue; correct the name, set the catalogue in "
            f"spark.conf, or write ./{name} for a path"
        )
    if not found.provider:
        raise InputError(
            f"{key} {name}: is a view, whose content has no version: name the table below it, or store the view as a "
            "table"
        )
    return found


def fingerprint(spark: SparkSession, key: str, name: str) -> list[Any]:
    """Return values that change with the content of a table: id and version of a Delta table, else name, size and time
    of change of each file. Raises InputError as :func:`source`, and for a table without files."""
    found = source(spark, key, name)
    try:
        if found.provider == "delta":
            detail = spark.sql(f"DESCRIBE DETAIL {name}").collect()[0]
            newest = spark.sql(f"DESCRIBE HISTORY {name} LIMIT 1").collect()[0]
            return [str(detail["id"]), int(newest["version"])]
        spark.catalog.refreshTable(name)
        files = sorted(file for path in spark.table(name).inputFiles() for file in listed(spark, path))
    except (Py4JJavaError, PySparkException) as error:
        raise _fault(error, key, name) from error
    if not files:
        raise InputError(
            f"{key} {name}: is a table of {found.provider} without files that Spark can list, so its content has no "
            "version: bring a Delta table, or one of files such as Parquet"
        )
    return files


def listed(spark: SparkSession, path: str) -> list[list[Any]]:
    """Return URI, size and time of change of a file, or of all files below a folder. ``path``: a URI, escaped."""
    jvm: Any = spark._jvm
    target = jvm.org.apache.hadoop.fs.Path(jvm.java.net.URI(path))
    files, result = target.getFileSystem(spark._jsc.hadoopConfiguration()).listFiles(target, True), []
    while files.hasNext():
        file = files.next()
        result.append([file.getPath().toUri().toString(), file.getLen(), file.getModificationTime()])
    return result


def read(spark: SparkSession, name: str, version: int | None) -> DataFrame:
    """Return a table by its name, a Delta table at ``version``."""
    return spark.sql(f"SELECT * FROM {name}" + ("" if version is None else f" VERSION AS OF {version}"))


def create(spark: SparkSession, key: str, name: str, location: str) -> None:
    """Create the table ``name`` over the Delta table at ``location``, unless it exists. Raises as :func:`entry`."""
    uri = engine.uri(location).replace("\\", "\\\\").replace("'", "\\'")
    try:
        spark.sql(f"CREATE TABLE IF NOT EXISTS {name} USING DELTA LOCATION '{uri}'")
    except (Py4JJavaError, PySparkException) as error:
        raise _fault(error, key, name) from error


def check_schema(spark: SparkSession, key: str, name: str) -> None:
    """Raise InputError where the schema (database) in which ``name`` would be created does not exist."""
    _configured(spark, key, name)
    schema = ".".join(_quoted(part) for part in table_parts(name)[:-1])
    try:
        exists = not schema or spark.catalog.databaseExists(schema)
    except (Py4JJavaError, PySparkException) as error:
        raise _fault(error, key, name) from error
    if not exists:
        raise InputError(f"{key} {name}: no schema {schema} in the catalogue: create it (CREATE SCHEMA {schema})")


def in_memory(spark: SparkSession, name: str) -> bool:
    """Return whether the catalogue of ``name`` ends with this process."""
    parts = table_parts(name)
    mine = len(parts) < 3 or parts[0] == _SESSION
    return mine and spark.conf.get("spark.sql.catalogImplementation") == "in-memory"


def plain(uri: str) -> str:
    """Return a location as the lake writes it: a local path, or a URI with the scheme of the object store."""
    if uri.startswith("file:"):
        return "/" + unquote(uri).removeprefix("file:").strip("/")
    return re.sub(r"^s3[an]://", "s3://", unquote(uri)).rstrip("/")


def _configured(spark: SparkSession, key: str, name: str) -> None:
    """Raise InputError for a name of three parts whose catalogue Spark does not have."""
    parts = table_parts(name)
    if len(parts) == 3 and parts[0] != _SESSION and not spark.conf.get(f"spark.sql.catalog.{parts[0]}", None):
        raise InputError(
            f"{key} {name}: Spark has no catalogue {parts[0]!r}: set spark.sql.catalog.{parts[0]} in spark.conf or by "
            "spark-submit, or correct the name"
        )


def _quoted(part: str) -> str:
    return "`" + part.replace("`", "``") + "`"


def _fault(error: Exception, key: str, name: str) -> AdasidError:
    cause = engine.root_cause(error)
    if _PERMISSION.search(cause):
        fix = "let the user of this job read the table and its files"
        return wrapped(error, f"{key} {name}: no permission ({cause}); {fix}")
    fix = "correct the name, or the catalogue's settings in spark.conf"
    return wrapped(error, f"{key} {name}: the catalogue does not give this table ({cause}); {fix}")
