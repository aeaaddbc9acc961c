"""This module defines the adaptive sparsity of a ReLU router (ReMoE, arXiv 2412.14711, eqs 7 to 11; methods 1.7 and
2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BOUNDS = (1e-10, 1e2)
SHARPNESS, LEVEL = 10.0, 0.05
"""Slope and threshold of the smooth count of active slots in the item-wise hinge."""


class SparsityController(nn.Module):
    """``SparsityController`` has the weight of the sparsity loss and updates it once a step by the sign of (target -
    current sparsity). Its state is part of the checkpoint."""

    def __init__(self, start: float, step: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(start, dtype=torch.float64))
        self.weight: Tensor
        self.step = step

    @torch.no_grad()
    def update(self, current: float, target: float) -> None:
        """Update ``lambda <- lambda a^{sign(target - current)}`` (ReMoE eq 7); equality counts as too sparse (as in
        ReMoE's code); clamped to 1e-10 .. 1e2."""
        self.weight.mul_(self.step if current < target else 1 / self.step).clamp_(*BOUNDS)


def sparsity_loss(gates: Tensor, active_share: Tensor, target: float) -> Tensor:
    """Compute ``mean over items of sum_j f_j R_j`` with ``f_j = active_share_j / (1 - target)`` (detached): an L1 loss
    that weighs busy experts more (ReMoE eqs 10 and 11).

    ``gates`` [B, N_b] >= 0; ``active_share`` [N_b]: share of items, over all workers, with R_j > 0. f_j is 1 at balance
    on target."""
    load = (active_share / (1 - target)).detach()
    return (gates * load).sum(1).mean() if len(gates) else gates.sum()


def item_sparsity_loss(gates: Tensor, target: Tensor) -> Tensor:
    """Compute a hinge on each item's own sparsity (methods 1.7): mean over items of ``[mean_j sigma(SHARPNESS (R_j -
    LEVEL)) - (1 - target)]_+^2``. ``gates`` [B, N_b], ``target`` [B]: share of slots to be inactive."""
    busy = torch.sigmoid(SHARPNESS * (gates - LEVEL)).mean(1)
    return (torch.relu(busy - (1 - target)) ** 2).mean() if len(gates) else gates.sum()
