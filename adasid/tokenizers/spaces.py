"""This module defines the base of tokenizers that fit quantizers to the input vectors directly: to the joint vector, or
to each modality."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.sid import Codes, slots_of
from adasid.tables import PAD
from adasid.tokenizers.base import Tokenizer, sample
from adasid.tokenizers.inputs import Inputs
from adasid.tokenizers.settings import SHARED, SpacesSettings


class Quantized(NamedTuple):
    """``Quantized`` is the result of quantization: ``codes`` [n, L]; ``decoded`` [n, d]: the vectors that the codes
    stand for; ``rest`` [n, d]: what is left of the vectors for slots that follow."""

    codes: Tensor
    decoded: Tensor
    rest: Tensor


class Spaces(Tokenizer):
    """``Spaces`` fits one quantizer for each kind of slot, without an encoder. ``widths``: width of each modality of
    ``settings.inputs``. A subclass adds ``quantizers``, one for each kind in ``levels``, from vectors [n, d] of float64
    to :class:`Quantized`.

    Slots: L over the joint vector, named by ``letter``, where an absent modality counts as its mean and every item has
    all codes; or, with ``levels`` by modality, t0, t1, v0, ... that are PAD where the item lacks the modality; or both:
    shared slots s0, s1, ... first, and by modality slots of what the shared ones leave of its vector. Weights are 1
    where there is a code."""

    settings: SpacesSettings
    quantizers: nn.ModuleDict
    factors: dict[str, float]
    """Factor of each modality in the joint vector that shared slots read."""

    def __init__(self, settings: SpacesSettings, widths: Mapping[str, int], letter: str) -> None:
        by_modality = isinstance(settings.levels, dict)
        levels = settings.levels if isinstance(settings.levels, dict) else {SHARED: settings.levels}
        prefixes = None if by_modality else {SHARED: letter}
        super().__init__(settings, widths, slots_of(levels, settings.codebook_size, prefixes))
        self.levels, self.by_modality = levels, by_modality
        self.inputs, self.factors = Inputs(self.widths), dict.fromkeys(self.widths, 1.0)

    @abstractmethod
    def fit_space(self, kind: str, x: Tensor, generator: torch.Generator, weights: Tensor | None) -> None:
        """Fit the quantizer of ``kind`` to a sample ``x`` [n, d] of float32, n >= 1, weighted by ``weights`` [n]."""

    @abstractmethod
    def refine_space(self, kind: str, x: Tensor, rounds: int, weights: Tensor | None) -> None:
        """Continue the fit of the quantizer of ``kind`` for ``rounds`` rounds."""

    def dimensions(self, kind: str) -> int:
        """Return the width of the quantized vectors."""
        return sum(self.widths.values()) if kind == SHARED else self.widths[kind]

    def joint(self, inputs: dict[str, Tensor]) -> Tensor:
        """Concatenate the scaled inputs of all modalities times ``factors``, [B, D]."""
        return torch.cat([x if self.factors[m] == 1 else x * self.factors[m] for m, x in inputs.items()], dim=1)

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Compute means and scales of the inputs."""
        self.inputs.fit(shard, workers)

    def fit(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Fit to a fixed sample of all workers' items."""
        self._each(shard, workers, lambda kind, x, weights: self.fit_space(kind, x, generator, weights))

    def refine(self, shard: Shard, workers: Workers, rounds: int, generator: torch.Generator) -> None:
        """Continue the fit on the same sample."""
        self._each(shard, workers, lambda kind, x, weights: self.refine_space(kind, x, rounds, weights))

    def _space(self, kind: str, batch: Batch, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the vectors that the slots of ``kind`` quantize, [B, d] in float64 so that codes do not depend on the
        batch, and which items have them, [B] bool. ``rest``: what shared slots before them leave of the joint
        vector."""
        if kind == SHARED:
            return self.joint(self.inputs(batch)).double(), torch.ones_like(batch.index, dtype=torch.bool)
        x = self.inputs(batch)[kind].double() if rest is None else self.inputs.split(rest)[kind] / self.factors[kind]
        return x, batch.present[kind]

    @torch.no_grad()
    def _each(self, shard: Shard, workers: Workers, fit: Callable[[str, Tensor, Tensor | None], None]) -> None:
        """Fit the quantizer of each kind, to what shared slots before it leave."""
        s = self.settings
        device = self.inputs.get_buffer(f"mean_{s.inputs[0]}").device
        for kind, quantizer in self.quantizers.items():
            rows, counts = list[Tensor](), list[Tensor]()
            for batch in (part.to(device) for part in sample(shard, workers, s.fit_samples, kind)):
                x, there = self._space(kind, batch, self._rest(kind, batch))
                rows.append(x[there].float())
                if s.count_power and batch.counts is not None:
                    counts.append(((batch.counts[there] + 1).double() ** s.count_power).float())
            x = workers.gather_ragged(torch.cat(rows))
            fit(kind, x, workers.gather_ragged(torch.cat(counts)) if counts else None)
            for buffer in quantizer.buffers():
                workers.broadcast(buffer)

    def _rest(self, kind: str, batch: Batch) -> Tensor | None:
        """Return what shared slots leave of the joint vector, [B, D], None if no shared slot is before ``kind``."""
        if kind == SHARED or SHARED not in self.levels:
            return None
        rest: Tensor = self.quantizers[SHARED](self._space(SHARED, batch, None)[0]).rest
        return rest

    def _quantized(self, batch: Batch) -> dict[str, tuple[Quantized, Tensor, Tensor]]:
        """Return by kind of slot the quantized vectors, the vectors, and which items have them."""
        result, first, rest = dict[str, tuple[Quantized, Tensor, Tensor]](), 0, None
        for kind, length in self.levels.items():
            x, there = self._space(kind, batch, rest)
            previous = batch.previous.of(slice(first, first + length)) if batch.previous else None
            quantized = self.quantizers[kind](x, previous)
            result[kind] = quantized, x, there
            first, rest = first + length, quantized.rest if kind == SHARED else rest
        return result

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """Encode with each quantizer."""
        parts = [part.codes.masked_fill(~there[:, None], PAD) for part, _, there in self._quantized(batch).values()]
        codes = torch.cat(parts, dim=1).int()
        return Codes(codes, (codes != PAD).float(), codes != PAD)

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decode to the scale of the inputs; an item without a code gets the mean."""
        spaces, decoded = self._quantized(batch), dict[str, Tensor]()
        if SHARED in spaces:
            joint, _, _ = spaces[SHARED]
            decoded = {m: part / self.factors[m] for m, part in self.inputs.split(joint.decoded).items()}
        for m in set(spaces) - {SHARED}:
            quantized, x, there = spaces[m]
            shared = self.inputs(batch)[m].double() - x  # what the shared slots say of the modality
            decoded[m] = (shared + quantized.decoded) * there[:, None]
        return {m: self.inputs.restore(m, decoded[m].float()) for m in self.widths}
