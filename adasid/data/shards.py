"""Read one worker's part of the catalogue once and shuffle it by index, in memory, or memory-mapped if it is large."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid.errors import InputError
from adasid.sid import PreviousCodes
from adasid.tables import PAD

_IN_MEMORY = 4 << 30


@dataclass(frozen=True)
class Batch:
    """A batch has rows for a tokenizer. ``vectors``: modality -> [B, D] float32, zero where absent; ``present``:
    modality -> [B] bool; ``richness`` [B] in [0, 1]; ``index`` [B] int64: the item's index in the catalogue. In a batch
    of pairs, rows i and i + B/2 are co-engaged items where ``paired`` [B/2] is true, and the same item where it is
    false. ``previous``: previous codes [B, L] int64 of the items (PAD: none), and the tolerance ``slack`` within which
    they are preserved (``adasid.quantizers.kmeans.previous_or_nearest``). ``counts`` [B]: training interactions; None
    where they are not known, as in encoding."""

    vectors: dict[str, Tensor]
    present: dict[str, Tensor]
    richness: Tensor
    index: Tensor
    paired: Tensor | None = None
    previous: PreviousCodes | None = None
    counts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.richness)

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device."""
        vectors, present = (
            {name: value.to(device) for name, value in part.items()} for part in (self.vectors, self.present)
        )
        paired, counts = (None if part is None else part.to(device) for part in (self.paired, self.counts))
        previous = None if self.previous is None else PreviousCodes(self.previous.codes.to(device), self.previous.slack)
        return Batch(vectors, present, self.richness.to(device), self.index.to(device), paired, previous, counts)


def batch_of(rows: pa.RecordBatch, widths: dict[str, int]) -> Batch:
    """Convert Arrow rows of ``item_features`` to a batch. Raises InputError if a vector's width differs from
    ``widths``."""
    vectors, present = {}, {}
    for modality, width in widths.items():
        if modality not in rows.schema.names:
            raise InputError(
                f"item_features has no column {modality!r} (it has {', '.join(rows.schema.names)}); name another "
                "modality or add the embedding"
            )
        values, mask = _matrix(rows.column(modality), modality, width)
        vectors[modality], present[modality] = torch.from_numpy(values), torch.from_numpy(mask)
    richness = rows.column("richness").to_numpy(zero_copy_only=False).astype(np.float32)
    return Batch(
        vectors,
        present,
        torch.from_numpy(richness),
        torch.from_numpy(rows.column("item_index").to_numpy().astype(np.int64)),
    )


def _matrix(column: pa.ListArray, modality: str, width: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    mask = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = column.drop_null().value_lengths().to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != width).any():
        other = int(lengths[lengths != width][0])
        raise InputError(
            f"item_features.{modality} holds a vector of width {other}, expected {width}: retrain the tokenizer on "
            "these features, or mend the embedding"
        )
    values = torch.zeros(len(column), width).numpy()  # torch's alignment: equal sums for any batch
    values[mask] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return values, mask


Read = Callable[[list[str]], Iterable[pa.RecordBatch]]


@dataclass(frozen=True)
class Pairs:
    """``Pairs`` contains the co-engaged pairs of a worker's items. ``items`` and ``partners`` [pairs]: item indices;
    ``read(columns)`` streams the rows of ``item_features`` of those partners that are not the worker's own."""

    items: NDArray[np.int64]
    partners: NDArray[np.int64]
    read: Read


