"""This module defines cosine codebooks, one for each expert, searched in one batched product (methods 1.2 to 1.4, 9.4,
9.5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from adasid.quantizers.kmeans import PreviousCodes, means_of, previous_or_nearest, spherical_kmeans


class Quantized(NamedTuple):
    """``Quantized`` is the result of quantization: ``codes`` [L, B]; ``latents`` and ``codewords`` [L, B, d], of unit
    norm because only the direction is used."""

    codes: Tensor
    latents: Tensor
    codewords: Tensor


class CosineCodebooks(nn.Module):
    """``CosineCodebooks`` has ``slots`` codebooks of ``size`` codewords of ``width`` dimensions; only the direction of
    a codeword is used."""

    def __init__(self, slots: int, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nnf.normalize(torch.randn(slots, size, width), dim=2))
        self.register_buffer("used", torch.zeros(slots, size))
        self.used: Tensor
        self.kept: Tensor | None = None
        """Codes that are never replaced, [L, K] bool."""

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
                found = spherical_kmeans(rows[keep], self.weight.shape[1], rounds, generator)
                if previous is not None:
                    found = nnf.normalize(
                        means_of(nnf.normalize(rows[keep], dim=1), previous[slot][keep], found), dim=1
                    )
                self.weight[slot] = found

    @torch.no_grad()
    def counts(self, codes: Tensor, active: Tensor) -> Tensor:
        """Count how often each code is assigned in a batch of active assignments; [L, B] each -> [L, K]."""
        return torch.zeros_like(self.used).scatter_add_(1, codes, active.to(self.used.dtype))

    @torch.no_grad()
    def revive(self, latents: Tensor, active: Tensor, min_share: float, generator: torch.Generator) -> Tensor:
        """Replace codes used less than ``min_share`` of their fair share by random active latents of the batch.

        ``used`` (usage since the last revival, over all workers), ``latents`` [L, B, d] and ``active`` [L, B] are the
        same on all workers, so that all replace the same codes. Returns the mask [L, K] of replaced codes; usage is
        reset to zero."""
        dead = self.used < min_share * self.used.mean(dim=1, keepdim=True)
        if self.kept is not None:
            dead &= ~self.kept
        for slot in torch.nonzero(dead.any(dim=1)).flatten().tolist():
            rows = torch.nonzero(active[slot]).flatten()
            codes = torch.nonzero(dead[slot]).flatten()
            if not len(rows):
                dead[slot] = False
                continue
            pick = rows[torch.randint(len(rows), (len(codes),), generator=generator).to(rows.device)]
            self.weight[slot, codes] = nnf.normalize(latents[slot, pick], dim=1)
        self.used.zero_()
        return dead


def codebook_loss(quantized: Quantized, active: Tensor, commitment: float) -> Tensor:
    """Compute the codebook loss that the papers leave out (methods 1.4), on unit vectors: sum over slots of the mean
    over the batch of ``||sg(z) - q||^2 + commitment ||z - sg(q)||^2`` (VQ-VAE, arXiv 1711.00937, eq 3), only where
    ``active`` [L, B]."""
    mask = active.to(quantized.latents.dtype)
    codebook = ((quantized.latents.detach() - quantized.codewords) ** 2).sum(2)
    commit = ((quantized.latents - quantized.codewords.detach()) ** 2).sum(2)
    return ((codebook + commitment * commit) * mask).mean(1).sum()
