"""Retrieve items through their semantic IDs, with one encoder and three heads (methods 7.1 to 7.4).

``item``: an item is the sum of its tokens' embeddings, trained and scored as an item. ``parallel``: all tokens are
predicted at once, an item's score is the sum of their log-probabilities (RPG). ``autoregressive``: tokens are decoded
one after the other along the prefixes of the catalogue (TIGER, REG4Rec), so that every answer is an item."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from adasid import config
from adasid.metrics.retrieval import DEEPEST, target_ranks, tie_order
from adasid.ragged import runs
from adasid.recommenders.encoder import CausalEncoder
from adasid.recommenders.sasrec import sampled_softmax
from adasid.recommenders.tokens import ItemTokens, Prefixes, embedded_ngrams

_CHUNK = 1 << 20
"""Items whose vectors or scores are computed at a time."""
_PARTS = 8
"""Number of parts into which a batch of histories is split by length."""


class Retriever(CausalEncoder, ABC):
    """A retriever has the token table [V, width] and the encoder of histories. ``catalogue``: the tokens of all M
    items."""

    def __init__(self, settings: config.Retrieval, catalogue: ItemTokens) -> None:
        s = self.settings = settings
        super().__init__(s.width, s.blocks, s.heads, s.feedforward, s.max_length, s.dropout)
        self.catalogue = catalogue
        self.omega = catalogue.loss_weights()
        self.table = nn.Parameter(torch.randn(sum(catalogue.sizes), s.width) * 0.02)
        self.ngrams: nn.Parameter | None = None
        if catalogue.ngram_rows:  # zeros, so that an n-gram that training never sees changes nothing
            self.ngrams = nn.Parameter(torch.zeros(catalogue.ngram_rows + 1, s.width))

    @property
    def tables(self) -> list[nn.Parameter]:
        """Return the tables of tokens and n-grams, of which a step uses few rows."""
        return [self.table] if self.ngrams is None else [self.table, self.ngrams]

    def vectors(self, items: Tensor) -> Tensor:
        """Return the sum of the embeddings of tokens and n-grams over sqrt(L), which at the start has the variance of
        one token: item_index [...] -> [..., width]."""
        flat = items.reshape(-1)
        total = nnf.embedding_bag(self.catalogue.rows[flat], self.table, mode="sum")
        if self.ngrams is not None:
            total = total + self._ngrams(flat)
        return total.view(*items.shape, -1) / math.sqrt(len(self.catalogue.sizes))

    def _ngrams(self, items: Tensor) -> Tensor:
        """Return the sum of the embeddings of the n-grams of ``items`` [n] -> [n, width]; in training none for a share
        ``ngram_dropout`` of them."""
        assert self.ngrams is not None
        total = embedded_ngrams(self.catalogue, self.ngrams, items)
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
        vectors, parts = self.vectors(distinct), list[Tensor]()
        longest = torch.stack([part.max() for part in chosen.sum(1).chunk(_PARTS)]).clamp(min=1).tolist()
        for rows, events, length in zip(inverse.chunk(_PARTS), chosen.chunk(_PARTS), longest):
            parts.append(self(nnf.embedding(rows[:, :length], vectors))[events[:, :length]])
        return torch.cat(parts)

    @abstractmethod
    def loss(self, states: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor) -> Tensor:
        """Compute the loss, a scalar. ``states`` [P, width]; ``targets`` [P]: the item that follows each;
        ``negatives`` [N]: item_index drawn from all targets (none: all items); ``log_q`` [M]: log-probability of
        drawing each item."""

    @abstractmethod
    def top(self, states: Tensor, number: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the ``number`` best items of each state [B, width] and their scores, [B, number], best first; -1 and
        -inf if there are fewer. ``seen`` [B, S]: items to exclude, padded with -1."""

    @abstractmethod
    def ranks(self, states: Tensor, targets: Tensor, beam: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the 1-based rank of each row's target [B] among all items except the ``seen`` [B, S] (distinct, padded
        with -1), and among all. The rank is beyond all cut-offs if the target is ``seen`` or missing from the list of a
        head with a ``beam``."""

    def scores_a_user(self, beam: int) -> int:
        """Return the number of scores in memory for one user at a time."""
        return len(self.catalogue.rows)

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Compute once, within the context, what scores of many users need of the items."""
        yield


