"""Arrow rows of ``item_features`` to Arrow rows with their semantic IDs: what a Spark task, or any other process, runs.

Nothing heavier than torch and Arrow is imported here, so that a fresh worker process starts quickly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from adasid import tables
from adasid.tables import PAD
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Tokenizer, token
from adasid.training.shards import batch_of
from adasid.training.workers import settle

ENCODED = pa.schema(
    [tables.SIDS.field(name) for name in ("item_id", "codes", "weights", "active", "tokens")]
    + [pa.field("interactions", pa.int64(), False), pa.field("stratum", pa.string(), False), pa.field("fingerprint", pa.string(), False)]
)


def encoder(manifest: str, weights: Any, size: int) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The body of ``mapInArrow``. ``manifest``: JSON text; ``weights.value``: bytes (a Spark broadcast); ``size``: rows encoded at a time."""

    def encode_partition(parts: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        tokenizer = loaded(manifest, weights.value)
        for part in parts:
            for start in range(0, part.num_rows, size):
                yield encode_rows(tokenizer, part.slice(start, size))

    return encode_partition


@lru_cache(maxsize=2)
def loaded(manifest: str, weights: bytes) -> Tokenizer:
    """The tokenizer of a manifest (JSON text) and its weights, built once a process; Spark reuses Python workers between tasks."""
    settle(1)
    return artifact.decode(json.loads(manifest), weights)


def encode_rows(tokenizer: Tokenizer, rows: pa.RecordBatch) -> pa.RecordBatch:
    """Encode Arrow rows of ``item_features`` to rows of :data:`ENCODED`."""
    codes, weights, active = (part.numpy() for part in tokenizer.encode(batch_of(rows, tokenizer.widths)))
    offsets = np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32)
    names = np.full((len(tokenizer.slots), max(slot.size for slot in tokenizer.slots) + 1), "", dtype=object)
    for index, slot in enumerate(tokenizer.slots):
        names[index, : slot.size] = [token(slot, code) for code in range(slot.size)]
        names[index, PAD] = token(slot, PAD)
    tokens = names[np.arange(codes.shape[1])[None, :], codes]
    kinds = ((codes, pa.int32()), (weights, pa.float32()), (active, pa.bool_()), (tokens, pa.string()))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), kind)) for values, kind in kinds]
    plain = [rows.column(name) for name in ("interactions", "stratum", "fingerprint")]
    return pa.RecordBatch.from_arrays([rows.column("item_id"), *lists, *plain], schema=ENCODED)
