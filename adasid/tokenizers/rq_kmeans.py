"""RQ-KMeans (OneRec, QARM; methods 6.3): residual k-means without an encoder; plain, balanced, aligned, or one for each modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.func import functional_call

from adasid import config
from adasid.errors import InputError
from adasid.experts import mlp
from adasid.losses.overlap import pair_contrast
from adasid.quantizers.kmeans import kmeans, nearest_euclidean
from adasid.tables import PAD
from adasid.tokenizers.base import Codes, Losses, Slot, Tokenizer, letters, sample
from adasid.tokenizers.inputs import Inputs
from adasid.training.shards import Batch, Shard
from adasid.training.workers import Workers


class ResidualCentroids(nn.Module):
    """``levels`` codebooks of ``size`` centroids, each of the residual that the one before leaves; ``centroids`` [L, K, d]."""

    def __init__(self, levels: int, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(levels, size, width))
        self.centroids: Tensor

    def fit(self, x: Tensor, rounds: int, generator: torch.Generator, balanced: bool) -> None:
        """k-means level by level on ``x`` [n, d], n >= 1. Residuals are of the nearest centroid, as in :meth:`forward`."""
        for level, words in enumerate(self.centroids):
            self.centroids[level] = kmeans(x, len(words), rounds, generator, balanced)
            x = x - words[nearest_euclidean(x, words)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [n, L] and the sum of their centroids [n, d] of ``x`` [n, d]."""
        codes, residual = [], x
        for words in self.centroids.to(x):
            codes.append(nearest_euclidean(residual, words))
            residual = residual - words[codes[-1]]
        return torch.stack(codes, dim=1), x - residual


class RqKmeans(Tokenizer):
    """``widths``: width of each modality of ``settings.inputs``.

    Slots: r0 to r{L-1} over the joint content, where an absent modality counts as its mean and every item has all codes; or, with
    ``levels`` by modality, t0, t1, v0, ... that are PAD where the item lacks the modality. Weights are 1 where there is a code.
    """

    def __init__(self, settings: config.RqKmeans, widths: Mapping[str, int]) -> None:
        super().__init__()
        s = self.settings = settings
        self.widths = {m: int(widths[m]) for m in s.inputs}
        self.inputs = Inputs(self.widths)
        joint = sum(self.widths.values())
        self.encoder = mlp([joint, *s.aligner.hidden, s.aligner.width]) if s.aligner else None
        if isinstance(s.levels, dict):
            levels, spaces, names = s.levels, self.widths, letters(tuple(s.levels))
        else:
            levels, spaces, names = {"shared": s.levels}, {"shared": s.aligner.width if s.aligner else joint}, {"shared": "r"}
        self.slots = tuple(Slot(f"{names[kind]}{i}", kind, s.codebook_size) for kind, number in levels.items() for i in range(number))
        self.quantizers = nn.ModuleDict({kind: ResidualCentroids(number, s.codebook_size, spaces[kind]) for kind, number in levels.items()})

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Means and scales of the inputs."""
        self.inputs.fit(shard, workers)

    def _joint(self, batch: Batch) -> Tensor:
        return torch.cat(list(self.inputs(batch).values()), dim=1)

    def _spaces(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """What is quantized, by kind of slot: vectors [B, d], in float64 so that codes do not depend on the batch, and which items have them [B].
        The aligner's outputs are of unit norm: its loss reads their direction only."""
        if isinstance(self.settings.levels, dict):
            return {m: (x.double(), batch.present[m]) for m, x in self.inputs(batch).items()}
        x = self._joint(batch).double()
        if self.encoder:
            x = nnf.normalize(functional_call(self.encoder, {name: p.double() for name, p in self.encoder.named_parameters()}, (x,)), dim=1)
        return {"shared": (x, torch.ones(len(batch), dtype=torch.bool, device=x.device))}

    @torch.no_grad()
    def fit(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Residual k-means on a fixed sample of all workers' items. Raises InputError where no item of it has a modality."""
        s, rows = self.settings, {kind: list[Tensor]() for kind in self.quantizers}
        for batch in sample(shard, workers, s.fit_samples):
            for kind, (x, there) in self._spaces(batch.to(self.inputs.get_buffer(f"mean_{s.inputs[0]}").device)).items():
                rows[kind].append(x[there].float())
        for kind, quantizer in self.quantizers.items():
            assert isinstance(quantizer, ResidualCentroids)
            x = workers.gather_ragged(torch.cat(rows.pop(kind)))
            if not len(x):
                raise InputError(f"tokenizer.fit_samples {s.fit_samples}: none of these items has {kind!r}; raise it, or leave the modality out")
            quantizer.fit(x, s.rounds, generator, s.balanced)
            workers.broadcast(quantizer.centroids)

    def losses(self, batch: Batch, workers: Workers, progress: float) -> Losses:
        """The aligner's contrast of co-engaged items, among all workers' rows (QARM)."""
        a = self.settings.aligner
        if a is None or self.encoder is None:
            return super().losses(batch, workers, progress)
        assert batch.paired is not None
        z = self.encoder(self._joint(batch))
        everyone, items = workers.gather_with_gradient(z), workers.gather(batch.index)
        total = pair_contrast(z, batch.index, batch.paired, a.temperature, everyone, items, workers.rank * len(batch))
        return Losses(total, {"loss": float(total.detach())})

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """The nearest centroid of each level."""
        found = [self.quantizers[kind](x)[0].masked_fill(~there[:, None], PAD) for kind, (x, there) in self._spaces(batch).items()]
        codes = torch.cat(found, dim=1).int()
        return Codes(codes, (codes != PAD).float(), codes != PAD)

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Sums of centroids in the inputs' own scale; an item without a code has the mean. Nothing where the aligner's space is quantized."""
        if self.encoder:
            return {}
        sums = {kind: (self.quantizers[kind](x)[1] * there[:, None]).float() for kind, (x, there) in self._spaces(batch).items()}
        parts = sums if isinstance(self.settings.levels, dict) else self.inputs.split(sums["shared"])
        return {m: self.inputs.restore(m, x) for m, x in parts.items()}