class _Scored(Retriever):
    """This head can score the whole catalogue."""

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
        parts = [self.score(prepared, first, min(first + _CHUNK, items)) for first in range(0, items, _CHUNK)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def top(self, states: Tensor, number: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Search the whole catalogue exactly, in chunks. Equal scores rank by :attr:`places` (items that share a SID by
        item_index), but which of them the end of the list cuts off is undefined."""
        prepared, items = self.scorer(states), len(self.catalogue.rows)
        best = states.new_full((len(states), number), -torch.inf)
        best_items = torch.full((len(states), number), -1, dtype=torch.int64, device=states.device)
        for first in range(0, items, _CHUNK):
            part = _without(self.score(prepared, first, min(first + _CHUNK, items)), seen, first)
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
        """Compute exact ranks; equal scores rank by :attr:`places`."""
        scores, places = self.scores(states), self.places
        everywhere = target_ranks(scores, targets, places)
        if seen is None:
            return everywhere, everywhere
        target = targets[:, None]
        theirs, score = scores.gather(1, seen.clamp(min=0)), scores.gather(1, target)
        ahead = (seen >= 0) & ((theirs > score) | ((theirs == score) & (places[seen] < places[target])))
        return (everywhere - ahead.sum(1)).masked_fill((seen == target).any(1), _beyond(self.catalogue)), everywhere


def _without(scores: Tensor, seen: Tensor | None, first: int = 0) -> Tensor:
    """Set ``scores`` [B, m] of the items from ``first`` to -inf for items in ``seen`` [B, S], in place."""
    if seen is not None:
        user, column = torch.nonzero((seen >= first) & (seen < first + scores.shape[1]), as_tuple=True)
        scores[user, seen[user, column] - first] = -torch.inf
    return scores


def _beyond(catalogue: ItemTokens) -> int:
    """Return a rank that is beyond every cut-off."""
    return len(catalogue.rows) + DEEPEST + 1


class ItemRetriever(_Scored):
    """The score is state . vector; the loss is the sampled softmax over items with logQ correction (methods 7.3, the
    item head), or the softmax over all SIDs."""

    def __init__(self, settings: config.Retrieval, catalogue: ItemTokens) -> None:
        super().__init__(settings, catalogue)
        order = catalogue.group.argsort(stable=True)
        opens = torch.ones_like(order, dtype=torch.bool)
        opens[1:] = catalogue.group[order][1:] != catalogue.group[order][:-1]
        self.first = order[opens]  # one item of each SID, in the order of catalogue.group
        self._items: Tensor | None = None

    def loss(self, states: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor) -> Tensor:
        """Compute the loss; items that share the target's SID are no negatives."""
        if not len(negatives):
            return nnf.cross_entropy(states @ self.vectors(self.first).T, self.catalogue.group[targets])
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
        if self._items is not None:
            return prepared @ self._items[first:last].T
        return prepared @ self.vectors(torch.arange(first, last, device=prepared.device)).T

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Compute the vectors of all items once, [M, width]."""
        items = torch.arange(len(self.catalogue.rows), device=self.table.device)
        self._items = torch.cat([self.vectors(part) for part in items.split(_CHUNK)])
        try:
            yield
        finally:
            self._items = None


class ParallelRetriever(_Scored):
    """``ParallelRetriever`` has a residual head for each slot and cosine logits; the score of an item is the sum of its
    tokens' log-probabilities (RPG; methods 7.3)."""

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


class AutoregressiveRetriever(Retriever):
    """``AutoregressiveRetriever`` has a causal decoder over slots that starts from the state, with cosine logits, and
    searches along the catalogue's prefixes with a beam."""

    def __init__(self, settings: config.Retrieval, catalogue: ItemTokens) -> None:
        super().__init__(settings, catalogue.behavior_first() if settings.order == "behavior" else catalogue)
        s = settings
        self.decoder = CausalEncoder(s.width, s.decoder_blocks, s.heads, s.feedforward, len(catalogue.sizes), s.dropout)

    @cached_property
    def prefixes(self) -> Prefixes:
        """Return the prefixes of the catalogue, computed on first use."""
        return Prefixes.of(self.catalogue).to(self.catalogue.rows.device)

    @cached_property
    def _columns(self) -> list[Tensor]:
        """Return the random column of each slot's tokens in the search [size]; top-k may break ties by column."""
        random = torch.Generator().manual_seed(0)
        return [torch.randperm(size, generator=random).to(self.table.device) for size in self.catalogue.sizes]

    def _decoded(self, states: Tensor, rows: Tensor) -> Tensor:
        """Return the output of each slot, unit vectors [P, l + 1, width], from ``states`` [P, width] and the rows of
        the previous tokens [P, l]."""
        first = states[:, None] / math.sqrt(states.shape[1])
        out: Tensor = self.decoder(torch.cat([first, nnf.embedding(rows, self.table)], dim=1))
        return nnf.normalize(out, dim=2)

    def _words(self) -> tuple[Tensor, ...]:
        """Return the unit vectors [size, width] of each slot's tokens."""
        words: tuple[Tensor, ...] = nnf.normalize(self.table, dim=1).split(self.catalogue.sizes)
        return words

    def _valid(self, logits: Tensor, level: int, nodes: Tensor) -> Tensor:
        """Return ``logits`` [n, size] of slot ``level``; with ``continuations: valid`` they are -inf for tokens that
        continue no item's prefix ``nodes`` [n]."""
        if self.settings.continuations == "all":
            return logits
        distinct, inverse = torch.unique(nodes, return_inverse=True)
        parent, child = self.prefixes.children(level, distinct)
        shut = torch.ones(len(distinct), logits.shape[1], dtype=torch.bool, device=logits.device)
        shut[parent, self.prefixes.token[level][child].long()] = False
        return logits.masked_fill(shut[inverse], -torch.inf)

    def loss(self, states: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor) -> Tensor:
        """Compute the loss with teacher forcing, the weighted mean over slots and targets of the cross-entropy of each
        token."""
        out = self._decoded(states, self.catalogue.rows[targets][:, :-1]).unbind(1)
        above = nnf.pad(self.prefixes.paths(targets)[:, :-1], (1, 0)).unbind(1)
        logits = [
            self._valid(row @ table.T / self.settings.temperature, level, nodes)
            for level, (row, table, nodes) in enumerate(zip(out, self._words(), above))
        ]
        return token_loss(logits, self.catalogue, self.omega, targets)

    def top(
        self, states: Tensor, number: int, seen: Tensor | None = None, beam: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Search with a beam of ``beam`` prefixes (default: of the settings). Only prefixes of the catalogue are
        expanded, so that every result is an item; items that share a SID are ordered by item_index. The beam is widened
        by the number of ``seen``."""
        prefixes, words, users = self.prefixes, self._words(), len(states)
        beam = (beam or self.settings.beam) + (0 if seen is None else seen.shape[1])
        nodes = torch.zeros(users, 1, dtype=torch.int64, device=states.device)
        value = torch.zeros(users, 1, device=states.device)
        rows = torch.zeros(users, 1, 0, dtype=torch.int64, device=states.device)
        for level, (size, start) in enumerate(zip(self.catalogue.sizes, self.catalogue.starts)):
            alive = torch.nonzero(torch.isfinite(value).reshape(-1)).flatten()
            flat = self._decoded(states[alive // value.shape[1]], rows.reshape(value.numel(), level)[alive])[:, -1]
            ends = nodes.reshape(-1)[alive]
            log_p = self._valid(flat @ words[level].T / self.settings.temperature, level, ends).log_softmax(1)
            parent, child = prefixes.children(level, ends)
            token = prefixes.token[level][child].long()
            # dense columns for (beam, token); -inf where the catalogue has no such prefix
            columns = self._columns[level]
            cell = alive[parent] * size + columns[token]
            dense = value.new_full((value.numel() * size,), -torch.inf)
            dense[cell] = value.reshape(-1)[alive[parent]] + log_p[parent, token]
            node = torch.zeros_like(dense, dtype=torch.int64)
            node[cell] = child
            dense, node = dense.view(users, -1), node.view(users, -1)
            value, chosen = dense.topk(min(beam, dense.shape[1]), dim=1)
            nodes = node.gather(1, chosen)
            before = rows.gather(1, (chosen // size)[:, :, None].expand(-1, -1, level))
            rows = torch.cat([before, (columns.argsort()[chosen % size] + start)[:, :, None]], dim=2)
        return self._expand(nodes, value, number, seen)

    def _expand(self, leaves: Tensor, value: Tensor, number: int, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the first ``number`` items of the leaves [B, beam], in order, that are not ``seen``."""
        users, beam = leaves.shape
        alive = torch.nonzero(torch.isfinite(value).reshape(-1)).flatten()
        where, item = self.prefixes.members(leaves.reshape(-1)[alive])
        source = alive[where]
        user = source // beam
        if seen is not None:
            new = ~self._among(user, item, seen)
            source, user, item = source[new], user[new], item[new]
        rank = runs(torch.bincount(user, minlength=users))[1]  # users are in order
        kept = rank < number
        items = torch.full((users, number), -1, dtype=torch.int64, device=user.device)
        scores = value.new_full((users, number), -torch.inf)
        items[user[kept], rank[kept]] = item[kept]
        scores[user[kept], rank[kept]] = value.reshape(-1)[source[kept]]
        return items, scores

    def _among(self, user: Tensor, items: Tensor, seen: Tensor) -> Tensor:
        """Return whether ``items`` of the rows ``user`` are ``seen`` [B, S]."""
        first = torch.arange(len(seen), device=seen.device)[:, None] * len(self.catalogue.rows)
        return torch.isin(user * len(self.catalogue.rows) + items, torch.where(seen >= 0, seen + first, -1)) & (
            items >= 0
        )

    def ranks(self, states: Tensor, targets: Tensor, beam: int, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rank within the items of the beam; the list is long enough for all items of a SID that begins before the
        deepest cut-off."""
        number = DEEPEST - 1 + int(torch.bincount(self.catalogue.group).max())
        longer = 0 if seen is None else seen.shape[1]
        items, _ = self.top(states, number + longer, beam=beam + longer)
        hit, beyond = items == targets[:, None], _beyond(self.catalogue)
        everywhere = torch.where(hit.any(1), hit.int().argmax(1) + 1, beyond)
        if seen is None:
            return everywhere, everywhere
        left_out = self._among(torch.arange(len(items), device=items.device)[:, None], items, seen)
        ahead = left_out.cumsum(1).gather(1, hit.int().argmax(1)[:, None])[:, 0]
        return torch.where(hit.any(1) & ~(hit & left_out).any(1), everywhere - ahead, beyond), everywhere

    def scores_a_user(self, beam: int) -> int:
        """Count a score for each token after each prefix of the beam."""
        return beam * max(self.catalogue.sizes)


def token_loss(logits: list[Tensor], catalogue: ItemTokens, omega: Tensor, targets: Tensor) -> Tensor:
    """Compute ``- sum_l omega_l log p(c_l) / sum_l omega_l`` over the slots of all targets (methods 7.2). ``logits``:
    [P, size] for each slot; ``omega`` [M, L]."""
    rows, weights = catalogue.rows[targets], omega[targets]
    local = [rows[:, slot] - start for slot, start in enumerate(catalogue.starts)]
    total = torch.stack([nnf.cross_entropy(x, code, reduction="none") for x, code in zip(logits, local)], dim=1)
    return (total * weights).sum() / weights.sum().clamp(min=1e-6)


def build(settings: config.Retrieval, catalogue: ItemTokens) -> Retriever:
    """Build the retriever of ``settings.head``."""
    kinds: dict[str, type[Retriever]] = {
        "item": ItemRetriever,
        "parallel": ParallelRetriever,
        "autoregressive": AutoregressiveRetriever,
    }
    return kinds[settings.head](settings, catalogue)
