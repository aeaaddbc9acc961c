"""Identify the content of a source, so that ingest runs again where it has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException

from adasid.config import Config
from adasid.errors import InputError
from adasid.faults import wrapped
from adasid.storage import delta_options
from pipelines.engines import catalog
from pipelines.engines import spark as engine
from pipelines.sources import parquet

_READ_THROUGH = 2**28
"""A local file of at most this many bytes is identified by its content."""


def fingerprint(cfg: Config, key: str, path: str, form: str) -> list[Any]:
    """Return values that change with the content of a source: id and version of a Delta table, else each file's name,
    size and content (of a local file of up to 256 MiB) or modification time. A copy with the same content is the same
    source."""
    if form == "table":
        return catalog.fingerprint(engine.session(cfg.spark), key, path)
    if form == "delta":
        table = delta(key, path)
        return [str(table.metadata().id), table.version()]
    root = parquet.local(path)
    if root is not None:
        return _local_files(key, path, root)
    engine.check_scheme(path)
    spark = engine.session(cfg.spark)
    try:
        target = spark._jvm.org.apache.hadoop.fs.Path(engine.uri(path))  # type: ignore[union-attr]
        whole = target.getFileSystem(spark._jsc.hadoopConfiguration()).makeQualified(target)
        base = whole.getParent().toUri().toString()
        names = [[uri.removeprefix(base), *rest] for uri, *rest in catalog.listed(spark, whole.toUri().toString())]
    except (Py4JJavaError, PySparkException) as error:
        problem = (
            "does not exist"
            if "FileNotFound" in engine.root_cause(error)
            else f"cannot be listed ({engine.root_cause(error)})"
        )
        raise wrapped(
            error, f"{key} {path}: {problem}; give an existing path (relative paths start at the working directory)"
        ) from error
    return sorted(names)


def delta(key: str, path: str, version: int | None = None) -> DeltaTable:
    """Open a Delta table of a source outside Spark. Raises InputError where there is none."""
    try:
        return DeltaTable(path, version=version, storage_options=delta_options(path))
    except Exception as error:
        raise wrapped(
            error,
            f"{key} {path}: not a Delta table ({engine.root_cause(error)}); correct the path, or set "
            "source.tables.format: parquet",
        ) from error


def _local_files(key: str, path: str, root: Path) -> list[Any]:
    results = list[Any]()
    for file, _ in parquet.listed(root):
        stat = os.stat(file)
        mark = stat.st_mtime_ns if stat.st_size > _READ_THROUGH else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        results.append([os.path.relpath(file, root.parent), stat.st_size, mark])
    if not results:
        problem = "has no file" if root.exists() else "does not exist"
        raise InputError(
            f"{key} {path}: {problem}; give an existing path (relative paths start at the working directory)"
        )
    return results
