"""Principal axes of the modalities: the linear maps with which experts begin (methods 1.11)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adasid.data.shards import Shard
from adasid.distributed import Workers
from adasid.quantizers.product import principal_components
from adasid.tables import BEHAVIOR
from adasid.tokenizers.adc_sid import AdcSidSettings
from adasid.tokenizers.base import sample
from adasid.tokenizers.inputs import Inputs
from adasid.tokenizers.settings import SHARED


class Axes(nn.Module):
    """``Axes`` maps scaled inputs linearly to a space of ``width`` dimensions, of which each modality has a part of its
    own: its ``latent_width`` principal axes, scaled so that the modality has its weight whatever its width."""

    def __init__(self, widths: Mapping[str, int], settings: AdcSidSettings) -> None:
        super().__init__()
        self.settings, self.parts, start = settings, dict[str, slice](), 0
        for m, width in widths.items():
            size = min(width, settings.latent_width)
            self.parts[m] = slice(start, start + size)
            self.register_buffer(f"basis_{m}", torch.zeros(width, size))
            start += size
        self.width = start

    def reads(self, kind: str) -> Tensor:
        """Return which dimensions slots of ``kind`` read: [width] bool."""
        chosen = torch.zeros(self.width, dtype=torch.bool)
        chosen[slice(None) if kind == SHARED else self.parts[kind]] = True
        return chosen

    @torch.no_grad()
    def fit(self, inputs: Inputs, shard: Shard, workers: Workers) -> None:
        """Compute the axes of each modality from a sample of all workers' items that have it."""
        for m, part in self.parts.items():
            basis, weight = self.get_buffer(f"basis_{m}"), 1.0 if m == BEHAVIOR else self.settings.content_weight
            batches = [b.to(basis.device) for b in sample(shard, workers, self.settings.kmeans_samples, m)]
            x = workers.gather_ragged(torch.cat([inputs.scale(m, b.vectors[m][b.present[m]]) for b in batches]))
            factor = weight * (self.settings.latent_width / len(basis)) ** 0.5
            basis.copy_(principal_components(x, part.stop - part.start, whiten=False).basis * factor)
            workers.broadcast(basis)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return by kind what its experts begin with, [1, B, width]: a modality's own part, all parts for shared
        experts."""
        parts = {m: x[m] @ self.get_buffer(f"basis_{m}") for m in self.parts}
        whole = torch.cat(list(parts.values()), dim=1)
        starts = {m: torch.zeros_like(whole) for m in parts}
        for m, part in self.parts.items():
            starts[m][:, part] = parts[m]
        return {SHARED: whole[None], **{m: start[None] for m, start in starts.items()}}
