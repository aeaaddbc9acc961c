"""Hash texts by columns, so that tables are joined by integers instead of texts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


def hashed_text(column: pa.StringArray, salt: int = 0) -> NDArray[np.uint64]:
    """Return the hash of each text [n] without nulls: FNV-1a with 64 bits of its bytes in UTF-8, after those of
    ``salt``, one byte, unless it is 0."""
    wide = isinstance(column, pa.LargeStringArray)
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[column.offset : column.offset + len(column) + 1]
    text = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
    starts, lengths = ends[:-1].astype(np.int64), np.diff(ends)
    hashes = np.full(len(column), _OFFSET)
    if salt:
        hashes = (hashes ^ np.uint64(salt)) * _PRIME
    order = np.argsort(-lengths, kind="stable")
    hashes, starts, lengths = hashes[order], starts[order], lengths[order]
    for byte in range(int(lengths.max(initial=0))):
        longer = len(lengths) - int(np.searchsorted(lengths[::-1], byte, side="right"))
        hashes[:longer] = (hashes[:longer] ^ text[starts[:longer] + byte]) * _PRIME
    found = np.empty_like(hashes)
    found[order] = hashes
    return found
