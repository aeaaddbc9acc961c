"""This module defines the causal transformer over a user's items, shared by SASRec and the generative retriever."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class CausalEncoder(nn.Module):
    """``CausalEncoder`` is a pre-norm transformer with learned positions; inputs are scaled by the square root of their
    width (arXiv 1808.09781). ``feedforward``: width of the hidden layer of each block, as a multiple of the width."""

    def __init__(self, width: int, blocks: int, heads: int, feedforward: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, feedforward * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, blocks, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.max_length = max_length

    def forward(self, rows: Tensor) -> Tensor:
        """Return the states after each event. ``rows`` [B, T, width]: item vectors, oldest first, padded at the end ->
        [B, T, width]."""
        length = rows.shape[1]
        inputs = self.dropout(rows * math.sqrt(rows.shape[2]) + self.positions[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=rows.device)
        return self.encoder(inputs, mask=mask, is_causal=True)  # type: ignore[no-any-return]
