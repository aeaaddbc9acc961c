"""This module defines SASRec (arXiv 1808.09781) and the sampled softmax that trains it.

The rows of the item table are the behaviour embeddings; methods 7.4 explains why the loss and the optimiser decide
whether their norms measure popularity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adasid.recommenders.encoder import CausalEncoder


class SASRec(CausalEncoder):
    """The logit of an item is state . row. The item table is not part of the model
    (:class:`adasid.training.item_table.ItemTable`): a step reads and updates only the rows of its batch."""

    def __init__(self, width: int, blocks: int, heads: int, max_length: int, dropout: float) -> None:
        super().__init__(width, blocks, heads, 1, max_length, dropout)


def sampled_softmax(
    states: Tensor, positives: Tensor, negatives: Tensor, positive_log_q: Tensor, negative_log_q: Tensor, same: Tensor
) -> Tensor:
    """Compute the mean sampled-softmax cross-entropy with logQ correction (Yi et al., RecSys 2019; methods 7.4).

    ``states`` [P, d], ``positives`` [P, d], ``negatives`` [N, d]; ``*_log_q`` [P], [N]: log sampling probability of
    each item; ``same`` [P, N]: True where a negative is the row's positive (masked out)."""
    positive_logits = (states * positives).sum(1) - positive_log_q
    negative_logits = (states @ negatives.T - negative_log_q).masked_fill(same, -torch.inf)
    return (torch.logaddexp(positive_logits, negative_logits.logsumexp(1)) - positive_logits).mean()
