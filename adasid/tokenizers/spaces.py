"""This module defines the base of tokenizers that fit quantizers to the input vectors directly: to the joint content,
or to each modality."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.sid import Codes, slots_of
from adasid.tables import PAD
from adasid.tokenizers.base import Tokenizer, sample
from adasid.tokenizers.inputs import Inputs
from adasid.tokenizers.settings import SpacesSettings


class Spaces(Tokenizer):
    """``Spaces`` fits one quantizer for each kind of slot, without an encoder. ``widths``: width of each modality of
    ``settings.inputs``. A subclass adds ``quantizers``, one for each kind in ``levels``, from vectors [n, d] of float64
    to codes [n, L] and decoded vectors [n, d].

    Slots: L over the joint content, named by ``letter``, where an absent modality counts as its mean and every item has
    all codes; or, with ``levels`` by modality, t0, t1, v0, ... that are PAD where the item lacks the modality. Weights
    are 1 where there is a code."""

    settings: SpacesSettings
    quantizers: nn.ModuleDict

    def __init__(self, settings: SpacesSettings, widths: Mapping[str, int], letter: str) -> None:
        by_modality = isinstance(settings.levels, dict)
        levels = settings.levels if isinstance(settings.levels, dict) else {"shared": settings.levels}
        prefixes = None if by_modality else {"shared": letter}
        super().__init__(settings, widths, slots_of(levels, settings.codebook_size, prefixes))
        self.levels, self.by_modality = levels, by_modality
        self.inputs = Inputs(self.widths)

    @abstractmethod
    def fit_space(self, kind: str, x: Tensor, generator: torch.Generator) -> None:
        """Fit the quantizer of ``kind`` to a sample ``x`` [n, d] of float32, n >= 1."""

    def dimensions(self, kind: str) -> int:
        """Return the width of the quantized vectors."""
        return self.widths[kind] if self.by_modality else sum(self.widths.values())

    def _joint(self, batch: Batch) -> Tensor:
        """Concatenate all modalities, [B, D]."""
        return torch.cat(list(self.inputs(batch).values()), dim=1)

    def _spaces(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the vectors to quantize by kind of slot, [B, d] in float64 so that codes do not depend on the batch,
        and which items have them, [B] bool."""
        if self.by_modality:
            return {m: (x.double(), batch.present[m]) for m, x in self.inputs(batch).items()}
        return {"shared": (self._joint(batch).double(), torch.ones_like(batch.index, dtype=torch.bool))}

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Compute means and scales of the inputs."""
        self.inputs.fit(shard, workers)

    @abstractmethod
    def refine_space(self, kind: str, x: Tensor, rounds: int) -> None:
        """Continue the fit of the quantizer of ``kind`` for ``rounds`` rounds."""

    def fit(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Fit to a fixed sample of all workers' items. Raises InputError if no item of it has a modality."""
        self._each(shard, workers, lambda kind, x: self.fit_space(kind, x, generator))

    def refine(self, shard: Shard, workers: Workers, rounds: int, generator: torch.Generator) -> None:
        """Continue the fit on the same sample."""
        self._each(shard, workers, lambda kind, x: self.refine_space(kind, x, rounds))

    @torch.no_grad()
    def _each(self, shard: Shard, workers: Workers, fit: Callable[[str, Tensor], None]) -> None:
        s, rows = self.settings, {kind: list[Tensor]() for kind in self.quantizers}
        for batch in sample(shard, workers, s.fit_samples):
            for kind, (x, there) in self._spaces(
                batch.to(self.inputs.get_buffer(f"mean_{s.inputs[0]}").device)
            ).items():
                rows[kind].append(x[there].float())
        for kind, quantizer in self.quantizers.items():
            x = workers.gather_ragged(torch.cat(rows.pop(kind)))
            if not len(x):
                raise InputError(
                    f"tokenizer.fit_samples {s.fit_samples}: none of these items has {kind!r}; raise it, or leave the "
                    "modality out"
                )
            fit(kind, x)
            for buffer in quantizer.buffers():
                workers.broadcast(buffer)

    def _quantized(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return codes, decoded vectors and which items have them, by kind of slot."""
        result, first = {}, 0
        for kind, (x, there) in self._spaces(batch).items():
            length = sum(slot.kind == kind for slot in self.slots)
            previous = batch.previous.of(slice(first, first + length)) if batch.previous else None
            result[kind] = (*self.quantizers[kind](x, previous), there)
            first += length
        return result

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """Encode with each quantizer."""
        codes = torch.cat(
            [codes.masked_fill(~there[:, None], PAD) for codes, _, there in self._quantized(batch).values()], dim=1
        ).int()
        return Codes(codes, (codes != PAD).float(), codes != PAD)

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decode to the scale of the inputs; an item without a code gets the mean."""
        decoded = {kind: (words * there[:, None]).float() for kind, (_, words, there) in self._quantized(batch).items()}
        parts = decoded if self.by_modality else self.inputs.split(decoded["shared"])
        return {m: self.inputs.restore(m, x) for m, x in parts.items()}
