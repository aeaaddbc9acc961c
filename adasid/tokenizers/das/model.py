"""DAS (arXiv 2508.10584), item side, is an RQ-VAE whose quantized vectors are aligned with behaviour and with those of
co-engaged items (methods 6.5). Left out: the user side, the contrast with a user's state (w3), and the debiasing of
pairs by their items' popularity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adasid.data.shards import Batch
from adasid.distributed import Workers
from adasid.losses.alignment import info_nce
from adasid.tables import BEHAVIOR
from adasid.tokenizers.das import DasSettings
from adasid.tokenizers.rq_vae.model import Passed, RqVae


class Das(RqVae):
    """DAS adds ``InfoNCE(P q_i, e_b,i)`` and, by ``contrast``, ``InfoNCE(q_i, q_j)`` of co-engaged pairs."""

    settings: DasSettings

    def __init__(self, settings: DasSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths)
        self.project = nn.Linear(settings.latent_width, self.widths[BEHAVIOR], bias=False)

    def added(
        self,
        passed: dict[str, Passed],
        x: dict[str, Tensor],
        batch: Batch,
        workers: Workers,
    ) -> tuple[Tensor, dict[str, float]]:
        """Contrast quantized content with behaviour; items without behaviour do not count."""
        present = batch.present[BEHAVIOR]
        everyone, valid = workers.gather(x[BEHAVIOR]), workers.gather(present.to(torch.uint8)).bool()
        positives = torch.arange(len(batch), device=present.device) + workers.rank * len(batch)
        each = info_nce(
            self.project(passed["shared"].straight),
            everyone,
            positives,
            self.settings.temperature,
            valid,
            (batch.index, workers.gather(batch.index)),
        )
        loss = (each * present).sum() / present.sum().clamp(min=1)
        return self.settings.behavior_weight * loss, {"alignment": float(loss.detach())}

    def paired_view(self, passed: dict[str, Passed]) -> Tensor:
        """Return the quantized vectors, on which pairs are contrasted."""
        return passed["shared"].straight
