"""The contract of every tokenizer. The loop, the artifact, the Spark encoder, the metrics and the report know only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adasid.tables import PAD
from adasid.training.shards import Batch, Shard
from adasid.training.workers import Workers


class Slot(NamedTuple):
    """One position of a SID. ``kind``: shared, behavior, or the content modality's name; ``size``: codes in its codebook."""

    name: str
    kind: str
    size: int


class Codes(NamedTuple):
    """``codes`` [B, L] int32 (PAD where the item lacks the slot's modality), ``weights`` [B, L] float32, ``active`` [B, L] bool."""

    codes: Tensor
    weights: Tensor
    active: Tensor


class Losses(NamedTuple):
    """``total``: scalar to minimise; ``parts``: its terms and other figures for the log, detached."""

    total: Tensor
    parts: dict[str, float]


class Tokenizer(nn.Module, ABC):
    """A trained tokenizer. Everything that ``encode`` needs is in ``state_dict``; ``encode`` of an item depends on that item only."""

    slots: tuple[Slot, ...]
    widths: dict[str, int]
    """The declared inputs: modality -> width. Nothing else is read."""

    @abstractmethod
    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Set the constants that depend on the data (scales, calibration), equal on all workers. Called once, before training."""

    @abstractmethod
    def start_quantizing(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Initialise the codebooks from the encoder's outputs, equal on all workers. Called after the warm-up."""

    @abstractmethod
    def losses(self, batch: Batch, workers: Workers) -> Losses:
        """The losses of this worker's part of a batch."""

    @abstractmethod
    def after_step(self, step: int, progress: float, workers: Workers, generator: torch.Generator) -> dict[nn.Parameter, Tensor]:
        """Maintenance after an optimiser step (``progress`` in [0, 1]), the same on all workers. Returns, by parameter, masks of
        entries that were replaced: the loop clears the optimiser's state there."""

    @abstractmethod
    def encode(self, batch: Batch) -> Codes:
        """SIDs of a batch."""

    @abstractmethod
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decoded vectors by modality, in the scale of the inputs; [B, D] each."""

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What a reader of the artifact wants to know besides the config (for example the calibrated controller), as JSON data."""

    def no_decay(self) -> set[nn.Parameter]:
        """Parameters that weight decay must leave alone: biases and, where a tokenizer adds them, codebooks."""
        return {p for name, p in self.named_parameters() if name.endswith("bias")}


def token(slot: Slot, code: int) -> str:
    """The text token of a code in a slot: ``<t0_17>``, or ``<v0_pad>``."""
    return f"<{slot.name}_{'pad' if code == PAD else code}>"
