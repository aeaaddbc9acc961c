"""The vocabulary of semantic IDs: slots, codes, previous codes and text tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adasid.tables import PAD


class Slot(NamedTuple):
    """A slot is one position of a SID. ``kind``: shared, behavior, or the content modality's name; ``size``: codes in
    its codebook."""

    name: str
    kind: str
    size: int


class Codes(NamedTuple):
    """``Codes`` contains the SIDs of a batch: ``codes`` [B, L] int32 (PAD where the item lacks the slot's modality),
    ``weights`` [B, L] float32, ``active`` [B, L] bool."""

    codes: Tensor
    weights: Tensor
    active: Tensor


class PreviousCodes(NamedTuple):
    """``PreviousCodes`` contains the previous codes of items (negative: none), and the tolerance ``slack`` within which
    :func:`adasid.quantizers.kmeans.previous_or_nearest` preserves them."""

    codes: Tensor
    slack: float

    def of(self, slots: slice | int) -> PreviousCodes:
        """Return the previous codes of some slots; codes are [n, L]."""
        return PreviousCodes(self.codes[:, slots], self.slack)

    def at(self, progress: float) -> PreviousCodes:
        """Return the previous codes with the tolerance at a share ``progress`` of training: nearly unlimited at first,
        ``slack`` at the end."""
        return PreviousCodes(self.codes, self.slack / max(progress, 1e-6))


def slots_of(numbers: Mapping[str, int], size: int, prefixes: Mapping[str, str] | None = None) -> list[Slot]:
    """Return ``numbers[kind]`` slots of each kind, of ``size`` codes each. A slot's name is the prefix of its kind, by
    default that of :func:`letters`, and its number within the kind."""
    prefixes = prefixes or letters(tuple(numbers))
    return [Slot(f"{prefixes[kind]}{i}", kind, size) for kind, number in numbers.items() for i in range(number)]


def letters(kinds: Sequence[str]) -> dict[str, str]:
    """Return short prefixes of slot names: for each kind the shortest unique prefix of its name."""
    return {
        m: next((m[:n] for n in range(1, len(m)) if not any(o != m and o.startswith(m[:n]) for o in kinds)), m)
        for m in kinds
    }


def token(slot: Slot, code: int) -> str:
    """Return the text token of a code in a slot: ``<t0_17>``, or ``<v0_pad>``."""
    return f"<{slot.name}_{'pad' if code == PAD else code}>"


def token_names(slots: Sequence[Slot]) -> NDArray[np.object_]:
    """Return text tokens by slot and code, [L, K + 1], K being the size of the largest codebook; the last column, index
    PAD, is PAD's."""
    names = np.full((len(slots), max(slot.size for slot in slots) + 1), "", dtype=object)
    for index, slot in enumerate(slots):
        names[index, : slot.size] = [token(slot, code) for code in range(slot.size)]
        names[index, PAD] = token(slot, PAD)
    return names
