"""Index ragged sequences that are stored flat, one after another."""

from __future__ import annotations

import torch
from torch import Tensor


def runs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every element of consecutive runs of length ``counts`` [n], the index of its run and its position
    within the run, both [sum of counts]."""
    run = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return run, torch.arange(len(run), device=counts.device) - (counts.cumsum(0) - counts)[run]
