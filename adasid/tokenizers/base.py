"""This module is the contract of every tokenizer, the only interface that the training loop, the artifact, the Spark
encoder, the metrics and the report use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adasid.tables import PAD
from adasid.tokenizers.settings import TokenizerSettings
from adasid.training.shards import Batch, Shard
from adasid.training.workers import Workers


class Slot(NamedTuple):
    """A slot is one position of a SID. ``kind``: shared, behavior, or the content modality's name; ``size``: codes in
    its codebook."""

    name: str
    kind: str
    size: int


class Codes(NamedTuple):
    """``Codes`` contains the SIDs of a batch: ``codes`` [B, L] int32 (PAD where the item lacks the slot's modality),
    ``weights`` [B, L] float32, ``active`` [B, L] bool."""

    codes: Tensor
    weights: Tensor
    active: Tensor


class Losses(NamedTuple):
    """``Losses`` contains the losses of a batch: ``total``, a scalar to minimise, and ``parts``, its terms and other
    figures for the log, detached."""

    total: Tensor
    parts: dict[str, float]


class Tokenizer(nn.Module, ABC):
    """A tokenizer maps items to SIDs. ``state_dict`` has everything that ``encode`` needs; ``encode`` of an item
    depends only on that item (in float32, up to rounding: in a batch of a few rows, near ties may resolve differently).

    The loop calls, in this order: ``prepare``; for a tokenizer with epochs (``settings.epochs``), ``start_epoch``, then
    ``losses`` and ``after_step`` for every batch, with ``start_quantizing`` after the warm-up; ``fit`` at the end."""

    interchangeable = False
    """Whether slots of one kind may be permuted: experts and sub-spaces may, residual levels may not."""
    settings: TokenizerSettings
    """The config section that the tokenizer was built from; a subclass narrows the type."""
    slots: tuple[Slot, ...]
    widths: dict[str, int]
    """The declared inputs: modality -> width. No other modality is read."""

    def __init__(self, settings: TokenizerSettings, widths: Mapping[str, int], slots: Sequence[Slot]) -> None:
        """Initialise the tokenizer. ``widths``: modality -> width, at least of ``settings.inputs``."""
        super().__init__()
        self.settings = settings
        self.widths = {m: int(widths[m]) for m in settings.inputs}
        self.slots = tuple(slots)

    @abstractmethod
    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Set the constants that depend on the data (scales, calibration), equal on all workers. Called once."""

    @abstractmethod
    def encode(self, batch: Batch) -> Codes:
        """Encode a batch to SIDs."""

    @abstractmethod
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decode the codes of a batch to the scale of the inputs, [B, D] for each modality that the method can
        decode."""

    def fit(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Fit the parts that are not trained by gradients, equal on all workers."""

    def refine(self, shard: Shard, workers: Workers, rounds: int, generator: torch.Generator) -> None:
        """Continue :meth:`fit` from the fitted state for ``rounds`` rounds."""

    def start_epoch(self, generator: torch.Generator) -> None:
        """Do maintenance before an epoch, the same on all workers."""

    def start_quantizing(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Initialise the codebooks from the encoder's outputs, equal on all workers."""

    def keep_codes(self, previous: Tensor) -> None:
        """Exclude codes from replacement as dead codes: ``previous`` [L, K] bool."""

    def losses(self, batch: Batch, workers: Workers, progress: float) -> Losses:
        """Compute the losses of this worker's part of a batch; ``progress``: completed share of training."""
        raise NotImplementedError(f"{type(self).__name__} is not trained by gradients")

    def after_step(
        self, step: int, progress: float, workers: Workers, generator: torch.Generator
    ) -> dict[nn.Parameter, Tensor]:
        """Do maintenance after an optimiser step, the same on all workers. Returns masks of replaced entries by
        parameter; the loop clears the optimiser's state for these entries."""
        return {}

    def facts(self) -> Mapping[str, Any]:
        """Return entries for the manifest beyond the config (for example the calibrated controller), as JSON data."""
        return {}

    def no_decay(self) -> set[nn.Parameter]:
        """Return the parameters without weight decay: biases and, in subclasses, codebooks."""
        return {p for name, p in self.named_parameters() if name.endswith("bias")}


def sample(shard: Shard, workers: Workers, items: int) -> Iterator[Batch]:
    """Yield this worker's part of a fixed, evenly spaced sample of ``items`` items of all workers, in batches of some
    thousands."""
    share = -(-items // workers.world)
    rows = np.unique(np.linspace(0, len(shard) - 1, min(share, len(shard))).round().astype(np.int64))
    for start in range(0, len(rows), 4096):
        yield shard.take(rows[start : start + 4096])


def slots_of(numbers: Mapping[str, int], size: int, prefixes: Mapping[str, str] | None = None) -> list[Slot]:
    """Return ``numbers[kind]`` slots of each kind, of ``size`` codes each. A slot's name is the prefix of its kind, by
    default that of :func:`letters`, and its number within the kind."""
    prefixes = prefixes or letters(tuple(numbers))
    return [Slot(f"{prefixes[kind]}{i}", kind, size) for kind, number in numbers.items() for i in range(number)]


def letters(kinds: Sequence[str]) -> dict[str, str]:
    """Return short prefixes of slot names: for each kind the shortest unique prefix of its name."""
    return {
        m: next((m[:n] for n in range(1, len(m)) if not any(o != m and o.startswith(m[:n]) for o in kinds)), m)
        for m in kinds
    }


def token(slot: Slot, code: int) -> str:
    """Return the text token of a code in a slot: ``<t0_17>``, or ``<v0_pad>``."""
    return f"<{slot.name}_{'pad' if code == PAD else code}>"


def token_names(slots: Sequence[Slot]) -> NDArray[np.object_]:
    """Return text tokens by slot and code, [L, K + 1], K being the size of the largest codebook; the last column, index
    PAD, is PAD's."""
    names = np.full((len(slots), max(slot.size for slot in slots) + 1), "", dtype=object)
    for index, slot in enumerate(slots):
        names[index, : slot.size] = [token(slot, code) for code in range(slot.size)]
        names[index, PAD] = token(slot, PAD)
    return names
