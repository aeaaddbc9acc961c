"""This module defines the contrastive alignment and the controller of its strength (ADC-SID, arXiv 2510.25622, eqs 17
to 20; methods 1.5)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

WEAK = 0.05
"""An alignment weight below this counts as not aligned when beta is calibrated (methods 10 #14)."""


def alignment_weight(richness: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute ``w = sigma(alpha x - beta) / sigma(alpha - beta)`` for richness x in [0, 1]; w increases and is 1 at x =
    1 (ADC-SID eq 17)."""
    return torch.sigmoid(alpha * richness - beta) / (1 / (1 + math.exp(beta - alpha)))


def calibrated_beta(quantile: float, alpha: float, weak: float = WEAK) -> float:
    """Return the beta for which an item of richness ``quantile`` has the weight ``weak``; bisection, exact to 1e-9.

    The weight at a fixed richness < 1 decreases with beta. No beta reaches ``weak`` if exp(alpha (quantile - 1)) >
    weak: the largest beta tried (alpha + 40) is returned then.
    """
    low, high = -40.0, alpha + 40.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        heavy = alignment_weight(torch.tensor(quantile, dtype=torch.float64), alpha, middle) > weak
        low, high = (middle, high) if heavy else (low, middle)
    return (low + high) / 2


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    temperature: float,
    valid: Tensor | None = None,
    items: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute the loss of each anchor, -log softmax of its positive among ``candidates`` by cosine / temperature
    (ADC-SID eqs 18 to 20, one direction).

    ``anchors`` [B, d], ``candidates`` [C, d], ``positives`` [B]: index of the positive; ``valid`` [C] bool: candidates
    that exist; ``items``: item of each anchor [B] and of each candidate [C], so that other rows of the anchor's item
    are not negatives -> [B]."""
    logits = nnf.normalize(anchors, dim=1) @ nnf.normalize(candidates, dim=1).T / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid[None, :], -1e4)
    if items is not None:
        again = (items[0][:, None] == items[1][None, :]).scatter(1, positives[:, None], False)
        logits = logits.masked_fill(again, -1e4)
    return nnf.cross_entropy(logits, positives, reduction="none")
