"""Optimised product quantization (Ge et al., CVPR 2013, as RPG uses it; methods 6.2) of the content, or of each modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adasid import config
from adasid.errors import InputError
from adasid.quantizers.product import Components, ProductQuantizer, fit_opq, fit_opq_faiss, principal_components
from adasid.tables import PAD
from adasid.tokenizers.base import Codes, Slot, Tokenizer, letters, sample
from adasid.tokenizers.inputs import Inputs
from adasid.training.shards import Batch, Shard
from adasid.training.workers import Workers


class SubSpaces(nn.Module):
    """Principal components, rotation and centroids of ``levels`` sub-spaces of vectors [n, ``dimensions``].

    Raises InputError where there are fewer dimensions than slots.
    """

    def __init__(self, settings: config.Opq, kind: str, levels: int, dimensions: int) -> None:
        super().__init__()
        self.settings, self.levels = settings, levels
        width = min(settings.width, dimensions) // levels * levels
        if not width:
            what = "the content" if kind == "shared" else repr(kind)
            raise InputError(f"tokenizer.levels is {levels}, but {what} has {dimensions} dimensions in all: lower it, or add a modality")
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("basis", torch.zeros(dimensions, width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("rotation", torch.eye(width))
        self.register_buffer("centroids", torch.zeros(levels, settings.codebook_size, width // levels))

    def fit(self, x: Tensor, generator: torch.Generator) -> None:
        """From a sample ``x`` [n, D] of float32."""
        s = self.settings
        components = principal_components(x, self.get_buffer("basis").shape[1], s.whiten)
        y = components.project(x)
        if s.engine == "faiss":
            quantizer = fit_opq_faiss(y, self.levels, s.codebook_size, s.rounds)
        else:
            quantizer, _ = fit_opq(y, self.levels, s.codebook_size, s.rounds, generator)
        for name, value in (components._asdict() | quantizer._asdict()).items():
            self.get_buffer(name).copy_(value)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [n, L] and the decoded vectors [n, D] of ``x`` [n, D] of float64, in which codes do not depend on the batch."""
        components = Components(*(self.get_buffer(name).double() for name in Components._fields))
        quantizer = ProductQuantizer(*(self.get_buffer(name).double() for name in ProductQuantizer._fields))
        codes = quantizer.codes(components.project(x))
        return codes, components.restore(quantizer.decode(codes))


class Opq(Tokenizer):
    """``widths``: width of each modality of ``settings.inputs``.

    Slots: o0 to o{L-1} over the joint content, where an absent modality counts as its mean and every item has all codes; or, with
    ``levels`` by modality, t0, t1, b0, ... that are PAD where the item lacks the modality. Weights are 1 where there is a code.
    """

    def __init__(self, settings: config.Opq, widths: Mapping[str, int]) -> None:
        super().__init__()
        s = self.settings = settings
        self.widths = {m: int(widths[m]) for m in s.inputs}
        self.inputs = Inputs(self.widths)
        if isinstance(s.levels, dict):
            levels, spaces, names = s.levels, self.widths, letters(tuple(s.levels))
        else:
            levels, spaces, names = {"shared": s.levels}, {"shared": sum(self.widths.values())}, {"shared": "o"}
        self.slots = tuple(Slot(f"{names[kind]}{i}", kind, s.codebook_size) for kind, number in levels.items() for i in range(number))
        self.quantizers = nn.ModuleDict({kind: SubSpaces(s, kind, number, spaces[kind]) for kind, number in levels.items()})

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Means and scales of the inputs."""
        self.inputs.fit(shard, workers)

    def _spaces(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """What is quantized, by kind of slot: vectors [B, d] and which items have them [B]."""
        scaled = self.inputs(batch)
        if isinstance(self.settings.levels, dict):
            return {m: (x, batch.present[m]) for m, x in scaled.items()}
        return {"shared": (torch.cat(list(scaled.values()), dim=1), torch.ones_like(batch.index, dtype=torch.bool))}

    @torch.no_grad()
    def fit(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """From a fixed sample of all workers' items. Raises InputError where no item of it has a modality."""
        s, rows = self.settings, {kind: list[Tensor]() for kind in self.quantizers}
        for batch in sample(shard, workers, s.fit_samples):
            for kind, (x, there) in self._spaces(batch.to(self.inputs.get_buffer(f"mean_{s.inputs[0]}").device)).items():
                rows[kind].append(x[there])
        for kind, space in self.quantizers.items():
            assert isinstance(space, SubSpaces)
            x = workers.gather_ragged(torch.cat(rows.pop(kind)))
            if not len(x):
                raise InputError(f"tokenizer.fit_samples {s.fit_samples}: none of these items has {kind!r}; raise it, or leave the modality out")
            space.fit(x, generator)
            for buffer in space.buffers():
                workers.broadcast(buffer)

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """The nearest codeword of each sub-space."""
        found = [self.quantizers[kind](x.double())[0].masked_fill(~there[:, None], PAD) for kind, (x, there) in self._spaces(batch).items()]
        codes = torch.cat(found, dim=1).int()
        return Codes(codes, (codes != PAD).float(), codes != PAD)

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Codewords without rotation, whitening and projection, in the inputs' own scale; an item without a code has the mean."""
        decoded = {kind: (self.quantizers[kind](x.double())[1] * there[:, None]).float() for kind, (x, there) in self._spaces(batch).items()}
        parts = decoded if isinstance(self.settings.levels, dict) else self.inputs.split(decoded["shared"])
        return {m: self.inputs.restore(m, x) for m, x in parts.items()}
