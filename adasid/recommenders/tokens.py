"""Store a catalogue's semantic IDs as rows of one token table, and as prefixes for decoding. There are only arrays, no
object per item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from adasid.errors import InputError
from adasid.ragged import runs
from adasid.recommenders.ngrams import CHUNK, hashed, rare
from adasid.sid import Slot
from adasid.tables import BEHAVIOR, PAD

_CLIP = 3.0
"""Largest loss weight of a token (methods 7.2)."""


@dataclass(frozen=True)
class ItemTokens:
    """``ItemTokens`` contains the tokens of a catalogue: ``rows`` [M, L] integer: row of an item's token in the table
    of all slots, where slot l has its codes and then PAD; ``sizes`` [L]: rows of each slot; ``weights`` [M, L]: the
    tokenizer's weight of each token; ``behavior``: the behaviour slots; ``group`` [M] int32: index of the item's SID
    among the distinct ones; ``ngrams`` [M, G] int32: row of each n-gram in a table of ``ngram_rows`` rows, that number
    where the item lacks it."""

    rows: Tensor
    sizes: tuple[int, ...]
    weights: Tensor
    behavior: tuple[int, ...]
    group: Tensor
    ngrams: Tensor
    ngram_rows: int = 0

    @staticmethod
    def of(codes: NDArray[np.int32], slots: Sequence[Slot], weights: NDArray[np.float32] | None = None) -> ItemTokens:
        """Build tokens from ``codes`` [M, L], PAD where a slot has none; ``weights`` [M, L], default 1. Raises
        InputError if they do not fit the slots."""
        if codes.shape[1] != len(slots):
            raise InputError(
                f"the SIDs have {codes.shape[1]} codes but the tokenizer has {len(slots)} slots: write them with this "
                "tokenizer"
            )
        sizes = tuple(slot.size + 1 for slot in slots)
        rows: NDArray[np.integer] = codes.astype(np.int32 if sum(sizes) < 2**31 else np.int64)
        for slot, (size, start) in enumerate(zip(sizes, _starts(sizes))):
            low, high = codes[:, slot].min(initial=PAD), codes[:, slot].max(initial=PAD)
            if low < PAD or high >= size - 1:
                raise InputError(
                    f"the SIDs have code {low if low < PAD else high} in slot {slots[slot].name} but the tokenizer has "
                    f"{size - 1} codes there: write them with this tokenizer"
                )
            rows[codes[:, slot] == PAD, slot] = size - 1
            rows[:, slot] += start
        group = _groups(codes, sizes)
        given = torch.ones(1, 1).expand(codes.shape) if weights is None else torch.from_numpy(weights)
        behavior = tuple(index for index, slot in enumerate(slots) if slot.kind == BEHAVIOR)
        return ItemTokens(
            torch.from_numpy(rows),
            sizes,
            given,
            behavior,
            torch.from_numpy(group),
            _no_ngrams(len(rows)),
        )

    @staticmethod
    def ids(items: int) -> ItemTokens:
        """Return one token per item: the control without semantic IDs."""
        index = torch.arange(items, dtype=torch.int32)
        return ItemTokens(index[:, None], (items,), torch.ones(1, 1).expand(items, 1), (), index, _no_ngrams(items))

    def with_ngrams(
        self, ngrams: Sequence[Sequence[int]], rows: int, trained: Tensor | None = None, min_items: int = 1
    ) -> ItemTokens:
        """Return the same tokens with the n-grams of the slots ``ngrams`` (:func:`adasid.recommenders.ngrams.choose`),
        hashed into ``rows`` rows. With ``trained`` [M], which items have training events, an item lacks the n-grams
        that fewer than ``min_items`` of these have."""
        table = torch.empty(len(self.rows), len(ngrams), dtype=torch.int32, device=self.rows.device)
        for part, out in zip(self.rows.split(CHUNK), table.split(CHUNK)):
            out[:] = hashed(self._codes(part), ngrams, rows)
        for column, ngram in enumerate(ngrams if trained is not None else ()):
            assert trained is not None
            table[:, column].masked_fill_(rare(self.rows, ngram, trained, min_items), rows)
        return replace(self, ngrams=table, ngram_rows=rows if ngrams else 0)

    @property
    def codes(self) -> Tensor:
        """Return the codes, PAD where a slot has none [M, L] int32."""
        return self._codes(self.rows)

    def _codes(self, rows: Tensor) -> Tensor:
        codes = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
        for slot, (size, start) in enumerate(zip(self.sizes, self.starts)):
            codes[:, slot] = rows[:, slot] - start
            codes[:, slot].masked_fill_(codes[:, slot] == size - 1, PAD)
        return codes

    def loss_weights(self) -> Tensor:
        """Return the weight of each token in a loss [M, L]: for a behaviour token its weight, scaled to mean 1 over
        the catalogue and clipped to 3, so that items of little richness are damped; 1 for all others and PAD
        (methods 7.2)."""
        loss, slots = torch.ones_like(self.weights), list(self.behavior)
        if slots:
            last = (
                torch.tensor(self.starts, device=self.rows.device)[slots]
                + torch.tensor(self.sizes, device=self.rows.device)[slots]
                - 1
            )
            weights, mask = self.weights[:, slots], self.rows[:, slots] != last
            mean = weights[mask].mean().clamp(min=1e-6) if mask.any() else weights.new_ones(())
            loss[:, slots] = torch.where(mask, (weights / mean).clamp(0, _CLIP), 1.0)
        return loss

    def to(self, device: torch.device | str) -> ItemTokens:
        """Return the same tokens on another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("rows", "weights", "group", "ngrams")}
        return replace(self, **tensors)

    def behavior_first(self) -> ItemTokens:
        """Return the same tokens with the behaviour slots before all others; their rows in the table move with them."""
        order = sorted(range(len(self.sizes)), key=lambda slot: slot not in self.behavior)
        sizes = tuple(self.sizes[slot] for slot in order)
        moved = (torch.tensor(_starts(sizes)) - torch.tensor(self.starts)[order]).to(self.rows.dtype)
        rows = self.rows[:, order] + moved.to(self.rows.device)
        return replace(
            self, rows=rows, sizes=sizes, weights=self.weights[:, order], behavior=tuple(range(len(self.behavior)))
        )

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the first row of each slot."""
        return _starts(self.sizes)


def _first(above: NDArray[np.int64], below: NDArray[np.int64]) -> Tensor:
    """Return the first node of a level, which open at the positions ``below``, of each node above, and their
    number."""
    return torch.from_numpy(np.append(np.searchsorted(below, above), len(below)))


def _groups(codes: NDArray[np.int32], sizes: Sequence[int]) -> NDArray[np.int32]:
    """Return the index of each row of ``codes`` [M, L] among the distinct rows in lexicographic order [M]. The codes of
    a row are the digits of one integer, replaced by its rank where the next digit would not fit."""
    number, largest = np.zeros(len(codes), np.int64), 1
    for slot, size in enumerate(sizes):
        if largest > np.iinfo(np.int64).max // size:
            number = np.unique(number, return_inverse=True)[1]
            largest = len(codes)
        number *= size
        number += codes[:, slot]
        number += 1  # PAD is -1, the lowest
        largest *= size
    order = number.argsort()
    number = number[order]
    opens = np.zeros(len(codes), bool)
    opens[1:] = number[1:] != number[:-1]
    del number
    group = np.empty(len(codes), np.int32)
    group[order] = np.cumsum(opens, dtype=np.int32)
    return group


def _no_ngrams(items: int) -> Tensor:
    return torch.zeros(items, 0, dtype=torch.int32)


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist())


def embedded_ngrams(catalogue: ItemTokens, table: Tensor, items: Tensor, sparse: bool = False) -> Tensor:
    """Return the sum of the embeddings of the n-grams of ``items`` [n] in ``table`` [ngram_rows + 1, width] -> [n,
    width]; the last row is never used. ``sparse``: the table's gradient has only the rows that were used."""
    rows = catalogue.ngrams[items]
    return nnf.embedding_bag(rows, table, mode="sum", sparse=sparse, padding_idx=catalogue.ngram_rows)


