"""Read Parquet files and Delta tables of a source in the lake's schema (``adasid.datasets.columns``).

Files below a local or mounted path are read by Arrow inside Spark tasks, some row groups a task: every file by its own
schema, so that a column that only some files have, or that changes its type, does no harm; names that Hadoop cannot
parse, half floats and nanoseconds are read; an error names the file. Paths with a scheme (object storage, HDFS), Delta
tables and tables of Spark's catalogue are read by Spark.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from adasid import tables
from adasid.datasets import columns
from adasid.datasets.files import DataFile, convert_batches, open_parquet, read_row_groups
from adasid.errors import InputError, first_line
from adasid.faults import wrapped
from pipelines.engines import catalog
from pipelines.engines import spark as engine

_TASK_BYTES = 128 * 2**20
"""A task is full from this many uncompressed bytes."""
_READERS = 16
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class Target(NamedTuple):
    """A target is the ``schema`` that rows get; ``every``: columns that every file must have, ``some``: that at least
    one file must have (name -> fix); ``one_of``: columns of which one must exist, to order events."""

    schema: pa.Schema
    every: dict[str, str]
    some: dict[str, str]
    one_of: tuple[str, ...] = ()

    def check(self, where: str, names: list[str]) -> None:
        """Raise InputError unless a whole table with the columns ``names`` has the required ones."""
        found = f"(found: {', '.join(names)})"
        for name, fix in {**self.every, **self.some}.items():
            if name not in names:
                raise InputError(f"{where}: column {name!r} is missing {found}; {fix}")
        if self.one_of and not {*self.one_of} & {*names}:
            raise InputError(
                f"{where}: columns 'timestamp' and 'pos' are missing {found}; add one of them to order the events"
            )


def items(modalities: Sequence[str], texts: Sequence[str] = (), pictures: Sequence[str] = ()) -> Target:
    """Return the target of the table of items, with raw fields."""
    fix = "add it as an array of floats (null where an item has none)"
    raw = "add it, or take it out of content.encoders"
    some = {**dict.fromkeys(modalities, fix), **dict.fromkeys((*texts, *pictures), raw)}
    return Target(tables.items(modalities, texts, pictures), {"item_id": "add the item's id"}, some)


EVENTS = Target(
    tables.INTERACTIONS,
    {"user_id": "add the user's id", "item_id": "add the item's id"},
    {},
    ("timestamp", "pos", "order"),
)


class _Footer(NamedTuple):
    schema: pa.Schema
    group_bytes: list[int]


def local(path: str) -> Path | None:
    """Return the path in the file system; None for one with another scheme than ``file``."""
    if path.startswith("file:"):
        return Path("/" + path.removeprefix("file:").lstrip("/"))
    return None if "://" in path else Path(path)


def listed(root: Path) -> list[DataFile]:
    """List the file ``root``, or all files below the folder ``root``, sorted; names that begin with ``_`` or ``.`` are
    not data."""
    if root.is_file():
        return [DataFile(str(root), ())]
    schemas = []
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(("_", "."))]
        pairs = (part.partition("=") for part in Path(folder).relative_to(root).parts)
        keys = tuple((name, None if value == _NO_PARTITION else unquote(value)) for name, mark, value in pairs if mark)
        schemas += [DataFile(str(Path(folder) / name), keys) for name in names if not name.startswith(("_", "."))]
    return sorted(schemas)


def scan(spark: SparkSession, key: str, path: str, target: Target, note: Callable[[str], None]) -> DataFrame:
    """Return the rows of a Parquet file or folder. A column that only some files have is null in the others, after a
    ``note``. Raises InputError that names ``key``, file and column."""
    root = local(path)
    if root is None:
        reader = spark.read.option("mergeSchema", "true").format("parquet")
        return _by_spark(key, path, target, partial(reader.load, engine.uri(path)), note)
    files, footers = check_files(key, path, root, target, note)
    pairs = list(zip(files, footers))
    plan = _plan([pair for pair in pairs if not _fixed_size(pair[1], target)])
    tasks = spark.range(0, max(len(plan), 1), 1, max(len(plan), 1))
    rows = tasks.mapInArrow(partial(read_row_groups, plan, target.schema, key), engine.struct(target.schema))
    for schema in dict.fromkeys(footer.schema for _, footer in pairs if _fixed_size(footer, target)):
        paths = [engine.escaped(file.path, key) for file, footer in pairs if footer.schema.equals(schema)]
        reader = spark.read.format("parquet").option("basePath", str(root if root.is_dir() else root.parent))
        rows = rows.unionByName(_by_spark(key, path, target, partial(reader.load, paths), note, whole=False))
    return rows


def check_files(
    key: str, path: str, root: Path, target: Target, note: Callable[[str], None]
) -> tuple[list[DataFile], list[_Footer]]:
    """Return the files below ``root`` and their schemas, without reading rows. Raises as :func:`scan`."""
    where, files = f"{key} {path}", listed(root)
    if (root / "_delta_log").is_dir():
        raise InputError(
            f"{where}: is a Delta table, whose folder also has files of older versions: set source.tables.format: delta"
        )
    if not files:
        raise InputError(
            f"{where}: {'has no Parquet file' if root.exists() else 'does not exist'}; give an existing path"
        )
    with ThreadPoolExecutor(_READERS) as pool:
        footers = list(pool.map(partial(_footer, key), files))
    _check(where, key, files, footers, target, note)
    return files, footers


def check_schema(key: str, path: str, schema: pa.Schema, target: Target, note: Callable[[str], None]) -> None:
    """Raise InputError unless a table with this schema has the required columns, of types that can be converted."""
    where = f"{key} {path}"
    target.check(where, schema.names)
    columns.problems(schema, target.schema, where)
    _check_title(where, schema, target, note)


def table(
    spark: SparkSession,
    key: str,
    path: str,
    form: str,
    identity: Sequence[Any],
    target: Target,
    note: Callable[[str], None],
) -> DataFrame:
    """Return the rows of a table of the source. ``form``: parquet, delta, or ``table``: ``path`` is a name in Spark's
    catalogue; ``identity``: of :func:`pipelines.sources.fingerprint.fingerprint`, which ends with the version of a
    Delta table. Raises as :func:`scan`."""
    if form == "parquet":
        return scan(spark, key, path, target, note)
    if form == "table":
        version = identity[-1] if isinstance(identity[-1], int) else None
        return _by_spark(key, path, target, partial(catalog.read, spark, path, version), note)
    return delta(spark, key, path, identity[-1], target, note)


def delta(
    spark: SparkSession, key: str, path: str, version: int, target: Target, note: Callable[[str], None]
) -> DataFrame:
    """Return the rows of a Delta table at a version, as :func:`scan` does."""
    reader = spark.read.format("delta").option("versionAsOf", version)
    return _by_spark(key, path, target, partial(reader.load, engine.uri(path)), note)


def _footer(key: str, file: DataFile) -> _Footer:
    try:
        with open_parquet(file) as parquet:
            groups, partition = parquet.metadata, [name for name, _ in file.partition]
            sizes = [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
            fields = [field for field in parquet.schema_arrow if field.name not in partition]
            return _Footer(pa.schema([*fields, *((name, pa.string()) for name in partition)]), sizes)
    except (pa.ArrowException, OSError) as error:
        size = os.path.getsize(file.path) if os.path.exists(file.path) else 0
        raise wrapped(
            error,
            f"{key} {file.path}: not readable as parquet ({size} bytes: {first_line(error)}); correct the path or the "
            "format, or write the file again",
        ) from error


def _check(
    where: str,
    key: str,
    files: Sequence[DataFile],
    footers: Sequence[_Footer],
    target: Target,
    note: Callable[[str], None],
) -> None:
    distinct = dict[pa.Schema, str]()
    for file, footer in zip(files, footers):
        distinct.setdefault(footer.schema, file.path)
    target.check(where, list(dict.fromkeys(name for schema in distinct for name in schema.names)))
    for schema, path in distinct.items():
        for name in target.every:
            if name not in schema.names:
                raise InputError(
                    f"{key} {path}: column {name!r} is missing (found: {', '.join(schema.names)}), which other files "
                    "have; add it"
                )
        columns.problems(schema, target.schema, f"{key} {path}")
    known = [{*footer.schema.names} for footer in footers]
    for name in sorted(columns.read_from(target.schema) & set().union(*known)):
        without = [file.path for file, names in zip(files, known) if name not in names]
        if without:
            note(
                f"{where}: column {name!r} is missing in {len(without)} of {len(files)} files (first: {without[0]}): "
                "it is null in their rows"
            )
    for schema in distinct:
        _check_title(where, schema, target, note)


def _check_title(where: str, schema: pa.Schema, target: Target, note: Callable[[str], None]) -> None:
    if "title" in target.schema.names and "title" in schema.names:
        kind = schema.field("title").type
        if columns.texts(columns.decoded(pa.nulls(0, kind))) is None:
            note(f"{where}: column 'title' is {kind}, not text: titles are left out")


def _fixed_size(footer: _Footer, target: Target) -> bool:
    """Return whether a column is a list of fixed size, which Arrow cannot read back from Parquet where a row is null.
    Spark can."""
    names = columns.read_from(target.schema)
    return any(pa.types.is_fixed_size_list(field.type) for field in footer.schema if field.name in names)


def _plan(files: Sequence[tuple[DataFile, _Footer]]) -> list[list[tuple[DataFile, list[int]]]]:
    """Return for each task the row groups that it reads, of about ``_TASK_BYTES``."""
    plan, full = list[list[tuple[DataFile, list[int]]]](), _TASK_BYTES
    for file, footer in files:
        for group, size in enumerate(footer.group_bytes):
            if full >= _TASK_BYTES:
                plan.append([])
                full = 0
            full += size
            if plan[-1] and plan[-1][-1][0] == file:
                plan[-1][-1][1].append(group)
            else:
                plan[-1].append((file, [group]))
    return plan


def _by_spark(
    key: str,
    path: str,
    target: Target,
    load: Callable[[], DataFrame],
    note: Callable[[str], None],
    whole: bool = True,
) -> DataFrame:
    """Read by Spark's own reader what ``load`` gives: all of ``path``, or some files below it."""
    where = f"{key} {path}"
    try:
        frame = load()
    except (Py4JJavaError, PySparkException) as error:
        raise wrapped(
            error, f"{where}: not readable ({engine.root_cause(error)}); correct the path or the format"
        ) from error
    if whole:
        target.check(where, frame.columns)
    names = [name for name in frame.columns if name in columns.read_from(target.schema)]
    chosen = frame.select(*(f"`{name}`" for name in names))
    schema = to_arrow_schema(chosen.schema, timezone="UTC")
    columns.problems(schema, target.schema, where)
    _check_title(where, schema, target, note)
    if _as_in_lake(schema, target.schema):
        fields = engine.struct(target.schema)
        absent = [F.lit(None).cast(field.dataType).alias(field.name) for field in fields if field.name not in names]
        return chosen.select("*", *absent).select(*(field.name for field in fields))
    return chosen.mapInArrow(partial(convert_batches, target.schema, where), engine.struct(target.schema))


def _as_in_lake(schema: pa.Schema, target: pa.Schema) -> bool:
    """Return whether the columns have the lake's names and types, and their conversion would change no value (NaN
    becomes null, so numbers with fractions are converted)."""
    return all(
        field.name in target.names
        and (
            field.type == target.field(field.name).type in (pa.string(), pa.int64(), tables.PICTURE)
            or (pa.types.is_list(field.type) and field.type.value_type == pa.float32() == _inner(target, field.name))
        )
        for field in schema
    )


def _inner(target: pa.Schema, name: str) -> pa.DataType | None:
    kind = target.field(name).type
    return kind.value_type if pa.types.is_list(kind) else None
