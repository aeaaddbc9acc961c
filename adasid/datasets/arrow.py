"""This module defines the Arrow helpers of the data sources. They run in Spark's Python workers, so they take and
return plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adasid.tables import VECTOR


def vectors(values: NDArray[np.floating], present: NDArray[np.bool_] | None = None) -> pa.ListArray:
    """Convert ``values`` (n, width) to n lists of float32; a row that is not ``present`` (n,) becomes null."""
    present = np.ones(len(values), bool) if present is None else present
    offsets = np.concatenate([[0], np.cumsum(present * values.shape[1])]).astype(np.int32)
    flat = np.ascontiguousarray(values[present], np.float32).reshape(-1)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=VECTOR, mask=pa.array(~present))


def over_ranges(
    make: Callable[[int, int], Iterator[pa.RecordBatch]], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Yield ``make(start, stop)`` for every row of ``batches``, whose columns are ``start`` and ``stop``."""
    for batch in batches:
        for start, stop in zip(batch["start"].to_pylist(), batch["stop"].to_pylist()):
            yield from make(start, stop)