@dataclass(frozen=True)
class Prefixes:
    """``Prefixes`` is a trie of the catalogue's SIDs, in arrays. Level l has a node for each distinct prefix of l + 1
    tokens, in lexicographic order.

    ``token[l]`` [n_l]: token of a node's last slot, 0 to sizes[l] - 1; ``first[l]`` [n_l + 1]: first child of each node
    on level l + 1, and on the last level the first position of its items in ``items`` [M] (item_index, lowest first
    within a SID)."""

    token: tuple[Tensor, ...]
    first: tuple[Tensor, ...]
    items: Tensor

    @staticmethod
    def of(tokens: ItemTokens) -> Prefixes:
        """Build the trie from all items' tokens."""
        local = tokens.rows - torch.tensor(tokens.starts, device=tokens.rows.device)
        return Prefixes._built(local.cpu().numpy().astype(np.int32))

    @staticmethod
    def of_codes(codes: NDArray[np.int32], slots: Sequence[Slot]) -> Prefixes:
        """Build the trie from all items' ``codes`` [M, L], PAD where a slot has none, with little more memory than it
        takes itself."""
        return Prefixes._built(np.where(codes == PAD, np.array([slot.size for slot in slots], np.int32), codes))

    @staticmethod
    def _built(local: NDArray[np.int32]) -> Prefixes:
        """Build the trie from tokens [M, L]: one lexicographic sort, then comparisons of neighbours, a slot at a
        time."""
        order = np.lexsort(local.T[::-1])  # stable: the lowest item_index first
        opens = np.zeros(len(local), bool)
        opens[:1] = True
        token, first, above = [], [], None
        for slot in range(local.shape[1]):
            column = local[order, slot]
            opens[1:] |= column[1:] != column[:-1]
            places = np.flatnonzero(opens)
            token.append(torch.from_numpy(column[places]))
            if above is not None:
                first.append(_first(above, places))
            above = places
        if above is not None:
            first.append(torch.from_numpy(np.append(above, len(local))))
        return Prefixes(tuple(token), tuple(first), torch.from_numpy(order.astype(np.int64)))

    def to(self, device: torch.device | str) -> Prefixes:
        """Return the same trie on another device."""
        return Prefixes(
            tuple(t.to(device) for t in self.token), tuple(f.to(device) for f in self.first), self.items.to(device)
        )

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the children on ``level`` of ``nodes`` [n] of the level above (of the root, for level 0): the position
        in ``nodes`` of each child's parent and the child's node, both [children]."""
        if level == 0:
            children = torch.arange(len(self.token[0]), device=nodes.device)
            return torch.arange(len(nodes), device=nodes.device).repeat_interleave(len(children)), children.repeat(
                len(nodes)
            )
        return self._spans(self.first[level - 1], nodes)

    def paths(self, items: Tensor) -> Tensor:
        """Return the node of ``items`` [n] on each level [n, L]."""
        levels = [self._place[items]]
        for first in reversed(self.first):
            levels.append(torch.searchsorted(first, levels[-1], right=True) - 1)
        return torch.stack(levels[:0:-1], dim=1)

    @cached_property
    def _place(self) -> Tensor:
        """Return the position of each item in ``items`` [M]."""
        return self.items.argsort()

    def members(self, leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Return the items of ``leaves`` [n]: the position in ``leaves`` and the item_index of each, both [items]."""
        where, offset = self._spans(self.first[-1], leaves)
        return where, self.items[offset]

    @staticmethod
    def _spans(first: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        begin, count = first[nodes], first[nodes + 1] - first[nodes]
        where, offset = runs(count)
        return where, begin[where] + offset
