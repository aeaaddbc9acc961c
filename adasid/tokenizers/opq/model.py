"""OPQ is optimised product quantization (Ge et al., CVPR 2013, as RPG uses it; methods 6.2) of the joint content, or of
each modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adasid.errors import InputError
from adasid.quantizers.product import (
    Components,
    ProductQuantizer,
    fit_opq,
    fit_opq_faiss,
    principal_components,
    refine_opq,
)
from adasid.sid import PreviousCodes
from adasid.tokenizers.opq import OpqSettings
from adasid.tokenizers.spaces import Quantized, Spaces


class SubSpaces(nn.Module):
    """``SubSpaces`` has the principal components, rotation and centroids of ``levels`` sub-spaces of vectors [n,
    ``dimensions``].

    Raises InputError if there are fewer dimensions than slots.
    """

    def __init__(self, settings: OpqSettings, kind: str, levels: int, dimensions: int) -> None:
        super().__init__()
        self.settings, self.levels = settings, levels
        width = min(settings.width, dimensions) // levels * levels
        if not width:
            what = f"{'the content' if kind == 'shared' else repr(kind)} has {dimensions} dimensions in all"
            raise InputError(f"tokenizer.levels is {levels}, but {what}: lower it, or add a modality")
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("basis", torch.zeros(dimensions, width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("rotation", torch.eye(width))
        self.register_buffer("centroids", torch.zeros(levels, settings.codebook_size, width // levels))

    def fit(self, x: Tensor, generator: torch.Generator, weights: Tensor | None = None) -> None:
        """Fit components, and to them rotation and centroids weighted by ``weights`` [n], to a sample ``x`` [n, D] of
        float32."""
        s = self.settings
        components = principal_components(x, self.get_buffer("basis").shape[1], s.whiten)
        y = components.project(x)
        if s.engine == "faiss":
            quantizer = fit_opq_faiss(y, self.levels, s.codebook_size, s.rounds)
        else:
            quantizer, _ = fit_opq(y, self.levels, s.codebook_size, s.rounds, s.momentum, generator, weights)
        for name, value in (components._asdict() | quantizer._asdict()).items():
            self.get_buffer(name).copy_(value)

    def forward(self, x: Tensor, previous: PreviousCodes | None = None) -> Quantized:
        """Quantize ``x`` [n, D] in float64, so that codes do not depend on the batch; ``previous``: codes [n, L]."""
        components = Components(*(self.get_buffer(name).double() for name in Components._fields))
        quantizer = ProductQuantizer(*(self.get_buffer(name).double() for name in ProductQuantizer._fields))
        codes = quantizer.codes(components.project(x), previous)
        decoded = components.restore(quantizer.decode(codes))
        return Quantized(codes, decoded, x - decoded)


class Opq(Spaces):
    """OPQ names its slots o0 to o{L-1}, or by modality."""

    settings: OpqSettings

    def __init__(self, settings: OpqSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths, "o")
        self.quantizers = nn.ModuleDict(
            {kind: SubSpaces(settings, kind, number, self.dimensions(kind)) for kind, number in self.levels.items()},
        )

    def refine_space(self, kind: str, x: Tensor, rounds: int, weights: Tensor | None) -> None:
        """Update centroids and rotation for ``rounds`` rounds; the components stay fixed."""
        space = self.quantizers[kind]
        components = Components(*(space.get_buffer(name) for name in Components._fields))
        start = ProductQuantizer(*(space.get_buffer(name) for name in ProductQuantizer._fields))
        rotation, _ = refine_opq(components.project(x), start, rounds, self.settings.momentum, weights)
        for name, value in rotation._asdict().items():
            space.get_buffer(name).copy_(value)

    def fit_space(self, kind: str, x: Tensor, generator: torch.Generator, weights: Tensor | None) -> None:
        """Fit components, rotation and centroids."""
        self.quantizers[kind].fit(x, generator, weights)  # type: ignore[operator]