class Shard:
    """A shard has one worker's items of the catalogue, and their co-engaged partners.

    ``widths``: modality -> width; ``item_index`` [rows], ascending. ``len`` and :meth:`scan` cover only the worker's
    own items."""

    def __init__(
        self,
        read: Read,
        modalities: Iterable[str],
        in_memory: int = _IN_MEMORY,
        pairs: Pairs | None = None,
        everyone: Read | None = None,
    ) -> None:
        """Read the worker's items. ``read(columns)`` streams this worker's rows of ``item_features`` as Arrow batches,
        in any order, and is called several times; ``everyone``: the rows of all workers, of which only the first ones
        are read, to infer the widths.

        Raises InputError for an empty catalogue, a modality that no item has, or two widths of one modality.
        """
        modalities = tuple(modalities)
        parts = [rows.column("item_index").to_numpy() for rows in read(["item_index"]) if rows.num_rows]
        if not parts:
            raise InputError(
                "item_features has no rows for this worker: use fewer workers, or run build_features on a larger "
                "catalogue"
            )
        self.item_index = np.sort(np.concatenate(parts))
        partners = np.setdiff1d(pairs.partners, self.item_index) if pairs else np.zeros(0, np.int64)
        self._rows = np.concatenate([self.item_index, partners])
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._present = {m: np.zeros(len(self._rows), bool) for m in modalities}
        self._richness, self._counts = (np.zeros(len(self._rows), kind) for kind in (np.float32, np.int64))
        self._loaded = np.zeros(len(self._rows), bool)
        self._previous: tuple[NDArray[np.int32], float] | None = None
        self.widths = find_widths(everyone or read, modalities)
        self._allocate(in_memory)
        self._load(read, modalities, self.item_index, 0)
        if pairs:
            self._load(pairs.read, modalities, partners, len(self))
            self._link(pairs)

    def __len__(self) -> int:
        return len(self.item_index)

    def hold(self, read: Iterable[pa.RecordBatch], length: int, slack: float) -> None:
        """Add the previous codes of items to all later batches: ``read`` streams (item_index, codes) of any items,
        ``length`` codes each."""
        codes, sorter = np.full((len(self._rows), length), PAD, np.int32), np.argsort(self._rows, kind="stable")
        for rows in read:
            index, read_codes = (
                rows.column("item_index").to_numpy(),
                rows.column("codes").flatten().to_numpy().reshape(-1, length),
            )
            mine = np.isin(index, self._rows)
            codes[sorter[np.searchsorted(self._rows, index[mine], sorter=sorter)]] = read_codes[mine]
        self._previous = codes, slack

    def having(self, modality: str) -> NDArray[np.int64]:
        """Return the positions of the worker's items that have ``modality``."""
        return np.flatnonzero(self._present[modality][: len(self)])

    def previous(self, size: int) -> Tensor | None:
        """Count the worker's items that have each previous code, [L, size] int64; None without previous codes."""
        if self._previous is None:
            return None
        codes = torch.from_numpy(self._previous[0][: len(self)].T.astype(np.int64))
        return torch.zeros(len(codes), size, dtype=torch.int64).scatter_add_(
            1, codes.clamp(min=0), (codes != PAD).long()
        )

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """Return the batch of the given positions in this shard."""
        where = torch.from_numpy(rows)
        vectors = {m: torch.from_numpy(values).index_select(0, where) for m, values in self._vectors.items()}
        present = {m: torch.from_numpy(values[rows]) for m, values in self._present.items()}
        previous = (
            PreviousCodes(torch.from_numpy(self._previous[0][rows]).long(), self._previous[1])
            if self._previous
            else None
        )
        return Batch(
            vectors,
            present,
            torch.from_numpy(self._richness[rows]),
            torch.from_numpy(self._rows[rows]),
            previous=previous,
            counts=torch.from_numpy(self._counts[rows]),
        )

    def take_pairs(self, rows: NDArray[np.int64], random: np.random.Generator) -> Batch:
        """Return the batch of the given positions, followed by one uniformly drawn partner of each; an item without
        partners is its own partner."""
        first, last = self._offsets[rows], self._offsets[rows + 1]
        paired = last > first
        drawn = first + (random.random(len(rows)) * (last - first)).astype(np.int64)
        partner = np.where(
            paired,
            self._partner[np.minimum(drawn, max(0, len(self._partner) - 1))] if len(self._partner) else rows,
            rows,
        )
        return replace(self.take(np.concatenate([rows, partner])), paired=torch.from_numpy(paired))

    def scan(self, size: int = 4096) -> Iterator[Batch]:
        """Yield all of the worker's rows in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def _load(self, read: Read, modalities: tuple[str, ...], order: NDArray[np.int64], start: int) -> None:
        for rows in read(["item_index", "richness", "interactions", *modalities]):
            index = start + np.searchsorted(order, rows.column("item_index").to_numpy())
            batch = batch_of(rows, self.widths)
            for m in modalities:
                self._vectors[m][index] = batch.vectors[m].numpy()
                self._present[m][index] = batch.present[m].numpy()
            self._richness[index] = batch.richness.numpy()
            self._counts[index] = rows.column("interactions").to_numpy()
            self._loaded[index] = True

    def _link(self, pairs: Pairs) -> None:
        """Store the partners of each of the worker's rows as positions, in compressed rows; pairs of items without
        features are dropped."""
        known = np.isin(pairs.items, self.item_index) & np.isin(pairs.partners, self._rows[self._loaded])
        items, partners = pairs.items[known], pairs.partners[known]
        order = np.argsort(items, kind="stable")
        items, partners = items[order], partners[order]
        self._offsets = np.concatenate([np.searchsorted(items, self.item_index), [len(items)]])
        sorter = np.argsort(self._rows, kind="stable")
        self._partner = sorter[np.searchsorted(self._rows, partners, sorter=sorter)]

    def _allocate(self, in_memory: int) -> None:
        large = len(self._rows) * sum(self.widths.values()) * 4 > in_memory
        for m, width in self.widths.items():
            if large:
                with tempfile.TemporaryFile(
                    prefix="adasid-shard-"
                ) as file:  # an unnamed file, which disappears when the process ends
                    self._vectors[m] = np.memmap(file, np.float32, "w+", shape=(len(self._rows), width))
            else:
                self._vectors[m] = np.zeros((len(self._rows), width), np.float32)


def find_widths(read: Read, modalities: Iterable[str]) -> dict[str, int]:
    """Return the width of each modality, from the first item that has it. Raises InputError if no item does."""
    widths: dict[str, int] = {}
    for modality in modalities:
        for rows in read([modality]):
            lengths = rows.column(0).drop_null().value_lengths()
            if len(lengths):
                widths[modality] = int(lengths[0].as_py())
                break
        else:
            raise InputError(
                f"item_features.{modality}: no item has this modality; leave it out of the tokenizer, or bring the "
                "embeddings"
            )
    return widths
