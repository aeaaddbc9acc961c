"""Count the items of a table of semantic IDs. Counts are additive, so those of a table follow from those of the
previous table and the rows that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adasid.metrics.codes import code_use, group_metrics
from adasid.sid import Slot
from adasid.tables import BEHAVIOR, PAD, STRATA

RARE = [place for place, stratum in enumerate(STRATA) if stratum in ("tail", "cold")]
"""Indices of the strata whose items have few events."""


@dataclass(frozen=True)
class Tally:
    """A tally counts items in L slots of at most K codes and S strata: ``codes`` [L, K] items with each code, ``pad``
    [L] with none; by stratum ``items`` and ``events`` [S], the sum of ``weights`` [S, L], items whose slot is
    ``active`` [S, L], items with 0, 1, ... active behaviour slots, ``slots_on`` [S, B + 1]. ``groups``: size -> number
    of SIDs that so many items share; ``tail_only``: the same of their tail and cold items alone; ``shared``: tail and
    cold items whose SID is not unique."""

    codes: NDArray[np.int64]
    pad: NDArray[np.int64]
    items: NDArray[np.int64]
    events: NDArray[np.int64]
    weights: NDArray[np.float64]
    active: NDArray[np.int64]
    slots_on: NDArray[np.int64]
    groups: Mapping[int, int]
    tail_only: Mapping[int, int]
    shared: int

    @staticmethod
    def none(slots: Sequence[Slot]) -> Tally:
        """Return the tally of no items."""
        length, strata, behavior = len(slots), len(STRATA), sum(slot.kind == BEHAVIOR for slot in slots)
        by_stratum = np.zeros((strata, length), np.int64)
        return Tally(
            codes=np.zeros((length, max(slot.size for slot in slots)), np.int64),
            pad=np.zeros(length, np.int64),
            items=np.zeros(strata, np.int64),
            events=np.zeros(strata, np.int64),
            weights=np.zeros((strata, length)),
            active=by_stratum,
            slots_on=np.zeros((strata, behavior + 1), np.int64),
            groups={},
            tail_only={},
            shared=0,
        )

    @staticmethod
    def of(
        slots: Sequence[Slot],
        codes: NDArray[np.int64],
        weights: NDArray[np.float64],
        active: NDArray[np.bool_],
        strata: NDArray[np.int64],
        events: NDArray[np.int64],
    ) -> Tally:
        """Count items [n] with ``codes``, ``weights`` and ``active`` [n, L], indices ``strata`` [n] in
        ``tables.STRATA`` and training ``events`` [n]. ``groups``, ``tail_only`` and ``shared`` depend on all other
        items and stay empty."""
        tally = Tally.none(slots)
        coded = codes != PAD
        item, slot = np.nonzero(coded)
        behavior = [index for index, slot_ in enumerate(slots) if slot_.kind == BEHAVIOR]
        np.add.at(tally.codes, (slot, codes[item, slot]), 1)
        np.add.at(tally.pad, np.nonzero(~coded)[1], 1)
        np.add.at(tally.items, strata, 1)
        np.add.at(tally.events, strata, events)
        np.add.at(tally.weights, strata, weights)
        np.add.at(tally.active, strata, active.astype(np.int64))
        np.add.at(tally.slots_on, (strata, active[:, behavior].sum(1)), 1)
        return tally

    @staticmethod
    def known(metrics: Mapping[str, Any], slots: Sequence[Slot]) -> Tally:
        """Return the tally from which :meth:`metrics` was computed; sums of weights up to rounding."""
        tally = Tally.none(slots)
        for place, stratum in enumerate(STRATA):
            items = metrics["items_by_stratum"].get(stratum, 0)
            if items:
                tally.items[place], tally.events[place] = items, metrics["events_by_stratum"][stratum]
                tally.weights[place] = items * np.array(metrics["weights_by_stratum"][stratum])
                tally.active[place] = np.rint(items * np.array(metrics["active_by_stratum"][stratum]))
                tally.slots_on[place] = np.rint(items * np.array(metrics["active_count_by_stratum"][stratum]))
        pad = np.rint(metrics["items"] * np.array(metrics["pad"])).astype(np.int64)
        shared = round((metrics["collision_tail"] or 0) * int(tally.items[RARE].sum()))
        groups, tail_only = (
            {size: number for size, number in metrics[name]} for name in ("group_sizes", "tail_group_sizes")
        )
        return replace(
            tally,
            codes=np.array(metrics["codes"], np.int64),
            pad=pad,
            groups=groups,
            tail_only=tail_only,
            shared=shared,
        )

    def changed(
        self, before: Tally, after: Tally, groups: Mapping[int, int], tail_only: Mapping[int, int], shared: int
    ) -> Tally:
        """Return the tally with the rows ``before`` replaced by ``after``, and the new ``groups``, ``tail_only`` and
        ``shared``."""
        names = ("codes", "pad", "items", "events", "weights", "active", "slots_on")
        sums = {name: getattr(self, name) - getattr(before, name) + getattr(after, name) for name in names}
        return Tally(**sums, groups=groups, tail_only=tail_only, shared=shared)

    def sound(self) -> bool:
        """Return whether no count is negative."""
        counts = (self.codes, self.pad, self.items, self.events, self.active, self.slots_on)
        return min([self.shared, *self.groups.values(), *self.tail_only.values()]) >= 0 and all(
            (part >= 0).all() for part in counts
        )

    def metrics(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """Compute code metrics (methods 8.2 to 8.5) and router figures by stratum, as JSON data."""
        sizes = sorted(size for size, number in self.groups.items() if number)
        collisions = group_metrics(np.array(sizes, np.int64), np.array([self.groups[size] for size in sizes], np.int64))
        use = [code_use(row[: slot.size]) for row, slot in zip(self.codes, slots)]
        present = [(index, stratum) for index, stratum in enumerate(STRATA) if self.items[index]]
        shares = {
            "weights_by_stratum": self.weights,
            "active_by_stratum": self.active,
            "active_count_by_stratum": self.slots_on,
        }
        return {
            "slots": [slot.name for slot in slots],
            "codebook_size": slots[0].size,
            "codes": self.codes.tolist(),
            "pad": (self.pad / max(1, collisions["items"])).tolist(),
            **{name: [getattr(u, name) for u in use] for name in ("entropy", "utilisation", "perplexity", "top1")},
            **collisions,
            "group_sizes": [[size, self.groups[size]] for size in sizes],
            "tail_group_sizes": [[size, self.tail_only[size]] for size in sorted(self.tail_only)],
            "largest_tail_group": max(self.tail_only, default=0),
            "collision_tail": self.shared / tail if (tail := int(self.items[RARE].sum())) else None,
            "items_by_stratum": {stratum: int(self.items[index]) for index, stratum in present},
            "events_by_stratum": {stratum: int(self.events[index]) for index, stratum in present},
            **{
                name: {stratum: (sums[index] / self.items[index]).tolist() for index, stratum in present}
                for name, sums in shares.items()
            },
        }
