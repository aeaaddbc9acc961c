"""Tables that stay at their source (``source.tables.in_place``): the lake's table has one row, the Delta table's
location and the version that ingest has checked, and every reader converts the rows at that version as ingest would.

So all that the lake knows of a table (versions, input hash, lineage) is of its own table, which alone is maintained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from adasid import tables
from adasid.datasets import columns
from adasid.errors import AdasidError, first_line
from adasid.faults import wrapped
from adasid.storage import delta_options
from pipelines.engines import spark as engine
from pipelines.engines.lake import Lake
from pipelines.sources import parquet

TABLES = ("items", "interactions")
_GONE = re.compile(r"FileNotFound|NOT_FOUND|does not exist|DOES_NOT_EXIST|not readable")


class Reference(NamedTuple):
    """The ``version`` of the Delta table at ``location``, a local path or a URI."""

    location: str
    version: int


def reference(lake: Lake, table: str) -> Reference | None:
    """Return where the rows of a table are, None where they are in the lake."""
    if lake.schema(table).names != tables.IN_PLACE.names:
        return None
    (row,) = lake.read(table).to_pylist()
    return Reference(row["location"], row["version"])


def write(lake: Lake, table: str, at: Reference, digest: str) -> int:
    """Replace a table by a reference; return the new version."""
    return lake.write_rows(table, tables.IN_PLACE, [at._asdict()], digest)


def read(spark: SparkSession, lake: Lake, table: str, target: parquet.Target) -> DataFrame:
    """Return the rows of ``items`` or ``interactions``, wherever they are. Raises InputError for a version that the
    source does not have any more."""
    at = reference(lake, table)
    if at is None:
        return engine.read(spark, lake, table)
    with reading(lake, table):
        return parquet.delta(spark, table, at.location, at.version, target, lambda text: None)


def size(lake: Lake, *tables: str) -> int:
    """Return the bytes of the data files of tables, wherever they are, for a table that can be read."""
    total = 0
    for table in tables:
        at = reference(lake, table) if table in TABLES else None
        files = lake.open(table) if at is None else _opened(table, at)
        total += sum(pa.table(files.get_add_actions())["size_bytes"].to_pylist())
    return total


def _opened(table: str, at: Reference) -> DeltaTable:
    try:
        return DeltaTable(at.location, version=at.version, storage_options=delta_options(at.location))
    except Exception as error:
        raise _fault(error, table, at) from error


def batches(lake: Lake, table: str, schema: pa.Schema, condition: pc.Expression) -> Iterator[pa.RecordBatch]:
    """Stream the columns of ``schema`` in the rows that satisfy a condition, outside Spark."""
    at = reference(lake, table)
    if at is None:
        yield from lake.batches(table, None, schema.names, condition)
        return
    wanted = columns.read_from(schema) | ({"rating"} if "label" in schema.names else set())
    try:
        source = DeltaTable(at.location, version=at.version, storage_options=delta_options(at.location))
        dataset = source.to_pyarrow_dataset()
        for batch in dataset.to_batches(columns=[name for name in dataset.schema.names if name in wanted]):
            rows = columns.convert(batch, schema, f"{table} {at.location}")
            yield from pa.Table.from_batches([rows]).filter(condition).to_batches()
    except AdasidError:
        raise
    except Exception as error:
        raise _fault(error, table, at) from error


@contextmanager
def reading(lake: Lake, *names: str) -> Iterator[None]:
    """Name the source in an error about one of the tables ``names`` that is read in place."""
    try:
        yield
    except (Py4JJavaError, PySparkException, AdasidError) as error:
        if fault := engine.input_error(error):
            raise fault from error
        for table in names if _GONE.search(str(error)) else ():
            at = reference(lake, table)
            if at and at.location.rpartition("://")[2] in str(error):
                raise _fault(error, table, at) from error
        raise


def _fault(error: Exception, table: str, at: Reference) -> AdasidError:
    cause = first_line(error) if isinstance(error, AdasidError) else engine.root_cause(error)
    return wrapped(
        error,
        f"{table} is read in place, and {at.location} cannot be read at version {at.version} ({cause}): run "
        "jobs/ingest.py again, or take it out of source.tables.in_place",
    )
