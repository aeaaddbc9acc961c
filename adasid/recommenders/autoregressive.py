"""Decode semantic IDs token by token along the prefixes of the catalogue (TIGER, REG4Rec; methods 7.3 and 7.4)."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as nnf
from torch import Tensor

from adasid import config
from adasid.metrics.retrieval import DEEPEST
from adasid.ragged import runs
from adasid.recommenders.encoder import CausalEncoder
from adasid.recommenders.retriever import Retriever, token_loss, unranked
from adasid.recommenders.tokens import ItemTokens, Prefixes

_SCORES = 1 << 26


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
    def _largest(self) -> int:
        """Return the number of items of the most common SID."""
        return int(torch.bincount(self.catalogue.group).max())

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
        out = self._decoded(states, self.catalogue.rows[targets][:, :-1].long()).unbind(1)
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
        number = DEEPEST - 1 + self._largest
        longer = 0 if seen is None else seen.shape[1]
        items, _ = self.top(states, number + longer, beam=beam + longer)
        hit, beyond = items == targets[:, None], unranked(self.catalogue)
        everywhere = torch.where(hit.any(1), hit.int().argmax(1) + 1, beyond)
        if seen is None:
            return everywhere, everywhere
        left_out = self._among(torch.arange(len(items), device=items.device)[:, None], items, seen)
        ahead = left_out.cumsum(1).gather(1, hit.int().argmax(1)[:, None])[:, 0]
        return torch.where(hit.any(1) & ~(hit & left_out).any(1), everywhere - ahead, beyond), everywhere

    def users_at_once(self, beam: int) -> int:
        """Return a number of users whose scores, one for each token after each prefix of the beam, are at most 64
        million."""
        return max(1, min(256, _SCORES // (beam * max(self.catalogue.sizes))))
