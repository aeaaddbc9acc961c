"""Runs of unequal length, flat one after another."""

from __future__ import annotations

import torch
from torch import Tensor


def runs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of ``counts`` [n] places one after another: the run of each place and its position in it, both [sum of
    counts]."""
    run = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return run, torch.arange(len(run), device=counts.device) - (counts.cumsum(0) - counts)[run]
