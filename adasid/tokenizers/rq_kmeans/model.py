"""RQ-KMeans (OneRec, QARM; methods 6.3) is residual k-means without an encoder; plain, balanced, aligned, or one for
each modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.func import functional_call

from adasid.data.shards import Batch
from adasid.distributed import Workers
from adasid.experts import mlp
from adasid.losses.overlap import pair_contrast
from adasid.quantizers.kmeans import kmeans, lloyd_round, nearest_euclidean
from adasid.quantizers.residual import residual_pass
from adasid.sid import PreviousCodes
from adasid.tokenizers.base import Losses
from adasid.tokenizers.rq_kmeans import RqKmeansSettings
from adasid.tokenizers.spaces import Spaces


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

        def assign(level: int, residual: Tensor, words: Tensor) -> Tensor:
            words.copy_(kmeans(residual, len(words), rounds, generator, balanced))
            return nearest_euclidean(residual, words)

        for _ in residual_pass(x, self.centroids, assign):
            pass

    def refine(self, x: Tensor, rounds: int, balanced: bool) -> None:
        """Run ``rounds`` Lloyd rounds on each level, from the present centroids."""

        def assign(level: int, residual: Tensor, words: Tensor) -> Tensor:
            for _ in range(rounds):
                words.copy_(lloyd_round(residual, words, balanced)[0])
            return nearest_euclidean(residual, words)

        for _ in residual_pass(x, self.centroids, assign):
            pass

    def forward(self, x: Tensor, previous: PreviousCodes | None = None) -> tuple[Tensor, Tensor]:
        """Return the codes [n, L] and the sum of their centroids [n, d] of ``x`` [n, d]; ``previous``: codes [n, L]."""

        def assign(level: int, residual: Tensor, words: Tensor) -> Tensor:
            return nearest_euclidean(residual, words, previous.of(level) if previous else None)

        levels = list(residual_pass(x, self.centroids.to(x), assign))
        _, residual, words = levels[-1]
        return torch.stack([codes for codes, *_ in levels], dim=1), x - (residual - words)


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
        spaces = super()._spaces(batch)
        if self.encoder is None:
            return spaces
        x, present = spaces["shared"]
        x = nnf.normalize(
            functional_call(self.encoder, {name: p.double() for name, p in self.encoder.named_parameters()}, (x,)),
            dim=1,
        )
        return {"shared": (x, present)}

    def fit_space(self, kind: str, x: Tensor, generator: torch.Generator) -> None:
        """Fit residual k-means."""
        self.quantizers[kind].fit(x, self.settings.rounds, generator, self.settings.balanced)  # type: ignore[operator]

    def refine_space(self, kind: str, x: Tensor, rounds: int) -> None:
        """Run Lloyd rounds on each level."""
        self.quantizers[kind].refine(x, rounds, self.settings.balanced)  # type: ignore[operator]

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
