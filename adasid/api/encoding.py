"""This module defines the fitted tokenizer of the Python API, which encodes items to semantic IDs and is saved to a
folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from adasid.api.items import Data, Items, vector, whole_numbers
from adasid.config import TokenizerSettings
from adasid.data.shards import Batch
from adasid.errors import InputError
from adasid.files import location
from adasid.metrics.richness import RichnessScale, vector_norms
from adasid.sid import Slot, token_names
from adasid.tables import BEHAVIOR
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Tokenizer

_CALLER = "SidTokenizer.encode"
_UNKNOWN = 0.5
"""Richness of an item whose richness cannot be computed."""


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """A ``SemanticIds`` contains the semantic IDs of n items in L slots.

    ``codes`` [n, L] int32: the code of each slot, -1 (PAD) where the item lacks the slot's modality.
    ``weights`` [n, L] float32: 1 for shared and content slots, the gate's value for behaviour slots, 0 for PAD.
    ``active`` [n, L] bool: whether the weight is above 0.
    ``slots``: name, kind and codebook size of each slot.
    ``item_ids`` [n]: the column ``item_id`` of the table that was encoded, else None.
    """

    codes: NDArray[np.int32]
    weights: NDArray[np.float32]
    active: NDArray[np.bool_]
    slots: tuple[Slot, ...]
    item_ids: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.codes)

    @cached_property
    def tokens(self) -> NDArray[np.object_]:
        """Return the text tokens [n, L], such as ``<t0_17>`` and ``<b2_pad>``; computed on first access."""
        tokens: NDArray[np.object_] = _names(self.slots)[np.arange(len(self.slots))[None, :], self.codes]
        return tokens


class SidTokenizer:
    """A ``SidTokenizer`` is a fitted tokenizer, returned by :func:`adasid.fit` or :func:`adasid.load`.

    ``manifest``: description of the artifact (slots, widths, metrics, seed, digest of the weights, settings).
    """

    def __init__(self, tokenizer: Tokenizer, manifest: artifact.Manifest) -> None:
        self.tokenizer, self.manifest = tokenizer, manifest
        self._scale = RichnessScale(**manifest.richness) if manifest.richness else None

    @property
    def settings(self) -> TokenizerSettings:
        """Return all settings of the tokenizer."""
        return artifact.settings_of(self.manifest.config)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Return the name, kind (shared, behavior, or the modality) and codebook size of each of the L slots."""
        return self.tokenizer.slots

    @property
    def widths(self) -> dict[str, int]:
        """Return modality -> width D, of all modalities that are read."""
        return dict(self.tokenizer.widths)

    @property
    def digest(self) -> str:
        """Return the first 16 hex digits of the SHA-256 of the weights. Equal digests mean equal weights, bit for
        bit."""
        return self.manifest.digest

    def __repr__(self) -> str:
        """Show the method, its slots and the digest of the weights."""
        names = " ".join(slot.name for slot in self.slots)
        return f"SidTokenizer({self.manifest.tokenizer!r}, slots={names!r}, digest={self.digest!r})"

    def encode(
        self,
        data: Data,
        *,
        counts: ArrayLike | None = None,
        richness: ArrayLike | None = None,
        batch_size: int = 1024,
    ) -> SemanticIds:
        """Encode items to semantic IDs. The result for an item depends on that item alone; that of the controls
        ``item-id`` and ``random`` on its ``item_index``.

        ``data``: modality -> matrix [n, D] (NumPy or torch), or an Arrow table or pandas frame whose list columns are
        the modalities. A row of NaN or of zeros, or a null, says that the item lacks the modality. Modalities that the
        tokenizer does not read are ignored. The columns ``item_id``, ``interactions`` (counts), ``item_index`` and
        ``richness`` of a table are read if present.

        ``counts`` [n]: training counts; needed where richness follows them (see :func:`adasid.fit`).
        ``richness`` [n] in [0, 1] replaces the richness computed from the data. Only gated tokenizers (ADC-SID,
        ADA-SID) read it, for the weights of behaviour slots. If it cannot be computed, a warning is issued and the mean
        of the fitted items is used (0.5 for an artifact of the pipeline; its table ``item_features`` has the column).
        ``batch_size``: items encoded at a time. A service that encodes single items is fastest with one thread,
        ``torch.set_num_threads(1)``.

        Raises InputError for a missing modality, a wrong width, or a value that is not finite.
        """
        items, widths = Items.of(data, _CALLER), self.tokenizer.widths
        items.check(widths, f"{_CALLER}: tokenizer {self.manifest.tokenizer!r}")
        if batch_size < 1:
            raise InputError(f"{_CALLER}: batch_size is {batch_size}; it must be at least 1")
        if not self.settings.inputs and "item_index" not in items.extra:
            why = f"codes of {self.manifest.tokenizer!r} follow item_index, and the data have no such column"
            warnings.warn(f"{_CALLER}: {why}: row numbers are used", UserWarning, stacklevel=2)
        given = self._given(items, counts, richness) if self._gated else None
        n, length = items.n, len(self.slots)
        codes, weights = np.empty((n, length), np.int32), np.empty((n, length), np.float32)
        active = np.empty((n, length), bool)
        for start in range(0, n, batch_size):
            part = slice(start, min(start + batch_size, n))
            batch = items.batch(part.start, part.stop, widths)
            if self._gated:
                batch = replace(batch, richness=self._richness(batch, None if given is None else given[part]))
            encoded = self.tokenizer.encode(batch)
            codes[part], weights[part], active[part] = (value.numpy() for value in encoded)
        return SemanticIds(codes, weights, active, self.slots, items.extra.get("item_id"))

    def save(self, folder: str | Path) -> None:
        """Write the artifact, ``weights.safetensors`` and ``manifest.json``, into ``folder``, which is created if
        missing. The Spark job reads it, too (``sids.artifact``). Raises InputError if it cannot be written."""
        try:
            artifact.rewrite(location(folder), self.tokenizer, self.manifest)
        except OSError as error:
            fix = "choose another folder"
            raise InputError(f"SidTokenizer.save: {folder} cannot be written ({error.strerror}); {fix}") from None

    @cached_property
    def _gated(self) -> bool:
        """Return whether the tokenizer reads richness."""
        return "router" in type(self.settings).model_fields

    def _given(self, items: Items, counts: ArrayLike | None, richness: ArrayLike | None) -> NDArray[Any] | None:
        """Return richness [n] that does not follow from the vectors, or None if each batch computes it from its
        norms."""
        if richness is None and counts is None:
            richness = items.extra.get("richness")
        if richness is not None:
            return check_richness(vector(richness, items.n, "richness", _CALLER), _CALLER)
        counts = items.extra.get("interactions") if counts is None else counts
        if self._scale is not None and self._scale.source == "norm":
            return None
        if self._scale is not None and counts is not None:
            number = whole_numbers(counts, items.n, "counts", _CALLER)
            return self._scale.richness(number, np.ones(items.n, bool))
        if self._scale is not None:
            why = "richness follows training counts (the norm of behaviour does not); pass counts="
        else:
            why = "the artifact has no scale of richness; pass richness=, such as the column of item_features"
        mean = _UNKNOWN if self._scale is None else self._scale.mean
        warnings.warn(f"{_CALLER}: {why}. Weights are those of richness {mean:.2f}", UserWarning, stacklevel=3)
        return np.full(items.n, mean, np.float32)

    def _richness(self, batch: Batch, given: NDArray[Any] | None) -> torch.Tensor:
        """Return the richness [b] of a batch: 0 without behaviour, else ``given`` [b], or computed from the norm."""
        present = batch.present[BEHAVIOR].numpy()
        if given is not None:
            return torch.from_numpy(np.where(present, given, 0.0).astype(np.float32))
        assert self._scale is not None
        return torch.from_numpy(self._scale.richness(vector_norms(batch.vectors[BEHAVIOR].numpy()), present))


@lru_cache(maxsize=8)
def _names(slots: tuple[Slot, ...]) -> NDArray[np.object_]:
    """Cache :func:`token_names` per tokenizer."""
    return token_names(slots)


def check_richness(values: NDArray[Any], caller: str) -> NDArray[np.float32]:
    """Return ``values`` as float32. Raises InputError for a value above 1."""
    above = np.flatnonzero(values > 1)
    if len(above):
        raise InputError(f"{caller}: richness of row {above[0]} is {values[above[0]]}; it must be within [0, 1]")
    return values.astype(np.float32)
