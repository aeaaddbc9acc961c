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

from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.sid import Codes, Slot
from adasid.tokenizers.settings import SHARED, TokenizerSettings


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

    def unfreeze(self) -> None:
        """Let all parameters be trained that the settings train, as :meth:`artifact.read` does not."""
        self.requires_grad_(True)

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

    def learning_rates(self) -> Mapping[nn.Parameter, float]:
        """Return the factor of the learning rate of the parameters for which it is not 1."""
        return {}

    def no_decay(self) -> set[nn.Parameter]:
        """Return the parameters without weight decay: biases and, in subclasses, codebooks."""
        return {p for name, p in self.named_parameters() if name.endswith("bias")}


def sampled(shard: Shard, workers: Workers, items: int, kind: str = SHARED) -> NDArray[np.int64]:
    """Return the positions of this worker's part of a fixed, evenly spaced sample of ``items`` items of all workers:
    of those that have the modality ``kind``, or of all items (``shared``). A worker without such an item returns
    another one."""
    share, having = -(-items // workers.world), np.arange(len(shard)) if kind == SHARED else shard.having(kind)
    if not len(having):
        return np.zeros(1, np.int64)
    return having[np.linspace(0, len(having) - 1, min(share, len(having))).round().astype(np.int64)]


def sample(shard: Shard, workers: Workers, items: int, kind: str = SHARED) -> Iterator[Batch]:
    """Yield the items of :func:`sampled` in batches of some thousands."""
    rows = sampled(shard, workers, items, kind)
    for start in range(0, len(rows), 4096):
        yield shard.take(rows[start : start + 4096])
