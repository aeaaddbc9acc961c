"""Convert rows of Parquet files to the types of the lake. This runs in Spark's Python workers and imports only
Arrow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from adasid.datasets import columns
from adasid.errors import first_line
from adasid.faults import wrapped

_ROWS = 8192


class DataFile(NamedTuple):
    """A ``DataFile`` is a Parquet file with its ``path`` and ``partition``, the columns in its folder names (Hive), as
    text, null for the default partition."""

    path: str
    partition: tuple[tuple[str, str | None], ...]


def open_parquet(file: DataFile) -> pq.ParquetFile:
    """Open a Parquet file so that times that Spark wrote as INT96 are read in microseconds; in nanoseconds they wrap
    around."""
    return pq.ParquetFile(file.path, coerce_int96_timestamp_unit="us")


def read_row_groups(
    plan: list[list[tuple[DataFile, list[int]]]], schema: pa.Schema, key: str, tasks: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the tasks of ``plan`` whose numbers arrive in ``id``; each task reads some row groups of some
    files."""
    for batch in tasks:
        for number in batch["id"].to_pylist():
            for file, groups in plan[number] if plan else []:
                yield from _rows(file, groups, schema, key)


def _rows(file: DataFile, groups: list[int], schema: pa.Schema, key: str) -> Iterator[pa.RecordBatch]:
    where, partition = f"{key} {file.path}", dict(file.partition)
    try:
        with open_parquet(file) as parquet:
            names = parquet.schema_arrow.names
            wanted = [name for name in names if name in columns.read_from(schema) and name not in partition]
            if not wanted:  # all columns that are read come from folder names
                sizes = [parquet.metadata.row_group(group).num_rows for group in groups]
                parts = ((list[pa.Array](), size) for size in sizes)
            else:
                read = parquet.iter_batches(_ROWS, row_groups=groups, columns=wanted)
                parts = ((part.columns, part.num_rows) for part in read)
            for values, size in parts:
                keys = [pa.repeat(pa.scalar(value, pa.string()), size) for value in partition.values()]
                rows = pa.RecordBatch.from_arrays([*values, *keys], names=[*wanted, *partition])
                yield columns.convert(rows, schema, where)
    except (pa.ArrowException, OSError) as error:
        raise wrapped(error, f"{where}: not readable as parquet ({first_line(error)}); write the file again") from error


def convert_batches(schema: pa.Schema, where: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Convert batches that an engine has read, with :func:`columns.convert`."""
    for batch in batches:
        yield columns.convert(batch, schema, where)
