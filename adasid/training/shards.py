"""One worker's part of the catalogue, read once and shuffled by index: in memory, or memory-mapped where it is large."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid.errors import InputError

_IN_MEMORY = 4 << 30


@dataclass(frozen=True)
class Batch:
    """Rows for a tokenizer. ``vectors``: modality -> [B, D] float32, zero where absent; ``present``: modality -> [B] bool; ``richness`` [B] in [0, 1]."""

    vectors: dict[str, Tensor]
    present: dict[str, Tensor]
    richness: Tensor

    def __len__(self) -> int:
        return len(self.richness)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        move = (
            {name: value.to(device) for name, value in self.vectors.items()},
            {name: value.to(device) for name, value in self.present.items()},
        )
        return Batch(*move, self.richness.to(device))


def batch_of(rows: pa.RecordBatch, widths: dict[str, int]) -> Batch:
    """Arrow rows of ``item_features`` as a batch. Raises InputError where a vector's width differs from ``widths``."""
    vectors, present = {}, {}
    for modality, width in widths.items():
        if modality not in rows.schema.names:
            raise InputError(
                f"item_features has no column {modality!r} (it has {', '.join(rows.schema.names)}); name another modality or add the embedding"
            )
        values, there = _matrix(rows.column(modality), modality, width)
        vectors[modality], present[modality] = torch.from_numpy(values), torch.from_numpy(there)
    return Batch(vectors, present, torch.from_numpy(rows.column("richness").to_numpy(zero_copy_only=False).astype(np.float32)))


def _matrix(column: pa.ListArray, modality: str, width: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    there = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = column.drop_null().value_lengths().to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != width).any():
        other = int(lengths[lengths != width][0])
        raise InputError(
            f"item_features.{modality} holds a vector of width {other}, expected {width}: retrain the tokenizer on these features, or mend the embedding"
        )
    values = torch.zeros(len(column), width).numpy()  # torch's alignment: the same sums whatever the batch
    values[there] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return values, there


class Shard:
    """One worker's items of the catalogue. ``widths``: modality -> width; ``item_index`` [rows], ascending."""

    def __init__(self, read: Callable[[list[str]], Iterable[pa.RecordBatch]], modalities: Iterable[str], in_memory: int = _IN_MEMORY) -> None:
        """``read(columns)`` streams this worker's rows of ``item_features`` as Arrow batches, in any order; it is called twice.

        Raises InputError for an empty catalogue, a modality that no item has, or two widths of one modality.
        """
        modalities = tuple(modalities)
        parts = [rows.column("item_index").to_numpy() for rows in read(["item_index"]) if rows.num_rows]
        if not parts:
            raise InputError("item_features has no rows for this worker: use fewer workers, or run build_features on a larger catalogue")
        self.item_index = np.sort(np.concatenate(parts))
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._present = {m: np.zeros(len(self), bool) for m in modalities}
        self._richness = np.zeros(len(self), np.float32)
        self.widths = self._find_widths(read, modalities)
        self._allocate(in_memory)
        for rows in read(["item_index", "richness", *modalities]):
            place = np.searchsorted(self.item_index, rows.column("item_index").to_numpy())
            batch = batch_of(rows, self.widths)
            for m in modalities:
                self._vectors[m][place] = batch.vectors[m].numpy()
                self._present[m][place] = batch.present[m].numpy()
            self._richness[place] = batch.richness.numpy()

    def __len__(self) -> int:
        return len(self.item_index)

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """The batch of the given positions in this shard."""
        where = torch.from_numpy(rows)
        vectors = {m: torch.from_numpy(values).index_select(0, where) for m, values in self._vectors.items()}
        return Batch(vectors, {m: torch.from_numpy(values[rows]) for m, values in self._present.items()}, torch.from_numpy(self._richness[rows]))

    def scan(self, size: int = 4096) -> Iterator[Batch]:
        """All rows in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def _allocate(self, in_memory: int) -> None:
        large = len(self) * sum(self.widths.values()) * 4 > in_memory
        for m, width in self.widths.items():
            if large:
                with tempfile.TemporaryFile(prefix="adasid-shard-") as file:  # has no name: gone when this process is, however it ends
                    self._vectors[m] = np.memmap(file, np.float32, "w+", shape=(len(self), width))
            else:
                self._vectors[m] = np.zeros((len(self), width), np.float32)

    @staticmethod
    def _find_widths(read: Callable[[list[str]], Iterable[pa.RecordBatch]], modalities: tuple[str, ...]) -> dict[str, int]:
        widths: dict[str, int] = {}
        for modality in modalities:
            for rows in read([modality]):
                lengths = rows.column(0).drop_null().value_lengths()
                if len(lengths):
                    widths[modality] = int(lengths[0].as_py())
                    break
            else:
                raise InputError(f"item_features.{modality}: no item has this modality; leave it out of the tokenizer, or bring the embeddings")
        return widths
