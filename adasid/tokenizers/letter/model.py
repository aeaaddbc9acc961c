"""LETTER (arXiv 2405.07314) is an RQ-VAE with collaborative regularisation L_CF, diversity regularisation L_div, and a
balanced assignment of the last level in training (methods 6.4).

Codes of new items never depend on their batch: encoding takes the nearest code. A codeword's positive for L_div is
drawn once an epoch (in LETTER's code, for every item).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from adasid.data.shards import Batch
from adasid.distributed import Workers
from adasid.quantizers.kmeans import balanced_assignment, kmeans, squared_distances
from adasid.tables import BEHAVIOR
from adasid.tokenizers.letter import LetterSettings
from adasid.tokenizers.rq_vae.model import Passed, RqVae


class Letter(RqVae):
    """The collaborative vector is the item's scaled behaviour, projected to the code's width by a learned linear map
    (the paper trains SASRec at that width)."""

    settings: LetterSettings

    def __init__(self, settings: LetterSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths)
        self.project = nn.Linear(self.widths[BEHAVIOR], settings.latent_width, bias=False)
        self.register_buffer("partner", torch.zeros(settings.levels, settings.codebook_size, dtype=torch.int64))
        self.partner: Tensor

    @torch.no_grad()
    def start_epoch(self, generator: torch.Generator) -> None:
        """Cluster each level's codewords by balanced k-means, and draw another codeword of its cluster for each."""
        if not self.quantizing:
            return
        groups = min(self.settings.diversity_groups, self.settings.codebook_size // 2)
        for level, book in enumerate(self.tower("shared").codebooks.weight):
            centres = kmeans(book, groups, self.settings.kmeans_rounds, generator, balanced=True)
            group = balanced_assignment(squared_distances(book, centres), -(-len(book) // groups))
            mates = (group[:, None] == group[None, :]).fill_diagonal_(False).double()
            alone = mates.sum(1) == 0
            mates[alone] = 1 - torch.eye(len(mates), dtype=mates.dtype, device=mates.device)[alone]
            drawn = torch.multinomial(mates.cpu(), 1, generator=generator).flatten()
            self.partner[level] = drawn.to(self.partner.device)

    def balanced(self) -> tuple[float, int] | None:
        """Return the Sinkhorn settings of the last level."""
        return (self.settings.sinkhorn, self.settings.sinkhorn_rounds) if self.settings.sinkhorn else None

    def quantization(self, passed: dict[str, Passed]) -> Tensor:
        """Compute L_rq, the mean over levels."""
        return super().quantization(passed) / self.settings.levels

    def added(
        self,
        passed: dict[str, Passed],
        x: dict[str, Tensor],
        batch: Batch,
        workers: Workers,
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute L_CF and L_div."""
        p, s = passed["shared"], self.settings
        collaborative = self._collaborative(p.straight, x[BEHAVIOR], batch, workers)
        total, parts = s.collaborative_weight * collaborative, {"collaborative": float(collaborative.detach())}
        if self.quantizing:
            diversity = self._diversity(p)
            total = total + s.diversity_weight * diversity
            parts["diversity"] = float(diversity.detach())
        return total, parts

    def _collaborative(self, z: Tensor, behavior: Tensor, batch: Batch, workers: Workers) -> Tensor:
        """Compute L_CF: softmax over the inner products of z_q with all workers' behaviour vectors; items without
        behaviour do not count."""
        present = batch.present[BEHAVIOR]
        everyone, valid = (
            workers.gather_with_gradient(self.project(behavior)),
            workers.gather(present.to(torch.uint8)).bool(),
        )
        positives = torch.arange(len(batch), device=z.device) + workers.rank * len(batch)
        again = (batch.index[:, None] == workers.gather(batch.index)[None, :]).scatter(1, positives[:, None], False)
        logits = (z @ everyone.T).masked_fill(~valid[None, :] | again, -1e4)
        return (nnf.cross_entropy(logits, positives, reduction="none") * present).sum() / present.sum().clamp(min=1)

    def _diversity(self, p: Passed) -> Tensor:
        """Compute L_div: for each level, softmax over the other codewords with the drawn codeword as positive; mean
        over levels."""
        losses = []
        for level, book in enumerate(self.tower("shared").codebooks.weight):
            code, residual, word = (
                p.quantized.codes[:, level],
                p.quantized.residuals[level],
                p.quantized.codewords[level],
            )
            straight = residual + (word - residual).detach()
            logits = (straight @ book.T).masked_fill(nnf.one_hot(code, len(book)).bool(), -1e4)
            losses.append(nnf.cross_entropy(logits, self.partner[level][code]))
        return torch.stack(losses).mean()
