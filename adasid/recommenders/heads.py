"""Heads of the retriever that score the whole catalogue, and the choice among all heads (methods 7.3)."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from adasid import config
from adasid.metrics.blocks import Scores
from adasid.recommenders.autoregressive import AutoregressiveRetriever
from adasid.recommenders.retriever import Retriever, ScoredRetriever, token_loss
from adasid.recommenders.sasrec import sampled_softmax
from adasid.recommenders.tokens import ItemTokens


class ItemRetriever(ScoredRetriever):
    """The score is state . vector; the loss is the sampled softmax over items with logQ correction (methods 7.3, the
    item head), or the softmax over all SIDs."""

    @cached_property
    def first(self) -> Tensor:
        """One item of each SID, in the order of ``catalogue.group``."""
        group = self.catalogue.group
        order = group.argsort(stable=True)
        opens = torch.ones_like(order, dtype=torch.bool)
        opens[1:] = group[order][1:] != group[order][:-1]
        return order[opens]

    def loss(self, states: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor) -> Tensor:
        """Compute the loss; items that share the target's SID are no negatives."""
        if not len(negatives):
            return nnf.cross_entropy(states @ self.vectors(self.first).T, self.catalogue.group[targets].long())
        distinct, inverse = torch.unique(torch.cat([targets, negatives]), return_inverse=True)
        rows = nnf.embedding(inverse, self.vectors(distinct))
        positive_rows, negative_rows = rows.split([len(targets), len(negatives)])
        group = self.catalogue.group
        return sampled_softmax(
            states,
            positive_rows,
            negative_rows,
            log_q[targets],
            log_q[negatives],
            group[targets][:, None] == group[negatives][None, :],
        )

    def scorer(self, states: Tensor) -> Tensor:
        """Return the states unchanged."""
        return states

    def score(self, prepared: Tensor, first: int, last: int) -> Tensor:
        """Return inner products."""
        return prepared @ self.vectors(torch.arange(first, last, device=prepared.device)).T

    def block(self, states: Tensor, first: int, last: int) -> Scores:
        """Return the function as :meth:`ScoredRetriever.block`; the items' vectors are computed once."""
        vectors = self.vectors(torch.arange(first, last, device=states.device))
        return lambda users: states[users] @ vectors.T


class ParallelRetriever(ScoredRetriever):
    """``ParallelRetriever`` has a residual head for each slot and cosine logits; the score of an item is the sum of its
    tokens' log-probabilities (RPG; methods 7.3)."""

    block_items = 1 << 16  # the log-probabilities are computed again for each block

    def __init__(self, settings: config.Retrieval, catalogue: ItemTokens) -> None:
        super().__init__(settings, catalogue)
        self.heads = nn.Parameter(torch.zeros(settings.width, len(catalogue.sizes) * settings.width))

    def _logits(self, states: Tensor) -> list[Tensor]:
        """Return the logits of each slot: [P, width] -> [P, size] each."""
        turned = (states @ self.heads).view(len(states), len(self.catalogue.sizes), -1)
        heads = nnf.normalize(states[:, None] + nnf.silu(turned), dim=2)
        words = nnf.normalize(self.table, dim=1).split(self.catalogue.sizes)
        return [head @ table.T / self.settings.temperature for head, table in zip(heads.unbind(1), words)]

    def loss(self, states: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor) -> Tensor:
        """Compute the weighted mean over slots and targets of the cross-entropy of each token."""
        return token_loss(self._logits(states), self.catalogue, self.omega, targets)

    def scorer(self, states: Tensor) -> Tensor:
        """Return the log-probability of every token [V, B]."""
        return torch.cat([logits.log_softmax(1) for logits in self._logits(states)], dim=1).T.contiguous()

    def score(self, prepared: Tensor, first: int, last: int) -> Tensor:
        """Sum over the items' tokens."""
        return nnf.embedding_bag(self.catalogue.rows[first:last], prepared, mode="sum").T


def build(settings: config.Retrieval, catalogue: ItemTokens) -> Retriever:
    """Build the retriever of ``settings.head``."""
    kinds: dict[str, type[Retriever]] = {
        "item": ItemRetriever,
        "parallel": ParallelRetriever,
        "autoregressive": AutoregressiveRetriever,
    }
    return kinds[settings.head](settings, catalogue)
