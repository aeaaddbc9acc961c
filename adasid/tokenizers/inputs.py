"""Centre and scale the inputs of every tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers


class Inputs(nn.Module):
    """``Inputs`` centres each modality and scales it to a mean variance of 1 per dimension (one scalar per modality, so
    that the order of norms is preserved).

    ``widths``: modality -> width D. An absent modality is the zero vector, the mean of the scaled inputs.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.widths = dict(widths)
        for m, width in self.widths.items():
            self.register_buffer(f"mean_{m}", torch.zeros(width))
            self.register_buffer(f"scale_{m}", torch.ones(()))

    @torch.no_grad()
    def fit(self, shard: Shard, workers: Workers) -> None:
        """Compute means and scales of all workers' items."""
        sums = {m: torch.zeros(width + 2, dtype=torch.float64) for m, width in self.widths.items()}
        for batch in shard.scan():
            for m in self.widths:
                x = batch.vectors[m].double()
                sums[m] += torch.cat([x.sum(0), (x * x).sum().reshape(1), batch.present[m].sum().double().reshape(1)])
        for m, width in self.widths.items():
            total = workers.sum(sums[m].to(self.get_buffer(f"scale_{m}").device))
            mean = total[:width] / total[-1]
            variance = (total[width] / total[-1] - (mean * mean).sum()) / width
            self.get_buffer(f"mean_{m}").copy_(mean)
            self.get_buffer(f"scale_{m}").copy_(variance.clamp(min=1e-12).rsqrt())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return scaled inputs by modality, [B, D] each."""
        return {m: self.scale(m, batch.vectors[m]) * batch.present[m][:, None] for m in self.widths}

    def scale(self, modality: str, x: Tensor) -> Tensor:
        """Scale input vectors."""
        return (x - self.get_buffer(f"mean_{modality}")) * self.get_buffer(f"scale_{modality}")

    def restore(self, modality: str, x: Tensor) -> Tensor:
        """Map scaled vectors back to the scale of the inputs."""
        return x / self.get_buffer(f"scale_{modality}") + self.get_buffer(f"mean_{modality}")

    def split(self, joint: Tensor) -> dict[str, Tensor]:
        """Split [B, sum of D] into one matrix per modality."""
        return dict(zip(self.widths, joint.split(list(self.widths.values()), dim=1)))
