"""Read one worker's part of the catalogue once and shuffle it by index, in memory, or memory-mapped if it is large."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid.data.exchange import fetch
from adasid.data.reading import Read
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.sid import PreviousCodes
from adasid.tables import PAD

_IN_MEMORY = 4 << 30
_ALONE = Workers()


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


@dataclass(frozen=True)
class Pairs:
    """``Pairs`` contains the co-engaged pairs of a worker's items. ``items`` and ``partners`` [pairs]: item indices;
    partners may be items of other workers."""

    items: NDArray[np.integer]
    partners: NDArray[np.integer]


class Shard:
    """A shard has one worker's items of the catalogue, and the indices of their co-engaged partners.

    ``widths``: modality -> width; ``item_index`` [rows], ascending."""

    def __init__(
        self,
        read: Read,
        modalities: Iterable[str],
        in_memory: int = _IN_MEMORY,
        pairs: Pairs | None = None,
        everyone: Read | None = None,
        scratch: str | None = None,
        workers: Workers = _ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        """Read the worker's items. ``read(columns)`` streams this worker's rows of ``item_features`` as Arrow batches,
        in any order, and is called several times; ``everyone``: the rows of all workers, of which only the first ones
        are read, to infer the widths. Vectors of more than ``in_memory`` bytes are memory-mapped in the folder
        ``scratch`` (None: the system's temporary folder). ``workers`` exchange partners through tensors on ``device``.

        Raises InputError for an empty catalogue, a modality that no item has, two widths of one modality, or a folder
        without enough space.
        """
        modalities = tuple(modalities)
        parts = [rows.column("item_index").to_numpy() for rows in read(["item_index"]) if rows.num_rows]
        if not parts:
            raise InputError(
                "item_features has no rows for this worker: use fewer workers, or run build_features on a larger "
                "catalogue"
            )
        self.item_index = np.sort(np.concatenate(parts))
        parts.clear()
        self._workers, self._device = workers, device
        self._present = {m: np.zeros(len(self), bool) for m in modalities}
        self._richness, self._counts = (np.zeros(len(self), kind) for kind in (np.float32, np.int64))
        self._previous: tuple[NDArray[np.int32], float] | None = None
        self.widths = find_widths(everyone or read, modalities)
        self._vectors = _allocated(len(self), self.widths, in_memory, scratch)
        self._load(read, modalities)
        if pairs:
            self._link(pairs)

    def __len__(self) -> int:
        return len(self.item_index)

    def hold(self, read: Iterable[pa.RecordBatch], length: int, slack: float) -> None:
        """Add the previous codes of items to all later batches: ``read`` streams (item_index, codes) of any items,
        ``length`` codes each."""
        codes = np.full((len(self), length), PAD, np.int32)
        for rows in read:
            place, mine = self._places(rows.column("item_index").to_numpy())
            codes[place[mine]] = rows.column("codes").flatten().to_numpy().reshape(-1, length)[mine]
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
            torch.from_numpy(self.item_index[rows]),
            previous=previous,
            counts=torch.from_numpy(self._counts[rows]),
        )

    def take_pairs(self, rows: NDArray[np.int64], random: np.random.Generator) -> Batch:
        """Return the batch of the given positions, followed by one uniformly drawn partner of each; an item without
        partners is its own partner. All workers call this together: each sends the partners that it has."""
        first, last = self._offsets[rows], self._offsets[rows + 1]
        paired = last > first
        drawn, partner = first + (random.random(len(rows)) * (last - first)).astype(np.int64), self.item_index[rows]
        partner[paired] = self._partner[drawn[paired]]
        if self._workers.world == 1:
            both = self.take(np.concatenate([rows, np.searchsorted(self.item_index, partner)]))
        else:
            both = _joined(self.take(rows), self._fetched(partner))
        return replace(both, paired=torch.from_numpy(paired))

    def _fetched(self, index: NDArray[np.int64]) -> Batch:
        """Return the batch of items of any workers."""

        def columns(rows: NDArray[np.int64]) -> list[Tensor]:
            batch = self.take(rows)
            assert batch.counts is not None
            codes = [batch.previous.codes] if batch.previous else []
            return [*batch.vectors.values(), *batch.present.values(), batch.richness, batch.counts, *codes]

        found, names = fetch(index, self.item_index, columns, self._workers, self._device), list(self.widths)
        vectors, present = found[: len(names)], found[len(names) : 2 * len(names)]
        richness, counts, *codes = found[2 * len(names) :]
        previous = PreviousCodes(codes[0], self._previous[1]) if codes and self._previous else None
        return Batch(
            dict(zip(names, vectors)),
            dict(zip(names, present)),
            richness,
            torch.from_numpy(index),
            previous=previous,
            counts=counts,
        )

    def scan(self, size: int = 4096) -> Iterator[Batch]:
        """Yield all of the worker's rows in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def _load(self, read: Read, modalities: tuple[str, ...]) -> None:
        for rows in read(["item_index", "richness", "interactions", *modalities]):
            index = np.searchsorted(self.item_index, rows.column("item_index").to_numpy())
            batch = batch_of(rows, self.widths)
            for m in modalities:
                self._vectors[m][index] = batch.vectors[m].numpy()
                self._present[m][index] = batch.present[m].numpy()
            self._richness[index] = batch.richness.numpy()
            self._counts[index] = rows.column("interactions").to_numpy()

    def _places(self, index: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the positions of items [n], and which of them are the worker's own [n]."""
        place = np.minimum(np.searchsorted(self.item_index, index), len(self) - 1)
        return place, self.item_index[place] == index

    def _link(self, pairs: Pairs) -> None:
        """Store the partners of each of the worker's rows, in compressed rows; pairs of items without features are
        dropped."""
        known = self._known()
        place, mine = self._places(pairs.items)
        mine &= pairs.partners < len(known)
        mine[mine] = known[pairs.partners[mine]]
        place, partners = place[mine], pairs.partners[mine]
        self._offsets = np.searchsorted(np.sort(place), np.arange(len(self) + 1))
        self._partner = partners[np.argsort(place, kind="stable")]

    def _known(self) -> NDArray[np.bool_]:
        """Return whether any worker has the features of an item, by item_index."""
        most = self._workers.gather(torch.tensor([int(self.item_index[-1])], device=self._device))
        known = torch.zeros(int(most.max()) + 1, dtype=torch.uint8, device=self._device)
        known[torch.from_numpy(self.item_index).to(self._device)] = 1
        found: NDArray[np.bool_] = (self._workers.sum(known) > 0).cpu().numpy()
        return found


def _joined(one: Batch, other: Batch) -> Batch:
    """Return the rows of two batches, one after the other."""
    vectors, present = (
        {name: torch.cat([value, theirs[name]]) for name, value in ours.items()}
        for ours, theirs in ((one.vectors, other.vectors), (one.present, other.present))
    )
    assert one.counts is not None and other.counts is not None
    previous = None
    if one.previous and other.previous:
        previous = PreviousCodes(torch.cat([one.previous.codes, other.previous.codes]), one.previous.slack)
    return Batch(
        vectors,
        present,
        torch.cat([one.richness, other.richness]),
        torch.cat([one.index, other.index]),
        previous=previous,
        counts=torch.cat([one.counts, other.counts]),
    )


def _allocated(
    rows: int, widths: dict[str, int], in_memory: int, scratch: str | None
) -> dict[str, NDArray[np.float32]]:
    """Return an array [rows, width] for each modality, together in memory or in unnamed files in ``scratch``, which
    disappear when the process ends. Raises InputError if the folder has not enough space."""
    need = rows * sum(widths.values()) * 4
    if need <= in_memory:
        return {m: np.zeros((rows, width), np.float32) for m, width in widths.items()}
    folder = scratch or tempfile.gettempdir()
    try:
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return {m: _mapped(folder, rows, width) for m, width in widths.items()}
    except OSError as error:
        space = f" ({shutil.disk_usage(folder).free / 1e9:.3g} GB are free)" if error.errno == errno.ENOSPC else ""
        raise InputError(
            f"{folder}: the vectors of this worker's {rows} items need {need / 1e9:.3g} GB there, but: "
            f"{error.strerror}{space}; name another folder in ray.scratch, or use more workers on other machines"
        ) from error


def _mapped(folder: str, rows: int, width: int) -> NDArray[np.float32]:
    """Return a memory-mapped array whose space on the disk is reserved."""
    with tempfile.TemporaryFile(prefix="adasid-shard-", dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, rows * width * 4)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        return np.memmap(file, np.float32, "r+", shape=(rows, width))


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
