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
from adasid.tables import BEHAVIOR
from adasid.tokenizers.base import Losses
from adasid.tokenizers.rq_kmeans import RqKmeansSettings
from adasid.tokenizers.spaces import Quantized, Spaces


class ResidualCentroids(nn.Module):
    """``ResidualCentroids`` has ``levels`` codebooks of ``size`` centroids; each quantizes what is left of a vector
    after the ones before: ``x - damping * sum of their centroids`` (methods 6.3). ``centroids`` [L, K, d]."""

    def __init__(self, levels: int, size: int, width: int, damping: float = 1.0) -> None:
        super().__init__()
        self.damping = damping
        self.register_buffer("centroids", torch.zeros(levels, size, width))
        self.centroids: Tensor

    def fit(
        self, x: Tensor, rounds: int, generator: torch.Generator, balanced: bool, weights: Tensor | None = None
    ) -> None:
        """Fit k-means level by level to ``x`` [n, d], n >= 1, weighted by ``weights`` [n]. Residuals are taken from the
        nearest centroid, as in :meth:`forward`."""

        def assign(level: int, residual: Tensor, words: Tensor) -> Tensor:
            words.copy_(kmeans(residual, len(words), rounds, generator, balanced, weights))
            return nearest_euclidean(residual, words)

        for _ in residual_pass(x, self.centroids, assign, self.damping):
            pass

    def refine(self, x: Tensor, rounds: int, balanced: bool, weights: Tensor | None = None) -> None:
        """Run ``rounds`` Lloyd rounds on each level, from the present centroids."""

        def assign(level: int, residual: Tensor, words: Tensor) -> Tensor:
            for _ in range(rounds):
                words.copy_(lloyd_round(residual, words, balanced, weights)[0])
            return nearest_euclidean(residual, words)

        for _ in residual_pass(x, self.centroids, assign, self.damping):
            pass

    def forward(self, x: Tensor, previous: PreviousCodes | None = None) -> Quantized:
        """Quantize ``x`` [n, d]; ``previous``: codes [n, L]. ``decoded`` is what the codes say of a vector: the damped
        centroids of all levels but the last, and that of the last."""

        def assign(level: int, residual: Tensor, words: Tensor) -> Tensor:
            return nearest_euclidean(residual, words, previous.of(level) if previous else None)

        levels = list(residual_pass(x, self.centroids.to(x), assign, self.damping))
        _, residual, words = levels[-1]
        codes = torch.stack([codes for codes, *_ in levels], dim=1)
        return Quantized(codes, x - (residual - words), residual - self.damping * words)


class RqKmeans(Spaces):
    """RQ-KMeans names its slots r0 to r{L-1}, or by modality."""

    settings: RqKmeansSettings

    def __init__(self, settings: RqKmeansSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths, "r")
        s = settings
        if self.by_modality:  # over the root of its width: a modality's weight does not depend on its width
            weights = {m: 1.0 if m == BEHAVIOR else s.content_weight for m in self.widths}
            self.factors = {m: weights[m] / width**0.5 for m, width in self.widths.items()}
        self.encoder = mlp([self.dimensions("shared"), *s.aligner.hidden, s.aligner.width]) if s.aligner else None
        spaces = {kind: s.aligner.width if s.aligner else self.dimensions(kind) for kind in self.levels}
        self.quantizers = nn.ModuleDict(
            {
                kind: ResidualCentroids(number, s.codebook_size, spaces[kind], s.damping)
                for kind, number in self.levels.items()
            },
        )

    def joint(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the aligner's outputs, if there is one, with unit norm because its loss depends on their direction
        only."""
        x = super().joint(inputs)
        if self.encoder is None:
            return x
        weights = {name: p.double() for name, p in self.encoder.named_parameters()}
        return nnf.normalize(functional_call(self.encoder, weights, (x.double(),)), dim=1)

    def fit_space(self, kind: str, x: Tensor, generator: torch.Generator, weights: Tensor | None) -> None:
        """Fit residual k-means."""
        s = self.settings
        self.quantizers[kind].fit(x, s.rounds, generator, s.balanced, weights)  # type: ignore[operator]

    def refine_space(self, kind: str, x: Tensor, rounds: int, weights: Tensor | None) -> None:
        """Run Lloyd rounds on each level."""
        self.quantizers[kind].refine(x, rounds, self.settings.balanced, weights)  # type: ignore[operator]

    def losses(self, batch: Batch, workers: Workers, progress: float) -> Losses:
        """Compute the aligner's contrastive loss of co-engaged items against all workers' rows (QARM)."""
        a = self.settings.aligner
        if a is None or self.encoder is None:
            return super().losses(batch, workers, progress)
        assert batch.paired is not None
        z = self.encoder(super().joint(self.inputs(batch)))
        everyone, items = workers.gather_with_gradient(z), workers.gather(batch.index)
        total = pair_contrast(z, batch.index, batch.paired, a.temperature, everyone, items, workers.rank * len(batch))
        return Losses(total, {"loss": float(total.detach())})

    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decode the vectors, or return no modality if the aligner's space is quantized."""
        return {} if self.encoder else super().reconstruct(batch)
