"""This module defines what all trained codebooks share: counts of use, and the replacement of dead codes (methods
9.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Codebooks(nn.Module):
    """``Codebooks`` has one codebook for each slot: ``weight`` [L, K, d]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("used", torch.zeros(weight.shape[:2]))
        self.used: Tensor
        """Use of each code since the last replacement, over all workers, [L, K]."""
        self.kept: Tensor | None = None
        """Codes that are never replaced, [L, K] bool."""

    @torch.no_grad()
    def counts(self, codes: Tensor, active: Tensor) -> Tensor:
        """Count how often each code is assigned in a batch of active assignments; [L, B] each -> [L, K]."""
        return torch.zeros_like(self.used).scatter_add_(1, codes, active.to(self.used.dtype))

    @torch.no_grad()
    def revive(self, vectors: Tensor, active: Tensor, min_share: float, generator: torch.Generator) -> Tensor:
        """Replace codes used less than ``min_share`` of their fair share by random active vectors of the batch.

        :attr:`used`, ``vectors`` [L, B, d] and ``active`` [L, B] are the same on all workers, so that all replace the
        same codes. Returns the mask [L, K] of replaced codes; use is reset to zero."""
        dead = self.used < min_share * self.used.mean(dim=1, keepdim=True)
        if self.kept is not None:
            dead &= ~self.kept
        for slot in torch.nonzero(dead.any(dim=1)).flatten().tolist():
            rows = torch.nonzero(active[slot]).flatten()
            codes = torch.nonzero(dead[slot]).flatten()
            if not len(rows):
                dead[slot] = False
                continue
            pick = rows[torch.randint(len(rows), (len(codes),), generator=generator).to(rows.device)]
            self.weight[slot, codes] = vectors[slot, pick]
        self.used.zero_()
        return dead
