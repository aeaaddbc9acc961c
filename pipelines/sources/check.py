"""Check the files and schemas of a source without reading its rows, and without Spark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from adasid.config import Config
from adasid.datasets import arrays
from adasid.errors import InputError
from pipelines import ingest
from pipelines.sources import parquet
from pipelines.sources.fingerprint import delta


def check(cfg: Config, note: Callable[[str], None]) -> list[str]:
    """Return one phrase for each part of the source that was checked, or that Spark alone can read. Raises InputError
    that names key, path and column, TransientError where a store does not answer."""
    modalities, said = ingest.modalities_of(cfg), list[str]()
    for key, (path, form) in ingest.inputs_of(cfg).items():
        target = parquet.items(modalities, *ingest.raw_of(cfg)) if key.endswith(".items") else parquet.EVENTS
        root = parquet.local(path)
        if form == "delta":
            table = delta(key, path)
            parquet.check_schema(key, path, pa.schema(table.schema().to_arrow()), target, note)
            said.append(f"{key} version {table.version()}")
        elif root is None or form == "table":
            said.append(f"{key} is read by Spark alone and was not opened")
        elif form == "parquet" or key == "source.arrays.interactions":
            files, _ = parquet.check_files(key, path, root, target, note)
            said.append(f"{key} {len(files)} files")
        elif not root.exists():
            raise InputError(f"{key} {path}: does not exist; give an existing path")
    if source := cfg.source.arrays:
        paths = {name: str((Path(source.folder) / source.embeddings[name]).absolute()) for name in modalities}
        rows = arrays.check(str((Path(source.folder) / source.items).absolute()), paths)
        said.append(f"source.arrays.embeddings {rows} items")
    return said or [f"source.kind {cfg.source.kind}"]
