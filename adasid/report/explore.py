"""Build the page that shows single items and codes: choose its items, compute what it says of them, and render it as
one self-contained HTML file.

All functions take arrays. Nothing but :func:`choose` and :func:`sizes` reads values of the whole catalogue."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix

from adasid.data.text import spaced
from adasid.metrics.neighbours import nearest, unit
from adasid.sid import Slot
from adasid.tables import PAD, STRATA

if TYPE_CHECKING:
    from PIL.Image import Image

NEIGHBOURS = 10
"""Neighbours of an item by modality."""
TYPICAL = 12
"""Largest number of typical words of a code."""
PRIOR = 500.0
"""Weight of the prior of :func:`log_odds`, in words."""
CERTAIN = 1.96
"""Smallest z-score of a typical word."""
NEXT = 5
"""Codes that :func:`transitions` lists after a code."""
TITLE = 120
"""Characters of a title that the page shows."""
_EDGE = 32_000
"""Largest absolute coordinate on the map."""


class Next(NamedTuple):
    """The code of an event that follows one of another code: ``events`` such pairs, and ``lift``: their share among the
    pairs of that code, over the share of ``code`` among all pairs."""

    code: int
    events: int
    lift: float


@dataclass(frozen=True)
class Items:
    """The items of the page, in the order of item_index, [n] each. ``strata``: places in ``STRATA``; ``codes``,
    ``weights`` and ``active`` [n, L] are those of the table ``sids``; ``vectors``: modality -> [n, D] float32, a row of
    zeros where an item lacks it."""

    ids: Sequence[str]
    titles: Sequence[str | None]
    interactions: NDArray[np.int64]
    strata: NDArray[np.int8]
    codes: NDArray[np.integer]
    weights: NDArray[np.float32]
    active: NDArray[np.bool_]
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def choose(strata: NDArray[np.int8], items: int, popular: bool = False) -> NDArray[np.int64]:
    """Return the item_index of at most ``items`` items, ascending: of each stratum an equal share, or all of it where
    it has fewer, evenly spaced, or the first, which are the most ``popular``. ``strata`` [n]: place in ``STRATA`` of
    each item, by item_index."""
    parts = sorted((np.flatnonzero(strata == place) for place in range(len(STRATA))), key=len)
    chosen, left = list[NDArray[np.int64]](), items
    for place, part in enumerate(parts):
        take = min(len(part), left // (len(parts) - place))
        chosen.append(part[:take] if popular else part[np.linspace(0, len(part) - 1, take).round().astype(np.int64)])
        left -= take
    return np.sort(np.concatenate(chosen))


def sizes(codes: NDArray[np.integer], strata: NDArray[np.int8], slot: Slot) -> NDArray[np.int64]:
    """Count the items of a catalogue by code of a slot and stratum, [K, strata]. ``codes`` [items]: PAD is not
    counted."""
    there, width = codes != PAD, len(STRATA)
    keys = codes[there].astype(np.int64) * width + strata[there]
    return np.bincount(keys, minlength=slot.size * width).reshape(slot.size, width)


def log_odds(counts: csr_matrix, prior: float = PRIOR) -> csr_matrix:
    """Return the z-scores of the log-odds ratios with an informative Dirichlet prior of the words of each group against
    all other groups (Monroe, Colaresi and Quinn 2008, "Fightin' Words"), [groups, words] as ``counts``; words that a
    group lacks have no entry.

    With y of n words in the group, y' of n' in the others and the prior a, the word's share of all words times
    ``prior``: (log (y + a) / (n + prior - y - a) - log (y' + a) / (n' + prior - y' - a)) / sqrt(1 / (y + a) +
    1 / (y' + a))."""
    entries = counts.tocoo()
    totals = np.asarray(counts.sum(0), dtype=np.float64).ravel()
    lengths, everything = np.asarray(counts.sum(1), dtype=np.float64).ravel(), totals.sum()
    weight, here = prior * totals[entries.col] / everything, entries.data.astype(np.float64)
    there = totals[entries.col] - here
    odds = (here + weight) / (lengths[entries.row] + prior - here - weight)
    others = (there + weight) / (everything - lengths[entries.row] + prior - there - weight)
    z = (np.log(odds) - np.log(others)) / np.sqrt(1 / (here + weight) + 1 / (there + weight))
    return coo_matrix((z, (entries.row, entries.col)), counts.shape).tocsr()


class Words:
    """The words of titles: ``names``, and their occurrences as places in ``names`` and ``items``."""

    def __init__(self, titles: Sequence[str | None]) -> None:
        known = dict[str, int]()
        pairs = [
            (item, known.setdefault(word, len(known)))
            for item, title in enumerate(spaced([title or "" for title in titles], "'’"))
            for word in (part.strip("'’") for part in title.split())
            if word
        ]
        self.names = list(known)
        self.items, self.words = np.array(pairs, np.int64).reshape(-1, 2).T

    def typical(self, codes: NDArray[np.integer], size: int) -> dict[int, list[tuple[str, float]]]:
        """Return the typical words of each code with their z-scores, the highest first: those that occur at least twice
        in the titles of its items, and with :data:`CERTAIN` more often than in others. ``codes``: of each title."""
        if not self.names:
            return {}
        rows = codes[self.items].astype(np.int64) + 1  # PAD is a group too
        counts = coo_matrix((np.ones(len(rows)), (rows, self.words)), (size + 1, len(self.names))).tocsr()
        z, found = log_odds(counts), dict[int, list[tuple[str, float]]]()
        fits = np.flatnonzero((z.data >= CERTAIN) & (counts.data >= 2))  # the entries of z are those of counts
        groups = np.searchsorted(z.indptr, fits, side="right") - 1
        for at in np.lexsort((-z.data[fits], groups)):
            code, entry = int(groups[at]) - 1, fits[at]
            listed = found.setdefault(code, [])
            if len(listed) < TYPICAL:
                listed.append((self.names[z.indices[entry]], round(float(z.data[entry]), 1)))
        found.pop(PAD, None)
        return found


def transitions(first: NDArray[np.integer], then: NDArray[np.integer], size: int) -> dict[int, list[Next]]:
    """Return for each code of a slot the codes that follow it most often. ``first`` and ``then`` [pairs]: the codes of
    consecutive events (PAD is not counted)."""
    there = (first != PAD) & (then != PAD)
    keys, events = np.unique(first[there].astype(np.int64) * size + then[there], return_counts=True)
    before, after, total = keys // size, keys % size, int(events.sum())
    left, right = (np.bincount(side, events, size) for side in (before, after))
    lift, found = events * total / (left[before] * right[after]), dict[int, list[Next]]()
    for at in np.lexsort((after, -events, before)):
        listed = found.setdefault(int(before[at]), [])
        if len(listed) < NEXT:
            listed.append(Next(int(after[at]), int(events[at]), round(float(lift[at]), 2)))
    return found


def project(vectors: NDArray[np.float32], seed: int = 0) -> NDArray[np.int16]:
    """Return the first two principal components of the rows [n, D], scaled by one factor to whole numbers of at most
    32,000, [n, 2]. Equal rows and ``seed`` give equal coordinates."""
    centred = torch.from_numpy(vectors - vectors.mean(0))
    if min(centred.shape) < 2:
        return np.zeros((len(vectors), 2), np.int16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, _, axes = torch.pca_lowrank(centred, q=min(6, *centred.shape), center=False, niter=4)
    axes = axes[:, :2] * axes[:, :2].gather(0, axes[:, :2].abs().argmax(0, keepdim=True)).sign()
    flat = (centred @ axes).numpy()
    return np.asarray(np.round(flat * (_EDGE / max(float(np.abs(flat).max()), 1e-12))), np.int16)


def thumbnail(image: Image, pixels: int) -> bytes:
    """Return a picture as JPEG whose longer side has at most ``pixels``."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((pixels, pixels))
    small.save(buffer, "JPEG", quality=70, optimize=True)
    return buffer.getvalue()


def payload(
    items: Items,
    slots: Sequence[Slot],
    counts: Sequence[NDArray[np.int64]],
    following: Sequence[Mapping[int, Sequence[Next]]],
    decoded: NDArray[np.float32] | None = None,
    changes: Mapping[str, Any] | None = None,
    pictures: Mapping[str, bytes] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what the page shows, as JSON data; arrays are packed (:func:`packed`).

    ``counts`` and ``following``: :func:`sizes` and :func:`transitions` of each slot; ``decoded`` [n, D]: the vectors
    that the codes stand for, None: the map is of the content vectors; ``changes``: ``reasons`` (reason -> items) and
    ``rows`` (``id``, ``title``, ``why``, ``old`` and ``new`` codes or None); ``pictures``: item_id -> JPEG; ``facts``:
    what the header says (``run``, ``generation``, ``tokenizer``, ``digest``, ``created``, ``catalogue``: items of the
    whole catalogue by stratum)."""
    words = Words(items.titles)
    content = [m for m in items.vectors if m in {slot.kind for slot in slots}] or list(items.vectors)
    plane = decoded if decoded is not None else np.concatenate([unit(items.vectors[m]) for m in content], axis=1)
    near = {m: nearest(vectors, NEIGHBOURS) for m, vectors in items.vectors.items()}
    whole = np.int16 if len(items.ids) <= 32_767 else np.int32
    return {
        "facts": {**(facts or {}), "mapped": "decoded" if decoded is not None else "vectors"},
        "strata": list(STRATA),
        "ids": list(items.ids),
        "titles": [_cut(title) for title in items.titles],
        "interactions": packed(items.interactions.astype(np.uint32)),
        "stratum": packed(items.strata.astype(np.uint8)),
        "codes": packed(items.codes.astype(np.int32 if max(slot.size for slot in slots) > 32_767 else np.int16)),
        "weights": packed(np.round(np.clip(items.weights, 0, 1) * 100).astype(np.uint8)),
        "active": packed(items.active.astype(np.uint8)),
        "map": packed(project(plane)),
        "near": {
            m: {"items": packed(places.astype(whole)), "cosines": packed(np.round(cosines * 100).astype(np.int8))}
            for m, (places, cosines) in near.items()
        },
        "slots": [
            {
                **slot._asdict(),
                "items": packed(counts[place].astype(np.uint32)),
                "words": words.typical(items.codes[:, place], slot.size),
                "next": following[place],
            }
            for place, slot in enumerate(slots)
        ],
        "changes": changes,
        "pictures": {item: base64.b64encode(data).decode() for item, data in (pictures or {}).items()},
    }


def packed(values: NDArray[Any]) -> dict[str, str]:
    """Return an array as the name of its type in JavaScript and its bytes in base64, row by row."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return {"type": f"{values.dtype.name.capitalize()}Array", "data": base64.b64encode(little.tobytes()).decode()}


def render(data: Mapping[str, Any]) -> str:
    """Return the page of a :func:`payload` as HTML. No text of the payload can end its element or be read as HTML."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("explore.html").render(facts=data["facts"], payload=Markup(text))


def _cut(title: str | None) -> str:
    text = " ".join((title or "").split())
    return text if len(text) <= TITLE else f"{text[: TITLE - 1]}…"
