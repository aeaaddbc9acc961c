"""This module defines residual codebooks: each level quantizes the residual of the levels before it (SoundStream, arXiv
2107.03312; TIGER, arXiv 2305.05065; methods 6.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from adasid.quantizers.codebooks import Codebooks
from adasid.quantizers.kmeans import kmeans, means_of, nearest_euclidean, previous_or_nearest, squared_distances
from adasid.sid import PreviousCodes


class Residual(NamedTuple):
    """``Residual`` is the result of quantization: ``codes`` [B, L]; ``quantized`` [B, d]: sum of the chosen codewords;
    ``residuals`` and ``codewords`` [L, B, d]: r_{l-1} and e_l."""

    codes: Tensor
    quantized: Tensor
    residuals: Tensor
    codewords: Tensor


class ResidualCodebooks(Codebooks):
    """``ResidualCodebooks`` has ``levels`` codebooks of ``size`` codewords of ``width`` dimensions, used in order by
    Euclidean distance."""

    def __init__(self, levels: int, size: int, width: int) -> None:
        super().__init__(torch.randn(levels, size, width) / width**0.5)

    def forward(
        self, z: Tensor, balanced: tuple[float, int] | None = None, previous: PreviousCodes | None = None
    ) -> Residual:
        """Quantize latents [B, d]. ``balanced``: entropy and rounds of a Sinkhorn assignment of the last level, for
        training only, and only without previous codes; ``previous``: codes [B, L]."""
        last = len(self.weight) - 1

        def assign(level: int, residual: Tensor, book: Tensor) -> Tensor:
            if previous:
                return previous_or_nearest(squared_distances(residual, book), previous.of(level))
            if balanced and level == last:
                return sinkhorn(squared_distances(residual, book), *balanced).argmax(1)
            return _distance(residual, book).argmin(1)

        levels = list(residual_pass(z, self.weight, assign))
        codes, residuals, words = (torch.stack(part) for part in zip(*levels))
        return Residual(codes.T.contiguous(), words.sum(0), residuals, words)

    @torch.no_grad()
    def initialise(
        self, latents: Tensor, rounds: int, generator: torch.Generator, previous: Tensor | None = None
    ) -> None:
        """Initialise each level by k-means on the residuals of the levels before; a previous code becomes the mean of
        its rows. ``latents`` [n, d], ``previous`` [n, L]: codes (negative: none)."""

        def fit(level: int, residual: Tensor, book: Tensor) -> Tensor:
            book.copy_(kmeans(residual, len(book), rounds, generator))
            if previous is None:
                return nearest_euclidean(residual, book)
            codes = previous[:, level]
            book.copy_(means_of(residual, codes, book))
            return torch.where(codes >= 0, codes, nearest_euclidean(residual, book))

        for _ in residual_pass(latents, self.weight, fit):
            pass


def residual_pass(
    x: Tensor, books: Iterable[Tensor], assign: Callable[[int, Tensor, Tensor], Tensor], damping: float = 1.0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Quantize ``x`` [n, d] level by level, each the residual of the levels before. ``books``: codewords [K, d] of each
    level; ``assign(level, residual, book)`` returns codes [n], without gradients, and may fit the book first;
    ``damping``: share of a codeword that is subtracted, from 0 (levels are parallel) to 1 (methods 6.3).

    Yields, for each level, codes [n], the residual [n, d] before it and its codewords [n, d]. Gradients pass through a
    residual to ``x`` only."""
    for level, book in enumerate(books):
        with torch.no_grad():
            codes = assign(level, x, book)
        words = nnf.embedding(codes, book)
        yield codes, x, words
        x = x - (words if damping == 1 else damping * words).detach()


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
