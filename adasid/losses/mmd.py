"""This module defines the maximum mean discrepancy of two samples (Gretton et al., JMLR 2012; MME-SID, arXiv
2509.02017; methods 6.6)."""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA = 0.5


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Compute the squared MMD of ``x`` [B, d] and ``y`` [C, d], biased (a pair of a row with itself counts, so it is
    never negative): 0 for equal samples.

    One Gaussian kernel ``exp(-|a - b|^2 / (2 s^2))``; s^2 = ALPHA times the mean squared distance of all (B + C)^2
    pairs, without gradient. It is 0 if a sample is empty."""
    if not len(x) or not len(y):
        return x.sum() * 0 + y.sum() * 0
    rows = torch.cat([x, y])
    squares = (rows**2).sum(1)
    distance = (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp(min=0)
    width = 2 * ALPHA * distance.detach().mean()
    kernel = torch.exp(-distance / width.clamp(min=torch.finfo(rows.dtype).tiny))
    first, cross, second = kernel[: len(x), : len(x)], kernel[: len(x), len(x) :], kernel[len(x) :, len(x) :]
    return first.mean() + second.mean() - 2 * cross.mean()
