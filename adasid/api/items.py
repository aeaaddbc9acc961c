"""Read the items that a user passes (arrays by modality, an Arrow table or a data frame), converted chunk by chunk."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from adasid.data.shards import Batch
from adasid.errors import InputError

CHUNK = 8192
"""Rows converted at a time."""
_EXTRA = ("item_id", "item_index", "interactions", "richness")
"""Columns of a table that are read if present, named as in ``item_features``."""


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_WRITTEN = re.compile(r"\s*\[[-+\d\s.,eE]+\]\s*")
"""A vector that was written as text."""


class ArrowTable(Protocol):
    """An ``ArrowTable`` is any object that exports Arrow: a pyarrow Table or RecordBatch, a pandas or Polars frame."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """Export the rows by the Arrow PyCapsule interface."""


Data = Mapping[str, Any] | ArrowTable
"""Modality -> matrix [n, D] (NumPy, torch, column of lists), or a table whose list columns are the modalities."""


@dataclass(frozen=True)
class Items:
    """An ``Items`` contains ``n`` items. ``columns``: modality -> matrix or Arrow column of n rows; ``extra``: other
    columns, [n] each."""

    columns: Mapping[str, Any]
    extra: Mapping[str, NDArray[Any]]
    n: int

    @staticmethod
    def of(data: Data, caller: str) -> Items:
        """Wrap ``data`` without converting it. Raises InputError, naming ``caller``, for an unknown form."""
        extra: dict[str, NDArray[Any]] = {}
        if isinstance(data, Mapping):
            columns = {str(name): _column(value, f"{caller}: {name}") for name, value in data.items()}
        elif hasattr(data, "__arrow_c_stream__"):
            table = _table(data, caller)
            columns = {}
            for name in table.column_names:
                column = _lists(table[name], f"{caller}: {name}")
                if column is not None:
                    columns[name] = column
            extra = {name: _plain(table[name], f"{caller}: {name}") for name in _EXTRA if name in table.column_names}
        else:
            fix = "pass a dict of modality -> array [n, D], an Arrow table or a pandas frame"
            raise InputError(f"{caller}: the data are of type {type(data).__name__}; {fix}")
        if not columns:
            raise InputError(f"{caller}: the data have no modality; pass at least one array [n, D] or list column")
        sizes = {name: len(value) for name, value in columns.items()}
        if len(set(sizes.values())) > 1:
            text = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise InputError(f"{caller}: the modalities differ in rows ({text}); row i of each must be the same item")
        return Items(columns, extra, next(iter(sizes.values())))

    def check(self, modalities: Iterable[str], who: str) -> None:
        """Raise InputError, naming ``who`` reads them, unless the data have every modality."""
        for m in modalities:
            if m not in self.columns:
                given = ", ".join(self.columns)
                fix = "add it, as rows of NaN where an item lacks it"
                raise InputError(f"{who} reads {m!r}, which the data do not have (they have: {given}); {fix}")

    def widths(self, modalities: Iterable[str], caller: str) -> dict[str, int]:
        """Return the width of each modality. Raises InputError if no item has it."""
        widths = {}
        for m in modalities:
            width = _width(self.columns[m])
            parts = range(0, self.n if width else 0, CHUNK)
            if not any(self.batch(start, start + CHUNK, {m: width}).present[m].any() for start in parts):
                raise InputError(f"{caller}: no item has the modality {m!r}; bring its vectors, or leave it out")
            widths[m] = width
        return widths

    def batch(self, start: int, stop: int, widths: Mapping[str, int]) -> Batch:
        """Return rows ``start`` to ``stop`` with richness 0. Raises InputError for a wrong width or a value that is not
        finite."""
        stop = min(stop, self.n)
        vectors, present = {}, {}
        for m, width in widths.items():
            values = torch.zeros(stop - start, width)  # torch's alignment: equal sums for any batch
            given = _fill(values.numpy(), self.columns[m], m, start)
            vectors[m], present[m] = values, torch.from_numpy(given)
        index = torch.from_numpy(np.array(self.index[start:stop], np.int64))
        return Batch(vectors, present, torch.zeros(stop - start), index)

    @property
    def index(self) -> NDArray[np.int64]:
        """Return the column ``item_index`` [n], or the row numbers."""
        return self.extra["item_index"] if "item_index" in self.extra else np.arange(self.n)


def vector(values: Any, n: int, name: str, caller: str) -> NDArray[Any]:
    """Return a vector [n] of finite, non-negative numbers, from NumPy, torch, Arrow or pandas."""
    array = np.asarray(_numpy(values) if isinstance(values, torch.Tensor) else values)
    if array.shape != (n,) or array.dtype.kind not in "iufb":
        form = f"{array.dtype} of shape {array.shape}"
        raise InputError(f"{caller}: {name} is {form}; pass one number for each of the {n} items")
    bad = np.flatnonzero(~np.isfinite(array) | (array < 0))
    if len(bad):
        raise InputError(f"{caller}: {name} of row {bad[0]} is {array[bad[0]]}; it must be finite and not negative")
    return array


def whole_numbers(values: Any, n: int, name: str, caller: str) -> NDArray[np.int64]:
    """Return a :func:`vector` of whole numbers."""
    array = vector(values, n, name, caller)
    bad = np.flatnonzero(array != np.floor(array))
    if len(bad):
        raise InputError(f"{caller}: {name} of row {bad[0]} is {array[bad[0]]}; it must be a whole number")
    return array.astype(np.int64)


def _column(value: Any, name: str) -> Any:
    """Return a torch or NumPy matrix [n, D], or an Arrow column of lists."""
    if isinstance(value, torch.Tensor | pa.ChunkedArray):
        matrix = value
    elif isinstance(value, pa.Array):
        matrix = pa.chunked_array([value])
    else:
        matrix = _array(value, name)
    if isinstance(matrix, pa.ChunkedArray):
        if not _is_list(matrix.type):
            raise InputError(f"{name} is a column of {matrix.type}; pass a column of lists of numbers")
        return matrix
    if matrix.ndim != 2 or not matrix.shape[1] or (isinstance(matrix, np.ndarray) and matrix.dtype.kind not in "fiub"):
        form = f"{matrix.dtype} of shape {tuple(matrix.shape)}"
        fix = "of one item, pass x.reshape(1, -1)" if matrix.ndim == 1 else "pass numbers, [n, D]"
        raise InputError(f"{name} is {form}, not a matrix of one row for each item; {fix}")
    return matrix


def _array(value: Any, name: str) -> Any:
    """Return a NumPy matrix, or an Arrow column if rows differ in length or some are None."""
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(np.float32), np.nan)
    try:
        matrix = np.asarray(value)
        if matrix.dtype != object:
            return matrix
    except ValueError:  # NumPy refuses rows of different lengths
        pass
    try:
        return pa.chunked_array([pa.array(list(value), pa.list_(pa.float32()), from_pandas=True)])
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{name} is not a matrix of numbers ({line}); pass an array [n, D]") from None


def _table(data: Any, caller: str) -> pa.Table:
    """Return the columns of ``data`` that are read, as Arrow. Columns of Python objects other than lists in a pandas
    frame are dropped."""
    pandas = sys.modules.get("pandas")
    try:
        if pandas is None or not isinstance(data, pandas.DataFrame):
            return pa.table(data)
        names = [name for name in data.columns if str(name) in _EXTRA or _holds_lists(data[name])]
        return pa.Table.from_pandas(data[names], preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{caller}: the data are not a table ({line}); every modality is a column of lists") from None


def _holds_lists(series: Any) -> bool:
    """Return whether the first non-missing value of a pandas series is a sequence of numbers, or one that was written
    as text."""
    first = next(iter(series.dropna().head(1)), None)
    return isinstance(first, list | tuple | np.ndarray | torch.Tensor) or bool(
        isinstance(first, str) and _WRITTEN.fullmatch(first)
    )


def _plain(column: pa.ChunkedArray, name: str) -> NDArray[Any]:
    """Convert a column of ids or numbers to NumPy. Raises InputError for a null, which NumPy has not."""
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise InputError(f"{name} of row {row} is null; give it a value, or leave the column out")
    array: NDArray[Any] = column.to_numpy()
    return array.astype(str) if array.dtype == object else array


def _lists(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray | None:
    """Return a column of vectors as lists of numbers, None for a column of anything else. Raises InputError for vectors
    in a form that is not read."""
    types, kind = pa.types, column.type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
        column = pa.chunked_array([part.storage for part in column.chunks], kind)
    if _is_list(kind):
        return column
    nested = [*_LISTS, types.is_list_view, types.is_large_list_view]
    if any(is_list(kind) for is_list in nested):
        inner = kind.value_type
        if types.is_floating(inner) or types.is_integer(inner) or types.is_decimal(inner):
            return column.cast(pa.large_list(pa.float64()))
        if not (types.is_string(inner) or types.is_large_string(inner) or types.is_boolean(inner)):
            raise InputError(f"{name} is a column of {column.type}; pass a column of lists of numbers")
    elif types.is_string(kind) or types.is_large_string(kind):
        first = column.drop_null().slice(0, 1)
        if len(first) and _WRITTEN.fullmatch(first[0].as_py()):
            fix = "parse them, for example with json.loads"
            raise InputError(f"{name} has vectors that are written as text ({first[0].as_py()[:20]}...); {fix}")
    return None


def _is_list(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is a list of numbers, of fixed length or not."""
    types = pa.types
    nested = any(is_list(kind) for is_list in _LISTS)
    inner = kind.value_type if nested else kind
    return bool(nested and (types.is_floating(inner) or types.is_integer(inner) or types.is_null(inner)))


