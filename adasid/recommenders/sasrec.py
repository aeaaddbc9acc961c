"""SASRec (arXiv 1808.09781) with an item table that is updated lazily, and the sampled softmax that trains it.

The rows of the item table are the behaviour embeddings; see methods 7.4 for why the loss and the optimiser decide
whether their norms measure popularity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SASRec(nn.Module):
    """Causal transformer over a user's items; the logit of an item is state . row.

    The item table [M, width] is a plain tensor, outside ``parameters()``: a step reads and updates only the rows of its batch.
    """

    def __init__(self, items: int, width: int, blocks: int, heads: int, max_length: int, dropout: float, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.table = nn.init.normal_(torch.empty(items, width, device=device), std=0.02)
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, width, dropout, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, blocks, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.max_length = max_length

    def forward(self, rows: Tensor) -> Tensor:
        """States after each event. ``rows`` [B, T, width]: item vectors, oldest first, padded at the end -> [B, T, width]."""
        length = rows.shape[1]
        inputs = self.dropout(rows * math.sqrt(rows.shape[2]) + self.positions[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=rows.device)
        return self.encoder(inputs, mask=mask, is_causal=True)  # type: ignore[no-any-return]


def sampled_softmax(states: Tensor, positives: Tensor, negatives: Tensor, positive_log_q: Tensor, negative_log_q: Tensor, same: Tensor) -> Tensor:
    """Mean sampled-softmax cross-entropy with logQ correction (Yi et al., RecSys 2019; methods 7.4).

    ``states`` [P, d], ``positives`` [P, d], ``negatives`` [N, d]; ``*_log_q`` [P], [N]: log sampling probability of each item;
    ``same`` [P, N]: True where a negative is the row's own positive (it is masked out).
    """
    own = (states * positives).sum(1) - positive_log_q
    others = (states @ negatives.T - negative_log_q).masked_fill(same, -torch.inf)
    return (torch.logaddexp(own, others.logsumexp(1)) - own).mean()
