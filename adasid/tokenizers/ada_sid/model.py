"""ADA-SID (arXiv 2510.25622 v1 and v2) is the first version of ADC-SID, with another alignment and SIDs of variable
length (methods 1.5, 1.7, 1.10)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adasid.data.shards import Batch
from adasid.distributed import Workers
from adasid.sid import Codes
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers.ada_sid import AdaSidSettings
from adasid.tokenizers.adc_sid.model import AdcSid


class AdaSid(AdcSid):
    """ADA-SID aligns behaviour with the sum of the content projections; an inactive behaviour slot is PAD."""

    settings: AdaSidSettings

    def __init__(self, settings: AdaSidSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths)

    def _alignment(self, h: dict[str, Tensor], batch: Batch, workers: Workers) -> Tensor:
        """Compute the alignment loss (eqs 15 to 17): content pairs both ways; behaviour (anchor) against h_t + h_v,
        weighted by the item's alignment strength."""
        content = self.settings.content
        present = {m: batch.present[m] for m in h}
        joint = {**h, "content": torch.stack([h[m] for m in content]).sum(0)}
        one_way = self._contrast(
            joint,
            {**present, "content": torch.stack([present[m] for m in content]).any(0)},
            batch.index,
            workers,
        )
        return torch.stack(
            [*self._content_pairs(one_way), one_way(BEHAVIOR, "content", self._strength(batch.richness))],
        ).sum()

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """Encode as ADC-SID does, but a behaviour slot whose weight is at most ``threshold`` is PAD, with weight 0."""
        codes, weights, _ = super().encode(batch)
        off = ~self._content_slots()[None, :] & (weights <= self.settings.threshold)
        weights = weights.masked_fill(off, 0.0)
        return Codes(codes.masked_fill(off, PAD), weights, weights > 0)
