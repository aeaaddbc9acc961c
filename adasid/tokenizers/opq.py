"""Optimised product quantization of the content (Ge et al., CVPR 2013, as RPG uses it; methods 6.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adasid import config
from adasid.errors import InputError
from adasid.quantizers.product import Components, ProductQuantizer, fit_opq, fit_opq_faiss, principal_components
from adasid.tokenizers.base import Codes, Slot, Tokenizer, sample
from adasid.tokenizers.inputs import Inputs
from adasid.training.shards import Batch, Shard
from adasid.training.workers import Workers


class Opq(Tokenizer):
    """Slots o0 to o{L-1}: sub-spaces of the rotated principal components. Every item has all codes; an absent modality counts as its mean.

    ``widths``: width of each modality of ``settings.content``. Raises InputError where they have fewer dimensions than there are slots.
    """

    def __init__(self, settings: config.Opq, widths: Mapping[str, int]) -> None:
        super().__init__()
        s = self.settings = settings
        self.widths = {m: int(widths[m]) for m in s.inputs}
        self.slots = tuple(Slot(f"o{i}", "shared", s.codebook_size) for i in range(s.levels))
        self.inputs = Inputs(self.widths)
        joint = sum(self.widths.values())
        width = min(s.width, joint // s.levels * s.levels)
        if not width:
            raise InputError(f"tokenizer.levels is {s.levels}, but the content has {joint} dimensions in all: lower it, or add a modality")
        self.register_buffer("mean", torch.zeros(joint))
        self.register_buffer("basis", torch.zeros(joint, width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("rotation", torch.eye(width))
        self.register_buffer("centroids", torch.zeros(s.levels, s.codebook_size, width // s.levels))

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Means and scales of the inputs."""
        self.inputs.fit(shard, workers)

    @torch.no_grad()
    def fit(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Components, rotation and centroids from a fixed sample of all workers' items."""
        s = self.settings
        rows = [self._joint(batch.to(self.get_buffer("mean").device)) for batch in sample(shard, workers, s.fit_samples)]
        x = workers.gather_ragged(torch.cat(rows))
        components = principal_components(x, self.get_buffer("basis").shape[1], s.whiten)
        y = components.project(x)
        if s.engine == "faiss":
            quantizer = fit_opq_faiss(y, s.levels, s.codebook_size, s.rounds)
        else:
            quantizer, _ = fit_opq(y, s.levels, s.codebook_size, s.rounds, generator)
        for name, value in (components._asdict() | quantizer._asdict()).items():
            workers.broadcast(self.get_buffer(name).copy_(value))

    def _joint(self, batch: Batch) -> Tensor:
        return torch.cat(list(self.inputs(batch).values()), dim=1)

    def _fitted(self) -> tuple[Components, ProductQuantizer]:
        """In float64, so that codes do not depend on the batch."""
        mean, basis, deviation, rotation, centroids = (self.get_buffer(name).double() for name in (*Components._fields, *ProductQuantizer._fields))
        return Components(mean, basis, deviation), ProductQuantizer(rotation, centroids)

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """The nearest codeword of each sub-space; all weights are 1."""
        components, quantizer = self._fitted()
        codes = quantizer.codes(components.project(self._joint(batch).double())).int()
        return Codes(codes, torch.ones_like(codes, dtype=torch.float32), torch.ones_like(codes, dtype=torch.bool))

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Codewords without rotation, whitening and projection, in the inputs' own scale."""
        components, quantizer = self._fitted()
        codes = quantizer.codes(components.project(self._joint(batch).double()))
        joint = components.restore(quantizer.decode(codes)).float()
        return {m: self.inputs.restore(m, x) for m, x in self.inputs.split(joint).items()}
