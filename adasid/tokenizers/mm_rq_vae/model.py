"""MM-RQ-VAE (MME-SID, arXiv 2509.02017) trains one RQ-VAE per modality to reconstruct the batch's distribution, and
aligns the quantized content with the quantized behaviour (methods 6.6)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adasid.data.shards import Batch
from adasid.distributed import Workers
from adasid.losses.alignment import info_nce
from adasid.losses.mmd import mmd
from adasid.tables import BEHAVIOR
from adasid.tokenizers.mm_rq_vae import MmRqVaeSettings
from adasid.tokenizers.rq_vae.model import Passed, RqVaePlus


class MmRqVae(RqVaePlus):
    """MM-RQ-VAE compares distributions within this worker's part of a batch."""

    settings: MmRqVaeSettings

    def __init__(self, settings: MmRqVaeSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths)

    def reconstruction(self, passed: dict[str, Passed], x: dict[str, Tensor], batch: Batch) -> Tensor:
        """Compute the sum over modalities of MMD(decoded, input), or of the squared error."""
        if self.settings.reconstruction == "mse":
            return super().reconstruction(passed, x, batch)
        decoded = self.decoded({kind: p.straight for kind, p in passed.items()})
        return torch.stack([mmd(y[batch.present[m]], x[m][batch.present[m]]) for m, y in decoded.items()]).sum()

    def added(
        self,
        passed: dict[str, Passed],
        x: dict[str, Tensor],
        batch: Batch,
        workers: Workers,
    ) -> tuple[Tensor, dict[str, float]]:
        """Contrast each content modality's z_q with behaviour's, for the items that have both."""
        target, losses = passed[BEHAVIOR], [batch.richness.new_zeros(())]
        everyone, valid = (
            workers.gather_with_gradient(target.straight),
            workers.gather(target.there.to(torch.uint8)).bool(),
        )
        items = (batch.index, workers.gather(batch.index))
        positives = torch.arange(len(batch), device=valid.device) + workers.rank * len(batch)
        for kind, p in passed.items():
            both = p.there & target.there
            if kind == BEHAVIOR:
                continue
            if self.settings.alignment == "contrastive":
                each = info_nce(p.straight, everyone, positives, self.settings.temperature, valid, items)
                losses.append((each * both).sum() / both.sum().clamp(min=1))
            else:
                losses.append(mmd(target.straight[both], p.straight[both]))
        loss = torch.stack(losses).sum()
        return self.settings.alignment_weight * loss, {"alignment": float(loss.detach())}
