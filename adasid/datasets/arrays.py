"""Read embedding arrays beside a list of items: one ``.npy`` file per modality, whose row i belongs to row i of the
list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adasid import tables
from adasid.datasets.arrow import vectors
from adasid.datasets.columns import convert
from adasid.errors import InputError
from adasid.faults import wrapped

BATCH = 8192
_LINES = pa.csv.ParseOptions(delimiter="\x01", quote_char=False, ignore_empty_lines=False)
_AS_TEXT = pa.csv.ConvertOptions(column_types={"item_id": pa.string()})


def check(items: str, embeddings: Mapping[str, str]) -> int:
    """Return the number of items. Raises InputError, naming the file and its config key, if a file cannot be read or
    the numbers of rows differ."""
    try:
        rows = sum(len(batch) for batch in item_rows(items, 0, None))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise wrapped(
            error,
            f"source.arrays.items {items}: not readable ({_line(error)}); give one Parquet file with item_id, or a "
            ".txt with one id a line",
        ) from error
    for modality, path in embeddings.items():
        array = open_array(path, f"source.arrays.embeddings.{modality}")
        if len(array) != rows:
            raise InputError(
                f"source.arrays.embeddings.{modality} {path}: {len(array)} rows, but {items} has {rows} items; row i "
                "of the array must belong to row i of the items"
            )
    return rows


def open_array(path: str, key: str) -> NDArray[np.floating]:
    """Map an array (rows, width) of floats into memory, without pickles. Raises InputError naming ``key`` and the
    file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise wrapped(
            error, f"{key} {path}: not a readable .npy array ({_line(error)}); write it with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        kind = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise InputError(f"{key} {path}: holds {kind}; must be one float array (items, width), written with numpy.save")
    return array


def rows(items: str, embeddings: Mapping[str, str], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Yield items ``start`` to ``stop`` as batches of ``tables.items(embeddings)``; only these rows of the arrays are
    read."""
    arrays = {
        modality: open_array(path, f"source.arrays.embeddings.{modality}") for modality, path in embeddings.items()
    }
    for batch in item_rows(items, start, stop):
        columns = [vectors(array[start : start + len(batch)]) for array in arrays.values()]
        yield pa.RecordBatch.from_arrays([*batch.columns, *columns], schema=tables.items(arrays))
        start += len(batch)


def item_rows(path: str, start: int, stop: int | None) -> Iterator[pa.RecordBatch]:
    """Yield rows ``start`` to ``stop`` (None: all) of the list of items: ``item_id``, ``title`` (null if there is
    none)."""
    batches = _lines(path) if Path(path).suffix == ".txt" else _parquet(path)
    for batch in (whole.slice(at, BATCH) for whole in batches for at in range(0, len(whole), BATCH)):
        if stop is not None and stop <= 0:
            return
        part = batch.slice(max(start, 0), None if stop is None else max(stop - max(start, 0), 0))
        if len(part):
            yield part
        start, stop = start - len(batch), None if stop is None else stop - len(batch)


def _lines(path: str) -> Iterator[pa.RecordBatch]:
    for batch in pa.csv.open_csv(
        path, read_options=pa.csv.ReadOptions(column_names=["item_id"]), parse_options=_LINES, convert_options=_AS_TEXT
    ):
        yield pa.RecordBatch.from_arrays(
            [batch["item_id"], pa.nulls(len(batch), pa.string())], names=["item_id", "title"]
        )


def _parquet(path: str) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if "item_id" not in names:
            raise InputError(
                f"source.arrays.items {path}: column 'item_id' is missing (found: {', '.join(names)}); add it"
            )
        for batch in file.iter_batches(BATCH, columns=[name for name in ("item_id", "title") if name in names]):
            yield convert(batch, tables.items(()), f"source.arrays.items {path}")


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