def _width(column: Any) -> int:
    """Return the width of the vectors, for an Arrow column that of the first non-empty one, or 0 if there is none."""
    if not isinstance(column, pa.ChunkedArray):
        return int(column.shape[1])
    lengths = pc.list_value_length(column).drop_null()
    first = lengths.filter(pc.greater(lengths, 0)).slice(0, 1)
    return int(first[0].as_py()) if len(first) else 0


def _numpy(values: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = values.detach().to("cpu", torch.float32 if values.is_floating_point() else None).numpy()
    return array


def _fill(target: NDArray[np.float32], column: Any, modality: str, start: int) -> NDArray[np.bool_]:
    """Write the vectors of the rows from ``start`` into ``target`` [b, D], which holds zeros; return whether each item
    has the modality, [b]. A row of NaN or zeros, an empty list or null means that it does not."""
    rows, width = target.shape
    part = column[start : start + rows]
    if isinstance(part, pa.ChunkedArray):
        lengths = pc.fill_null(pc.list_value_length(part), 0).to_numpy()
        given = lengths > 0
        other = np.flatnonzero(given & (lengths != width))
        if len(other):
            _wrong_width(modality, start + other[0], int(lengths[other[0]]), width)
        flat = pc.list_flatten(part).cast(pa.float32(), safe=False).to_numpy()
        target[given] = flat.reshape(-1, width)
    else:
        values = _numpy(part) if isinstance(part, torch.Tensor) else part
        if values.shape[1] != width:
            _wrong_width(modality, start, values.shape[1], width)
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(target, values, casting="unsafe")
    finite = np.isfinite(target)
    if not finite.all():
        absent = np.isnan(target).all(axis=1)
        target[absent] = 0.0
        bad = np.flatnonzero(~(finite.all(axis=1) | absent))
        if len(bad):
            fix = "correct it, or make the whole row NaN where the item lacks the modality"
            raise InputError(f"{modality} of row {start + bad[0]} has a value that is not finite; {fix}")
    return np.asarray(target.any(axis=1), bool)


def _wrong_width(modality: str, row: int, width: int, expected: int) -> None:
    fix = "bring vectors of the embedding that the tokenizer was fitted on, or fit it again"
    raise InputError(f"{modality} of row {row} has width {width}, not {expected}; {fix}")
