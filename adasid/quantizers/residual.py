"""This module defines residual codebooks: each level quantizes the residual of the levels before it (SoundStream, arXiv
2107.03312; TIGER, arXiv 2305.05065; methods 6.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from adasid.quantizers.kmeans import (
    PreviousCodes,
    kmeans,
    means_of,
    nearest_euclidean,
    previous_or_nearest,
    squared_distances,
)


class Residual(NamedTuple):
    """``Residual`` is the result of quantization: ``codes`` [B, L]; ``quantized`` [B, d]: sum of the chosen codewords;
    ``residuals`` and ``codewords`` [L, B, d]: r_{l-1} and e_l."""

    codes: Tensor
    quantized: Tensor
    residuals: Tensor
    codewords: Tensor


class ResidualCodebooks(nn.Module):
    """``ResidualCodebooks`` has ``levels`` codebooks of ``size`` codewords of ``width`` dimensions, used in order by
    Euclidean distance."""

    def __init__(self, levels: int, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(levels, size, width) / width**0.5)
        self.register_buffer("used", torch.zeros(levels, size))
        self.used: Tensor
        self.kept: Tensor | None = None
        """Codes that are never replaced, [L, K] bool."""

    def forward(
        self, z: Tensor, balanced: tuple[float, int] | None = None, previous: PreviousCodes | None = None
    ) -> Residual:
        """Quantize latents [B, d]. ``balanced``: entropy and rounds of a Sinkhorn assignment of the last level, for
        training only, and only without previous codes; ``previous``: codes [B, L]."""
        residual, codes, residuals, words = z, [], [], []
        for level, book in enumerate(self.weight):
            last = balanced is not None and level == len(self.weight) - 1
            with torch.no_grad():
                if previous:
                    code = previous_or_nearest(squared_distances(residual, book), previous.of(level))
                elif balanced and last:
                    code = sinkhorn(squared_distances(residual, book), *balanced).argmax(1)
                else:
                    code = _distance(residual, book).argmin(1)
            word = nnf.embedding(code, book)
            codes.append(code)
            residuals.append(residual)
            words.append(word)
            residual = residual - word.detach()
        return Residual(torch.stack(codes, 1), torch.stack(words).sum(0), torch.stack(residuals), torch.stack(words))

    @torch.no_grad()
    def initialise(
        self, latents: Tensor, rounds: int, generator: torch.Generator, previous: Tensor | None = None
    ) -> None:
        """Initialise each level by k-means on the residuals of the levels before; a previous code becomes the mean of
        its rows. ``latents`` [n, d], ``previous`` [n, L]: codes (negative: none)."""
        for level, book in enumerate(self.weight):
            book.copy_(kmeans(latents, len(book), rounds, generator))
            if previous is None:
                codes = nearest_euclidean(latents, book)
            else:
                book.copy_(means_of(latents, previous[:, level], book))
                codes = torch.where(previous[:, level] >= 0, previous[:, level], nearest_euclidean(latents, book))
            latents = latents - book[codes]

    @torch.no_grad()
    def count(self, codes: Tensor, there: Tensor) -> Tensor:
        """Count how often each code is assigned; ``codes`` [B, L], ``there`` [B] bool -> [L, K]."""
        return torch.zeros_like(self.used).scatter_add_(
            1, codes.T, there.to(self.used.dtype).expand(codes.shape[1], -1)
        )

    @torch.no_grad()
    def revive(self, residuals: Tensor, there: Tensor, min_share: float, generator: torch.Generator) -> Tensor:
        """Replace codes used less than ``min_share`` of their fair share by random residuals of the batch at their
        level.

        ``used`` (since the last revival, over all workers), ``residuals`` [L, B, d] and ``there`` [B] are the same on
        all workers, so that all replace the same codes. Returns the mask [L, K] of replaced codes; usage is reset to
        zero."""
        dead = self.used < min_share * self.used.mean(dim=1, keepdim=True)
        if self.kept is not None:
            dead &= ~self.kept
        rows = torch.nonzero(there).flatten()
        if not len(rows):
            return torch.zeros_like(dead)
        for level in torch.nonzero(dead.any(dim=1)).flatten().tolist():
            codes = torch.nonzero(dead[level]).flatten()
            pick = rows[torch.randint(len(rows), (len(codes),), generator=generator).to(rows.device)]
            self.weight[level, codes] = residuals[level, pick]
        self.used.zero_()
        return dead


def residual_loss(quantized: Residual, there: Tensor, commitment: float) -> Tensor:
    """Compute L_rq (TIGER's L_rqvae; methods 6.1): sum over levels of ``||sg(r_{l-1}) - e_l||^2 + commitment ||r_{l-1}
    - sg(e_l)||^2``, mean over dimensions and batch; ``there`` [B]."""
    codebook = ((quantized.residuals.detach() - quantized.codewords) ** 2).mean(2)
    commit = ((quantized.residuals - quantized.codewords.detach()) ** 2).mean(2)
    return ((codebook + commitment * commit) * there).mean(1).sum()


@torch.no_grad()
def sinkhorn(distance: Tensor, entropy: float, rounds: int) -> Tensor:
    """Compute the balanced soft assignment of a batch, [B, K]: distances centred to [-1, 1], then columns and rows
    normalised in turn (Cuturi, arXiv 1306.0895; methods 9.7)."""
    d = distance.double()
    middle, spread = (d.max() + d.min()) / 2, (d.max() - d.min()).clamp(min=1e-12) / 2
    plan = torch.exp(-(d - middle) / spread / entropy)
    for _ in range(rounds):
        plan = plan / plan.sum(0, keepdim=True).clamp(min=1e-300) / plan.shape[1]
        plan = plan / plan.sum(1, keepdim=True).clamp(min=1e-300) / plan.shape[0]
    return plan


def _distance(x: Tensor, book: Tensor) -> Tensor:
    """Compute the squared distance up to a constant per row: [B, d], [K, d] -> [B, K]."""
    return torch.addmm((book * book).sum(1), x, book.T, alpha=-2)
