"""Read the semantic IDs of the whole catalogue as a downstream model wants them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from adasid import tables
from adasid.config import Ranking, Retrieval
from adasid.data.text import hashed_text
from adasid.errors import InputError
from adasid.recommenders import ngrams
from adasid.recommenders.tokens import ItemTokens
from pipelines.engines import cluster
from pipelines.engines.lake import Lake
from pipelines.training import parts
from pipelines.training.payload import Catalogue, Payload

_SIZE = 1 << 16
"""Rows of a batch, which are narrow."""


def read_catalogue(
    lake: Lake, payload: Payload, settings: Retrieval | Ranking
) -> tuple[ItemTokens, NDArray[np.int64], NDArray[np.int8]]:
    """Return tokens, training counts and strata of all items, in the order of item_index, as the model's
    ``settings`` want them. Raises InputError where the SIDs are of other items."""
    version, chosen = payload.read["item_stats"], payload.catalogue
    items = lake.open("item_stats", version).to_pyarrow_dataset().count_rows()
    counts, strata, names = np.zeros(items, np.int64), np.zeros(items, np.int8), pa.array(tables.STRATA)
    for rows in parts.rows(lake, "item_stats", version, ["item_index", "interactions", "stratum"], size=_SIZE):
        index = rows.column("item_index").to_numpy()
        counts[index] = rows.column("interactions").to_numpy()
        strata[index] = pc.index_in(rows.column("stratum"), names).to_numpy(zero_copy_only=False)
    if not chosen:
        return ItemTokens.ids(items), counts, strata
    codes, weights = _codes(lake, version, items, chosen, settings)
    tokens = ItemTokens.of(codes, chosen.slots, weights)
    del codes, weights
    cluster.release_unused()
    combinations = ngrams.choose(settings.ngrams, chosen.slots, chosen.parallel)
    trained = torch.from_numpy(counts > 0)
    tokens = tokens.with_ngrams(combinations, settings.ngram_rows, trained, settings.ngram_min_items)
    cluster.release_unused()
    return tokens, counts, strata


def _codes(
    lake: Lake, version: int, items: int, chosen: Catalogue, settings: Retrieval | Ranking
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    """Return the codes [items, L] and, where the model reads them, the weights [items, L] of the SIDs, in the order of
    item_index. Rows are joined by hashes of item_id, so that no worker holds the ids of a catalogue."""
    keys, order, salt = _keys(lake, version, items)
    codes, weights, seen, total = None, None, np.zeros(items, bool), 0
    columns = ["item_id", "codes", *["weights"] * settings.weights, *["active"] * (settings.inactive == "pad")]
    for rows in parts.rows(lake, chosen.table, chosen.version, columns, size=_SIZE):
        key = hashed_text(rows.column("item_id"), salt)
        place = np.minimum(np.searchsorted(keys, key), items - 1)
        known = keys[place] == key
        index, total = order[place[known]], total + rows.num_rows
        seen[index] = True
        values = [_matrix(rows.column(name))[known] for name in columns[1:]]
        if codes is None:
            codes = np.full((items, values[0].shape[1]), tables.PAD, np.int32)
            weights = np.zeros(codes.shape, np.float32) if settings.weights else None
        codes[index] = np.where(values[-1], values[0], tables.PAD) if columns[-1] == "active" else values[0]
        if weights is not None:
            weights[index] = values[1]
    if codes is None or total != items or not seen.all():
        raise InputError(
            f"{chosen.table} version {chosen.version} has {total} items, of which {int(seen.sum())} are among the "
            f"{items} of item_stats: write the SIDs of these items (jobs/write_sids.py)"
        )
    return codes, weights


def _keys(lake: Lake, version: int, items: int) -> tuple[NDArray[np.uint64], NDArray[np.int64], int]:
    """Return the hashes of all item ids, ascending, the item_index of each, and the salt with which they differ."""
    keys = np.zeros(items, np.uint64)
    for salt in range(8):
        for rows in parts.rows(lake, "item_stats", version, ["item_index", "item_id"], size=_SIZE):
            keys[rows.column("item_index").to_numpy()] = hashed_text(rows.column("item_id"), salt)
        order = np.argsort(keys)
        ordered = keys[order]
        if not (ordered[1:] == ordered[:-1]).any():
            return ordered, order, salt
    raise InputError(f"item_stats version {version} has an item_id twice: run jobs/build_features.py again")


def _matrix(column: pa.ListArray) -> NDArray[np.generic]:
    """Return lists of one length as rows [n, L]."""
    values: NDArray[np.generic] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1)
