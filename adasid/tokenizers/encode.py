"""Encode Arrow rows of ``item_features`` to Arrow rows with their semantic IDs, in a Spark task or any other process.

Torch and Arrow are the heaviest imports here, so that a new worker process starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from adasid import tables
from adasid.data.shards import Batch, batch_of
from adasid.sid import PreviousCodes, token_names
from adasid.tables import PAD
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Tokenizer

ENCODED = pa.schema(
    [tables.SIDS.field(name) for name in ("item_id", "codes", "weights", "active", "tokens", "fingerprint", "gauges")]
    + [
        pa.field("interactions", pa.int64(), False),
        pa.field("stratum", pa.string(), False),
        pa.field("fault", pa.string()),
    ]
)
"""Schema of the encoded rows. ``fault``: what is wrong with a vector of the item; null if nothing."""
READ = ("item_id", "item_index", "interactions", "stratum", "fingerprint", "richness")
"""Columns that are read beside the vectors and ``sampled`` (whether the item is sampled for drift)."""


def encoder(
    manifest: str, weights: Any, size: int, slack: float = 0.0
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Return the function for ``mapInArrow``. ``manifest``: JSON text; ``weights.value``: bytes (a Spark broadcast);
    ``size``: rows encoded at a time; ``slack``: see :func:`encode_rows`."""

    def encode_partition(parts: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        tokenizer = loaded(manifest, weights.value)
        for part in parts:
            for start in range(0, part.num_rows, size):
                yield encode_rows(tokenizer, part.slice(start, size), slack)

    return encode_partition


@lru_cache(maxsize=2)
def loaded(manifest: str, weights: bytes) -> Tokenizer:
    """Return the tokenizer of a manifest (JSON text) and its weights, built once per process; Spark reuses Python
    workers between tasks."""
    torch.set_num_threads(1)
    return artifact.decode(artifact.Manifest.model_validate_json(manifest), weights)


def encode_rows(tokenizer: Tokenizer, rows: pa.RecordBatch, slack: float = 0.0) -> pa.RecordBatch:
    """Encode Arrow rows of ``item_features`` to rows of :data:`ENCODED`. The column ``published``, if present, has an
    item's previous codes (null: none), which are preserved within the tolerance ``slack``."""
    rows, fault = _narrowed(rows, tokenizer.widths)
    batch = _batch(tokenizer, rows, slack)
    for m in tokenizer.widths:
        fault[~batch.vectors[m].isfinite().all(1).numpy()] = f"{m} is not finite"
    codes, weights, active = (part.numpy() for part in tokenizer.encode(batch))
    offsets = np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32)
    tokens = token_names(tokenizer.slots)[np.arange(codes.shape[1])[None, :], codes]
    kinds = ((codes, pa.int32()), (weights, pa.float32()), (active, pa.bool_()), (tokens, pa.string()))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), kind)) for values, kind in kinds]
    plain = [rows.column(name) for name in ("interactions", "stratum")]
    columns = [
        rows.column("item_id"),
        *lists,
        rows.column("fingerprint"),
        _gauges(tokenizer, rows, slack),
        *plain,
        pa.array(fault, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=ENCODED)


def _narrowed(rows: pa.RecordBatch, widths: dict[str, int]) -> tuple[pa.RecordBatch, NDArray[np.object_]]:
    """Return ``rows`` without vectors of a wrong width, and the fault of each row."""
    fault = np.full(rows.num_rows, None, dtype=object)
    for m, width in widths.items():
        lengths = pc.list_value_length(rows.column(m)).fill_null(width).to_numpy(zero_copy_only=False)
        other = np.flatnonzero(lengths != width)
        if len(other):
            fault[other] = [f"{m} has width {length}, not {width}" for length in lengths[other]]
            places = pa.array(np.arange(rows.num_rows), mask=lengths != width)
            rows = rows.set_column(rows.schema.get_field_index(m), rows.schema.field(m), rows.column(m).take(places))
    return rows, fault


def _batch(tokenizer: Tokenizer, rows: pa.RecordBatch, slack: float) -> Batch:
    """Return the batch, with the previous codes that have the tokenizer's length."""
    batch, length = batch_of(rows, tokenizer.widths), len(tokenizer.slots)
    if "published" not in rows.schema.names:
        return batch
    column, codes = rows.column("published"), np.full((rows.num_rows, length), PAD, np.int64)
    complete = pc.equal(pc.list_value_length(column), length).fill_null(False)
    codes[complete.to_numpy(zero_copy_only=False)] = column.filter(complete).flatten().to_numpy().reshape(-1, length)
    return replace(batch, previous=PreviousCodes(torch.from_numpy(codes), slack))


def _gauges(tokenizer: Tokenizer, rows: pa.RecordBatch, slack: float) -> pa.ListArray:
    """Compute the norm and squared error of the vectors of the rows sampled for drift."""
    names, sampled = list(tokenizer.widths), rows.column("sampled").to_numpy(zero_copy_only=False).astype(bool)
    mask = np.zeros((rows.num_rows, len(names)), bool)
    norms, errors = np.zeros(mask.shape), np.full(mask.shape, np.nan)
    if sampled.any():
        batch = _batch(tokenizer, rows.filter(pa.array(sampled)), slack)
        decoded = tokenizer.reconstruct(batch)
        for i, m in enumerate(names):
            mask[sampled, i] = batch.present[m].numpy()
            norms[sampled, i] = np.round(
                batch.vectors[m].double().norm(dim=1).numpy(), 5
            )  # so that unit vectors fall into one bin
            if m in decoded:
                errors[sampled, i] = (decoded[m] - batch.vectors[m]).square().sum(1).double().numpy()
    offsets = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
    modality = pa.array(np.tile(np.array(names, object), (rows.num_rows, 1))[mask], pa.string())
    error = pa.array(errors[mask], pa.float64(), mask=np.isnan(errors[mask]))
    kind = ENCODED.field("gauges").type
    values = pa.StructArray.from_arrays([modality, pa.array(norms[mask]), error], fields=list(kind.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)
