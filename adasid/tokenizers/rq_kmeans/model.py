"""RQ-KMeans (OneRec, QARM; methods 6.3) is residual k-means without an encoder; plain, balanced, aligned, or one for
each modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.func import functional_call

from adasid.experts import mlp
from adasid.losses.overlap import pair_contrast
from adasid.quantizers.kmeans import PreviousCodes, kmeans, lloyd_round, nearest_euclidean
from adasid.tokenizers.base import Losses
from adasid.tokenizers.rq_kmeans import RqKmeansSettings
from adasid.tokenizers.spaces import Spaces
from adasid.training.shards import Batch
from adasid.training.workers import Workers


class ResidualCentroids(nn.Module):
    """``ResidualCentroids`` has ``levels`` codebooks of ``size`` centroids; each quantizes the residual of the one
    before. ``centroids`` [L, K, d]."""

    def __init__(self, levels: int, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(levels, size, width))
        self.centroids: Tensor

    def fit(self, x: Tensor, rounds: int, generator: torch.Generator, balanced: bool) -> None:
        """Fit k-means level by level to ``x`` [n, d], n >= 1. Residuals are taken from the nearest centroid, as in
        :meth:`forward`."""
        for level, words in enumerate(self.centroids):
            self.centroids[level] = kmeans(x, len(words), rounds, generator, balanced)
            x = x - words[nearest_euclidean(x, words)]

    def forward(self, x: Tensor, previous: PreviousCodes | None = None) -> tuple[Tensor, Tensor]:
        """Return the codes [n, L] and the sum of their centroids [n, d] of ``x`` [n, d]; ``previous``: codes [n, L]."""
        codes, residual = [], x
        for level, words in enumerate(self.centroids.to(x)):
            codes.append(nearest_euclidean(residual, words, previous.of(level) if previous else None))
            residual = residual - words[codes[-1]]
        return torch.stack(codes, dim=1), x - residual


class RqKmeans(Spaces):
    """RQ-KMeans names its slots r0 to r{L-1}, or by modality."""

    settings: RqKmeansSettings

    def __init__(self, settings: RqKmeansSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths, "r")
        s = settings
        self.encoder = mlp([self.dimensions("shared"), *s.aligner.hidden, s.aligner.width]) if s.aligner else None
        spaces = {kind: s.aligner.width if s.aligner else self.dimensions(kind) for kind in self.levels}
        self.quantizers = nn.ModuleDict(
            {kind: ResidualCentroids(number, s.codebook_size, spaces[kind]) for kind, number in self.levels.items()},
        )

    def _spaces(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the aligner's outputs, if there is one, with unit norm because its loss depends on their direction
        only."""
        found = super()._spaces(batch)
        if self.encoder is None:
            return found
        x, there = found["shared"]
        x = nnf.normalize(
            functional_call(self.encoder, {name: p.double() for name, p in self.encoder.named_parameters()}, (x,)),
            dim=1,
        )
        return {"shared": (x, there)}

    def fit_space(self, kind: str, x: Tensor, generator: torch.Generator) -> None:
        """Fit residual k-means."""
        self.quantizers[kind].fit(x, self.settings.rounds, generator, self.settings.balanced)  # type: ignore[operator]

    def refine_space(self, kind: str, x: Tensor, rounds: int) -> None:
        """Run Lloyd rounds on each level."""
        for words in self.quantizers[kind].get_buffer("centroids"):
            for _ in range(rounds):
                words.copy_(lloyd_round(x, words, self.settings.balanced)[0])
            x = x - words[nearest_euclidean(x, words)]

    def losses(self, batch: Batch, workers: Workers, progress: float) -> Losses:
        """Compute the aligner's contrastive loss of co-engaged items against all workers' rows (QARM)."""
        a = self.settings.aligner
        if a is None or self.encoder is None:
            return super().losses(batch, workers, progress)
        assert batch.paired is not None
        z = self.encoder(self._joint(batch))
        everyone, items = workers.gather_with_gradient(z), workers.gather(batch.index)
        total = pair_contrast(z, batch.index, batch.paired, a.temperature, everyone, items, workers.rank * len(batch))
        return Losses(total, {"loss": float(total.detach())})

    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decode the vectors, or return no modality if the aligner's space is quantized."""
        return {} if self.encoder else super().reconstruct(batch)
