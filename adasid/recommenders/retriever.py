"""Retrieve items through their semantic IDs, with one encoder and three heads (methods 7.1 to 7.4).

``item``: an item is the sum of its tokens' embeddings, trained and scored as an item. ``parallel``: all tokens are
predicted at once, an item's score is the sum of their log-probabilities (RPG). ``autoregressive``: tokens are decoded
one after the other along the prefixes of the catalogue (TIGER, REG4Rec), so that every answer is an item."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from adasid import config
from adasid.metrics.blocks import ITEMS, Scores, blocked_ranks
from adasid.metrics.retrieval import DEEPEST, tie_order
from adasid.recommenders.encoder import CausalEncoder
from adasid.recommenders.tokens import ItemTokens, embedded_ngrams

CHUNK = 1 << 20
"""Items whose vectors or scores are computed at a time."""
SPARSE_FROM = 1 << 16
"""Rows from which on the gradient of a table has only the rows of the batch, which are sorted at each step."""
RANKED = 1 << 14
"""Users that are ranked at a time: the vectors of all items are computed again for the next."""
_PARTS, _PART = 8, 1024
"""Number of parts into which a batch of histories is split by length; on a GPU, each has at least so many histories."""


class Retriever(CausalEncoder, ABC):
    """A retriever has the token table [V, width] and the encoder of histories. ``catalogue``: the tokens of all M
    items."""

    def __init__(self, settings: config.Retrieval, catalogue: ItemTokens) -> None:
        s = self.settings = settings
        super().__init__(s.width, s.blocks, s.heads, s.feedforward, s.max_length, s.dropout)
        self.catalogue = catalogue
        self.table = nn.Parameter(torch.randn(sum(catalogue.sizes), s.width) * 0.02)
        self.ngrams: nn.Parameter | None = None
        if catalogue.ngram_rows:  # zeros: a row that training never uses changes nothing
            self.ngrams = nn.Parameter(torch.zeros(catalogue.ngram_rows + 1, s.width))

    @cached_property
    def omega(self) -> Tensor:
        """Weights of the tokens in the loss of a head that predicts tokens [M, L]."""
        return self.catalogue.loss_weights()

    @property
    def tables(self) -> list[nn.Parameter]:
        """Return the tables of tokens and n-grams, of which a step uses few rows."""
        return [self.table] if self.ngrams is None else [self.table, self.ngrams]

    def vectors(self, items: Tensor) -> Tensor:
        """Return the sum of the embeddings of tokens and n-grams over sqrt(L), which at the start has the variance of
        one token: item_index [...] -> [..., width]."""
        flat = items.reshape(-1)
        total = nnf.embedding_bag(self.catalogue.rows[flat].long(), self.table, mode="sum", sparse=_large(self.table))
        if self.ngrams is not None:
            total = total + self._ngrams(flat)
        return total.view(*items.shape, -1) / math.sqrt(len(self.catalogue.sizes))

    def _ngrams(self, items: Tensor) -> Tensor:
        """Return the sum of the embeddings of the n-grams of ``items`` [n] -> [n, width]; in training none for a share
        ``ngram_dropout`` of them."""
        assert self.ngrams is not None
        total = embedded_ngrams(self.catalogue, self.ngrams, items, _large(self.ngrams))
        share = self.settings.ngram_dropout
        if not self.training or not share:
            return total
        return total * (torch.rand(len(items), 1, device=items.device) >= share)

    def states(self, histories: Tensor) -> Tensor:
        """Return the state after each event of ``histories`` [B, T], padded at the end with -1 -> [B, T, width]. Each
        distinct item is embedded once."""
        distinct, inverse = torch.unique(histories.clamp(min=0), return_inverse=True)
        rows: Tensor = self(nnf.embedding(inverse, self.vectors(distinct)))
        return rows

    def outputs(self, histories: Tensor, chosen: Tensor) -> Tensor:
        """Return the states after the ``chosen`` [B, T] events of ``histories`` [B, T], the first ones of each row, row
        by row -> [P, width]. Rows with similar numbers of them should be adjacent: they are processed in parts, each as
        long as its longest row."""
        distinct, inverse = torch.unique(histories.clamp(min=0), return_inverse=True)
        vectors, parts, number = self.vectors(distinct), list[Tensor](), _PARTS
        if histories.is_cuda:  # a kernel costs as much for few rows as for many
            number = max(1, min(_PARTS, len(histories) // _PART))
        longest = torch.stack([part.max() for part in chosen.sum(1).chunk(number)]).clamp(min=1).tolist()
        for rows, events, length in zip(inverse.chunk(number), chosen.chunk(number), longest):
            parts.append(self(nnf.embedding(rows[:, :length], vectors))[events[:, :length]])
        return torch.cat(parts)

    @abstractmethod
    def loss(self, states: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor) -> Tensor:
        """Compute the loss, a scalar. ``states`` [P, width]; ``targets`` [P]: the item that follows each;
        ``negatives`` [N]: item_index drawn from all targets (none: all items); ``log_q`` [M]: log-probability of
        drawing each item, which the item head reads where there are negatives."""

    @abstractmethod
    def top(self, states: Tensor, number: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the ``number`` best items of each state [B, width] and their scores, [B, number], best first; -1 and
        -inf if there are fewer. ``seen`` [B, S]: items to exclude, padded with -1."""

    @abstractmethod
    def ranks(self, states: Tensor, targets: Tensor, beam: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the 1-based rank of each row's target [B] among all items except the ``seen`` [B, S] (distinct, padded
        with -1), and among all. The rank is beyond all cut-offs if the target is ``seen`` or missing from the list of a
        head with a ``beam``."""

    def users_at_once(self, beam: int) -> int:
        """Return the number of users for which :meth:`ranks` should be called at a time."""
        return RANKED


class ScoredRetriever(Retriever):
    """This head can score the whole catalogue. ``block_items``: items of a block of scores on a CPU."""

    block_items = ITEMS

    @abstractmethod
    def scorer(self, states: Tensor) -> Tensor:
        """Transform ``states`` [B, width] to the input of :meth:`score`."""

    @abstractmethod
    def score(self, prepared: Tensor, first: int, last: int) -> Tensor:
        """Return scores [B, last - first] of the items first to last - 1."""

    @cached_property
    def places(self) -> Tensor:
        """Rank of each item among items of equal scores [M]."""
        return tie_order(self.catalogue.group)

    def scores(self, states: Tensor) -> Tensor:
        """Return the scores of all items: [B, width] -> [B, M]."""
        prepared, items = self.scorer(states), len(self.catalogue.rows)
        parts = [self.score(prepared, first, min(first + CHUNK, items)) for first in range(0, items, CHUNK)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def top(self, states: Tensor, number: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Search the whole catalogue exactly, in chunks. Equal scores rank by :attr:`places` (items that share a SID by
        item_index), but which of them the end of the list cuts off is undefined."""
        prepared, items = self.scorer(states), len(self.catalogue.rows)
        best = states.new_full((len(states), number), -torch.inf)
        best_items = torch.full((len(states), number), -1, dtype=torch.int64, device=states.device)
        for first in range(0, items, CHUNK):
            part = _without(self.score(prepared, first, min(first + CHUNK, items)), seen, first)
            value, index = part.topk(min(number, part.shape[1]), dim=1)
            together, ids = torch.cat([best, value], dim=1), torch.cat([best_items, index + first], dim=1)
            order = self.places[ids].argsort(dim=1, stable=True)
            together, ids = together.gather(1, order), ids.gather(1, order)
            order = together.argsort(dim=1, descending=True, stable=True)[:, :number]
            best, best_items = together.gather(1, order), ids.gather(1, order)
        return best_items.masked_fill(best.isneginf(), -1), best

    def ranks(
        self, states: Tensor, targets: Tensor, beam: int = 0, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute exact ranks, in blocks of users and items; equal scores rank by :attr:`places`."""
        items = len(self.catalogue.rows)
        ranks, everywhere = blocked_ranks(
            lambda first, last: self.block(states, first, last),
            targets,
            items,
            lambda: self.places,
            seen,
            size=self.block_items,
        )
        if seen is None:
            return everywhere, everywhere
        return ranks.masked_fill((seen == targets[:, None]).any(1), unranked(self.catalogue)), everywhere

    def block(self, states: Tensor, first: int, last: int) -> Scores:
        """Return the function from users [b], rows of ``states``, to their scores [b, last - first] of the items first
        to last - 1."""
        return lambda users: self.score(self.scorer(states[users]), first, last)


def _large(table: Tensor) -> bool:
    return len(table) >= SPARSE_FROM


def _without(scores: Tensor, seen: Tensor | None, first: int = 0) -> Tensor:
    """Set ``scores`` [B, m] of the items from ``first`` to -inf for items in ``seen`` [B, S], in place."""
    if seen is not None:
        user, column = torch.nonzero((seen >= first) & (seen < first + scores.shape[1]), as_tuple=True)
        scores[user, seen[user, column] - first] = -torch.inf
    return scores


def unranked(catalogue: ItemTokens) -> int:
    """Return a rank that is beyond every cut-off."""
    return len(catalogue.rows) + DEEPEST + 1


def token_loss(logits: list[Tensor], catalogue: ItemTokens, omega: Tensor, targets: Tensor) -> Tensor:
    """Compute ``- sum_l omega_l log p(c_l) / sum_l omega_l`` over the slots of all targets (methods 7.2). ``logits``:
    [P, size] for each slot; ``omega`` [M, L]."""
    rows, weights = catalogue.rows[targets].long(), omega[targets]
    local = [rows[:, slot] - start for slot, start in enumerate(catalogue.starts)]
    total = torch.stack([nnf.cross_entropy(x, code, reduction="none") for x, code in zip(logits, local)], dim=1)
    return (total * weights).sum() / weights.sum().clamp(min=1e-6)
