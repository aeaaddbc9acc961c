"""Combine the codes of several slots to n-grams, which are further tokens of an item (methods 7.7).

An n-gram says what codes mean only together. Its row in the table is a hash that every language can compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from adasid.errors import InputError
from adasid.settings import NGrams
from adasid.sid import Slot
from adasid.tables import PAD
from adasid.tokenizers.settings import SHARED

_OFFSET, _PRIME = 0xCBF29CE484222325 - 2**64, 0x100000001B3
"""Offset basis, as int64, and prime of FNV-1a with 64 bits."""
CHUNK = 1 << 18
"""Items whose codes and n-grams are computed at a time."""
_COUNTED = 1 << 20
"""N-grams are counted in parts of about so many items, whose sort takes 64 bytes each."""
_LONGEST_PREFIX = 4
_MOST_PAIRED = 4
"""Largest group of parallel slots of which all pairs are n-grams; in a larger one, each slot is in a pair with a
neighbour."""


def choose(ngrams: NGrams, slots: Sequence[Slot], parallel: bool) -> tuple[tuple[int, ...], ...]:
    """Return the indices of the slots of each n-gram. ``parallel``: whether slots of one kind are independent of each
    other, else each quantizes the residual of the one before.

    ``auto``: by kind of slot the prefixes of up to 4 residual slots, beginning with the first shared slot where there
    are shared slots, or the pairs of parallel slots; and a pair of the first slots of neighbouring kinds. Raises
    InputError for a name that is no slot."""
    if ngrams == "none":
        return ()
    if ngrams != "auto":
        index = {slot.name: position for position, slot in enumerate(slots)}
        for name in {name for ngram in ngrams for name in ngram} - set(index):
            raise InputError(f"ngrams: {name!r} is no slot of the tokenizer: name some of {', '.join(index)}")
        return tuple(tuple(sorted(index[name] for name in ngram)) for ngram in ngrams)
    groups = {
        kind: [index for index, slot in enumerate(slots) if slot.kind == kind]
        for kind in dict.fromkeys(slot.kind for slot in slots)
    }
    shared = [] if parallel or len(groups) == 1 else groups.pop(SHARED, [])
    paths = [shared, *(shared[:1] + group for group in groups.values())]
    chosen = [ngram for path in paths for ngram in (_pairs(path) if parallel else _prefixes(path))]
    modalities = list(groups.values())
    return (*chosen, *((one[0], other[0]) for one, other in zip(modalities, modalities[1:])))


def _prefixes(group: list[int]) -> list[tuple[int, ...]]:
    return [tuple(group[:length]) for length in range(2, min(len(group), _LONGEST_PREFIX) + 1)]


def _pairs(group: list[int]) -> list[tuple[int, ...]]:
    if len(group) <= _MOST_PAIRED:
        return list(combinations(group, 2))
    return list(dict.fromkeys([*zip(group[::2], group[1::2]), (group[-2], group[-1])]))


def hashed(codes: Tensor, ngrams: Sequence[Sequence[int]], rows: int, pad_lacks: bool = True) -> Tensor:
    """Return the row of each n-gram in a table of ``rows`` rows: ``codes`` [M, L] -> [M, G] int32; ``rows`` itself
    where a code is PAD, so that such an item lacks the n-gram. Without ``pad_lacks`` PAD is hashed as a code is.

    The hash is FNV-1a with 64 bits (Fowler, Noll and Vo; IETF draft-eastlake-fnv) of the pairs of slot index and code,
    each as 4 bytes, least significant first; its halves are combined by exclusive or, then taken modulo ``rows``."""
    table = torch.empty(len(codes), len(ngrams), dtype=torch.int32, device=codes.device)
    for column, ngram in enumerate(ngrams):
        for part, out in zip(codes.split(CHUNK), table.split(CHUNK)):
            number = _fnv_1a(part, ngram)
            folded = ((number >> 32) ^ number) & 0xFFFFFFFF
            lacking = (part[:, list(ngram)] == PAD).any(1) & pad_lacks
            out[:, column] = torch.where(lacking, rows, folded % rows)
    return table


def rare(codes: Tensor, ngram: Sequence[int], trained: Tensor, min_items: int) -> Tensor:
    """Return of which items fewer than ``min_items`` of the ``trained`` [M] items have the same n-gram of the slots
    ``ngram``, [M] bool. An n-gram of one item would stand for that item as an item id does. ``codes`` [M, L]: integers
    that tell the codes of a slot from each other."""
    mask = torch.empty(len(codes), dtype=torch.bool, device=codes.device)
    numbers = torch.empty(len(codes), dtype=torch.int64, device=codes.device)
    for chunk, out in zip(codes.split(CHUNK), numbers.split(CHUNK)):
        out[:] = _fnv_1a(chunk, ngram)
    parts = 1 << (-(-len(codes) // _COUNTED) - 1).bit_length()  # a power of two: equal numbers are in one part
    for part in range(parts):
        found = [torch.nonzero((chunk & (parts - 1)) == part).flatten() for chunk in numbers.split(CHUNK)]
        index = torch.cat([places + number * CHUNK for number, places in enumerate(found)])
        distinct, key = torch.unique(numbers[index], return_inverse=True)
        items = torch.zeros(len(distinct), dtype=torch.int64, device=codes.device)
        items.index_add_(0, key, trained[index].long())
        mask[index] = items[key] < min_items
    return mask


def _fnv_1a(codes: Tensor, ngram: Sequence[int]) -> Tensor:
    """Return the hash of the slots ``ngram`` of ``codes`` [n, L] as int64 [n]."""
    number = torch.full_like(codes[:, 0], _OFFSET, dtype=torch.int64)
    for slot in ngram:
        for value in (torch.full_like(number, slot), codes[:, slot].long()):
            for shift in (0, 8, 16, 24):
                number = (number ^ ((value >> shift) & 0xFF)) * _PRIME
    return number


def hashed_index(index: Tensor, rows: int) -> Tensor:
    """Return a row of ``rows`` for each index [n] int64 -> [n] int64: FNV-1a with 64 bits of its 8 bytes, least
    significant first, folded as in :func:`hashed`."""
    number = torch.full_like(index, _OFFSET)
    for shift in range(0, 64, 8):
        number = (number ^ ((index >> shift) & 0xFF)) * _PRIME
    return (((number >> 32) ^ number) & 0xFFFFFFFF) % rows
