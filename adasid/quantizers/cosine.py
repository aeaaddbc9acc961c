"""This module defines cosine codebooks, one for each expert, searched in one batched product (methods 1.2 to 1.4, 9.4,
9.5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from adasid.quantizers.codebooks import Codebooks
from adasid.quantizers.kmeans import means_of, previous_or_nearest, spherical_kmeans
from adasid.sid import PreviousCodes


class Quantized(NamedTuple):
    """``Quantized`` is the result of quantization: ``codes`` [L, B]; ``latents`` and ``codewords`` [L, B, d], of unit
    norm because only the direction is used."""

    codes: Tensor
    latents: Tensor
    codewords: Tensor


class CosineCodebooks(Codebooks):
    """``CosineCodebooks`` has ``slots`` codebooks of ``size`` codewords of ``width`` dimensions; only the direction of
    a codeword is used."""

    def __init__(self, slots: int, size: int, width: int) -> None:
        super().__init__(nnf.normalize(torch.randn(slots, size, width), dim=2))

    def codes(self, latents: Tensor, previous: PreviousCodes | None = None) -> Tensor:
        """Return argmax_j cos(latent, codeword_j): [L, B, d] -> [L, B]. The norm of a latent has no effect.
        ``previous``: codes [L, B]; the squared distance of unit vectors is 2 - 2 cos."""
        words = nnf.normalize(self.weight, dim=2).transpose(1, 2)
        if previous is None:
            return torch.bmm(latents, words).argmax(dim=2)
        return previous_or_nearest((2 - 2 * torch.bmm(nnf.normalize(latents, dim=2), words)).clamp(min=0), previous)

    def forward(self, latents: Tensor, previous: PreviousCodes | None = None) -> Quantized:
        """Quantize latents [L, B, d]."""
        unit, words = nnf.normalize(latents, dim=2), nnf.normalize(self.weight, dim=2)
        with torch.no_grad():
            codes = self.codes(unit, previous)
        chosen = words.gather(1, codes[:, :, None].expand(-1, -1, words.shape[2]))
        return Quantized(codes, unit, chosen)

    @torch.no_grad()
    def initialise(
        self, latents: Tensor, active: Tensor, rounds: int, generator: torch.Generator, previous: Tensor | None = None
    ) -> None:
        """Initialise the codebooks by k-means on the active rows of each slot; a previous code becomes the mean
        direction of its rows. ``latents`` [L, n, d], ``active`` [L, n] bool, ``previous`` [L, n]: codes (negative:
        none)."""
        for slot, (rows, keep) in enumerate(zip(latents, active)):
            if keep.any():
                words = spherical_kmeans(rows[keep], self.weight.shape[1], rounds, generator)
                if previous is not None:
                    words = nnf.normalize(
                        means_of(nnf.normalize(rows[keep], dim=1), previous[slot][keep], words), dim=1
                    )
                self.weight[slot] = words

    @torch.no_grad()
    def revive(self, vectors: Tensor, active: Tensor, min_share: float, generator: torch.Generator) -> Tensor:
        """Replace dead codes by the directions of random active vectors, see :meth:`Codebooks.revive`."""
        replaced = super().revive(vectors, active, min_share, generator)
        self.weight[replaced] = nnf.normalize(self.weight[replaced], dim=1)
        return replaced


def codebook_loss(quantized: Quantized, active: Tensor, commitment: float) -> Tensor:
    """Compute the codebook loss that the papers leave out (methods 1.4), on unit vectors: sum over slots of the mean
    over the batch of ``||sg(z) - q||^2 + commitment ||z - sg(q)||^2`` (VQ-VAE, arXiv 1711.00937, eq 3), only where
    ``active`` [L, B]."""
    mask = active.to(quantized.latents.dtype)
    codebook = ((quantized.latents.detach() - quantized.codewords) ** 2).sum(2)
    commit = ((quantized.latents - quantized.codewords.detach()) ** 2).sum(2)
    return ((codebook + commitment * commit) * mask).mean(1).sum()
