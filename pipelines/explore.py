"""Gather what the page that shows single items and codes needs, from the tables of the live generation.

Of the whole catalogue only arrays by item_index are in memory: stratum (1 byte an item), hash of the id and its order
(16 bytes, 8 more while they are sorted), L codes (2 bytes each, 4 where a codebook has more than 32,767 codes), and the
keys of one slot while they are counted (about 20 bytes)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from adasid import tables
from adasid.config import Config
from adasid.data.shards import batch_of
from adasid.data.text import hashed_text, readable
from adasid.encoders import images, places
from adasid.errors import TransientError
from adasid.files import Location, write_text
from adasid.report import explore
from adasid.report.explore import Items, Next, thumbnail
from adasid.sid import PreviousCodes, Slot
from adasid.tables import BEHAVIOR, PAD, STRATA
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Tokenizer
from pipelines import content
from pipelines.engines.lake import Lake
from pipelines.publish.generations import Generation
from pipelines.run import Run
from pipelines.sources import in_place

READ = ("sids", "sid_changes", "item_features", "sequences", "items")
"""Tables that are read where they exist."""
USERS = 20_000
"""Users whose training histories are read."""
EVENTS = 2_000_000
"""Pairs of consecutive events after which no further history is read."""
CHANGES = 500
"""Changes that the page lists."""
PICTURES = 4 * 2**30
"""A table of items with more bytes is not searched for pictures, of which all would be read."""
FAILURES = 10
"""After so many failures of a store or disk no further picture is read."""
_ANY = 1e12
"""Slack with which a tokenizer decodes the published codes, however far they are."""


class Catalogue:
    """The items of the live generation by item_index: ``strata`` [items], ``codes`` [items, L] (PAD for an item without
    a SID), and the places of item ids."""

    def __init__(self, lake: Lake, live: Generation, slots: Sequence[Slot]) -> None:
        version = live.inputs["item_features"]
        items = lake.open("item_features", version).to_pyarrow_dataset().count_rows()
        self.strata, hashes = np.zeros(items, np.int8), np.zeros(items, np.uint64)
        names = pa.array(STRATA)
        for rows in lake.batches("item_features", version, ["item_id", "item_index", "stratum"]):
            index = rows.column("item_index").to_numpy()
            hashes[index] = hashed_text(rows.column("item_id"))
            self.strata[index] = pc.index_in(rows.column("stratum"), names).to_numpy(zero_copy_only=False)
        self._order = np.argsort(hashes).astype(np.int64)
        self._hashes = hashes[self._order]
        self.codes = np.full(
            (items, len(slots)), PAD, np.int16 if max(slot.size for slot in slots) <= 32_767 else np.int32
        )
        for rows in lake.batches("sids", live.sids_version, ["item_id", "codes"]):
            index = self.index(rows.column("item_id"))
            self.codes[index[index >= 0]] = _matrix(rows, "codes")[index >= 0]

    def index(self, ids: pa.StringArray) -> NDArray[np.int64]:
        """Return the item_index of item ids, -1 for those that are not in the catalogue."""
        if not len(self._hashes):
            return np.full(len(ids), -1, np.int64)
        wanted = hashed_text(ids)
        place = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return np.where(self._hashes[place] == wanted, self._order[place], -1)


def write(cfg: Config, lake: Lake, live: Generation, created: str) -> Location:
    """Write ``<run>/report/explore/index.html`` of the live generation, and return its path. Raises InputError where
    its artifact cannot be read."""
    path = Run(cfg).report("explore") / "index.html"
    write_text(path, explore.render(gather(cfg, lake, live, created)))
    return path


def gather(cfg: Config, lake: Lake, live: Generation, created: str) -> dict[str, Any]:
    """Return the content of the page, as :func:`adasid.report.explore.payload`."""
    tokenizer, manifest = artifact.read(Run(cfg).of_name(live.artifact))
    slots = tokenizer.slots
    catalogue = Catalogue(lake, live, slots)
    chosen = explore.choose(catalogue.strata, cfg.explore.items)
    items, decoded = _items(lake, live, catalogue, chosen, tokenizer)
    first, then = _pairs(lake, live, len(catalogue.strata))
    following = list[dict[int, list[Next]]]()
    counts = list[NDArray[np.int64]]()
    for place, slot in enumerate(slots):
        codes = catalogue.codes[:, place]
        counts.append(explore.sizes(codes, catalogue.strata, slot))
        following.append(explore.transitions(codes[first], codes[then], slot.size))
    shown = [items.ids[place] for place in explore.choose(items.strata, cfg.explore.pictures, popular=True)]
    return explore.payload(
        items,
        slots,
        counts,
        following,
        decoded,
        _changes(lake, live, catalogue),
        pictures(cfg, lake, shown),
        {
            "run": cfg.name,
            "generation": live.generation,
            "tokenizer": manifest.tokenizer,
            "digest": live.tokenizer,
            "created": created,
            "catalogue": np.bincount(catalogue.strata, minlength=len(STRATA)).tolist(),
        },
    )


def pictures(cfg: Config, lake: Lake, ids: Sequence[str]) -> dict[str, bytes]:
    """Return the pictures of items, item_id -> JPEG of at most ``explore.picture_pixels``, from the first encoder of
    pictures; empty where no encoder reads pictures, or the table of items has more than :data:`PICTURES` bytes. A
    picture that cannot be read is left out; after :data:`FAILURES` that a store or disk did not give, so are all
    others."""
    encoder = next((encoder for encoder in cfg.content.encoders.values() if encoder.field), None)
    if encoder is None or encoder.field is None or not ids or in_place.size(lake, "items") > PICTURES:
        return {}
    schema, wanted = tables.items((), (), (encoder.field,)), pc.field("item_id").isin(list(ids))
    found, failures = dict[str, bytes](), 0
    rules = places.Rules(encoder.max_bytes, content.root_of(cfg), tuple(map(places.normal, cfg.content.roots)))
    for rows in in_place.batches(lake, "items", schema, wanted):
        for item, place in zip(rows["item_id"].to_pylist(), places.places(rows[encoder.field])):
            if item in found or (place.data is None and place.path is None) or failures == FAILURES:
                continue
            try:
                data = places.read(place, rules)  # nothing is fetched from the web for a page
            except TransientError:
                failures += 1
                continue
            if isinstance(data, bytes):
                image = images.decode(data, encoder.max_bytes, encoder.max_pixels, cfg.explore.picture_pixels)
                if not isinstance(image, str):
                    found[item] = thumbnail(image, cfg.explore.picture_pixels)
    return found


def _items(
    lake: Lake, live: Generation, catalogue: Catalogue, chosen: NDArray[np.int64], tokenizer: Tokenizer
) -> tuple[Items, NDArray[np.float32] | None]:
    """Return the chosen items, and the vectors that their published codes stand for, [n, D]; None where the tokenizer
    decodes none."""
    version, length = live.inputs["item_features"], len(tokenizer.slots)
    modalities = [name for name, kind in _vectors(lake.schema("item_features", version))]
    weights, active = np.zeros((len(chosen), length), np.float32), np.zeros((len(chosen), length), bool)
    for rows in lake.batches("sids", live.sids_version, ["item_id", "weights", "active"]):
        place, there = _places(chosen, catalogue.index(rows.column("item_id")))
        weights[place] = _matrix(rows, "weights")[there]
        active[place] = _matrix(rows, "active")[there]
    text = np.full((2, len(chosen)), None, object)
    interactions, vectors = np.zeros(len(chosen), np.int64), dict[str, NDArray[np.float32]]()
    decoded, columns = None, ["item_id", "title", "interactions", "item_index", "richness", *modalities]
    for rows in lake.batches("item_features", version, columns, pc.field("item_index").isin(pa.array(chosen))):
        if not rows.num_rows:
            continue
        place = np.searchsorted(chosen, rows.column("item_index").to_numpy())
        text[:, place] = [rows.column("item_id").to_pylist(), readable(rows.column("title"))]
        interactions[place] = rows.column("interactions").to_numpy()
        for m in modalities:
            there = rows.column(m).is_valid().to_numpy(zero_copy_only=False)
            values = rows.column(m).flatten().to_numpy(zero_copy_only=False)
            if len(values):
                vectors.setdefault(m, np.zeros((len(chosen), len(values) // there.sum()), np.float32))
                vectors[m][place[there]] = values.reshape(there.sum(), -1)
        part = _decoded(tokenizer, rows, catalogue.codes[chosen[place]])
        if part is not None:
            decoded = np.zeros((len(chosen), part.shape[1]), np.float32) if decoded is None else decoded
            decoded[place] = part
    ordered = {m: vectors[m] for m in modalities if m in vectors}
    codes, strata = catalogue.codes[chosen], catalogue.strata[chosen]
    return Items(text[0].tolist(), text[1].tolist(), interactions, strata, codes, weights, active, ordered), decoded


def _decoded(tokenizer: Tokenizer, rows: pa.RecordBatch, codes: NDArray[np.integer]) -> NDArray[np.float32] | None:
    """Return the vectors of all modalities that the codes stand for, side by side, [n, D]."""
    previous = PreviousCodes(torch.from_numpy(codes.astype(np.int64)), _ANY)
    decoded = tokenizer.reconstruct(replace(batch_of(rows, tokenizer.widths), previous=previous))
    return np.asarray(torch.cat(list(decoded.values()), 1).float().numpy(), np.float32) if decoded else None


def _pairs(lake: Lake, live: Generation, items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the item_index of consecutive events in training histories, of at most :data:`USERS` users and about
    :data:`EVENTS` pairs; none where the histories that belong to the generation's items are gone."""
    parts, users, pairs = [np.zeros((2, 0), np.int64)], 0, 0
    for rows in _histories(lake, live):
        column = rows.column("history").slice(0, USERS - users)
        events, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy()
        same = np.repeat(np.arange(len(lengths)), lengths)
        inside = (same[1:] == same[:-1]) & (events[1:] < items) & (events[:-1] < items)
        parts.append(np.stack([events[:-1][inside], events[1:][inside]]))
        users, pairs = users + len(column), pairs + int(inside.sum())
        if users >= USERS or pairs >= EVENTS:
            break
    first, then = np.concatenate(parts, axis=1)
    return first, then


def _histories(lake: Lake, live: Generation) -> Iterator[pa.RecordBatch]:
    """Yield the training histories whose item_index is that of the generation's ``item_features``."""
    stats = lake.lineage("item_features", live.inputs["item_features"]).get("item_stats")
    digest = lake.input_hash("item_stats", stats) if stats is not None else None
    version = lake.made("sequences", digest) if digest else None
    if version is not None and not lake.missing("sequences", version):
        yield from lake.batches("sequences", version, ["history"], pc.field("split") == "train")


def _changes(lake: Lake, live: Generation, catalogue: Catalogue) -> dict[str, Any]:
    """Count the changes of the live generation by reason, and list those of the most popular items: first those that
    had a SID before and have one now."""
    reasons, rows = Counter[str](), pa.Table.from_pylist([], tables.SID_CHANGES)
    rank = np.zeros(0, np.int64)
    if lake.exists("sid_changes"):
        for part in lake.batches("sid_changes", filter=pc.field("generation") == live.generation):
            reasons.update(part.column("why").to_pylist())
            index = catalogue.index(part.column("item_id"))
            moved = pc.and_(part.column("old_codes").is_valid(), part.column("new_codes").is_valid())
            last = len(catalogue.strata)
            later = np.where(moved.to_numpy(zero_copy_only=False), 0, last + 1)
            rank = np.concatenate([rank, later + np.where(index < 0, last, index)])
            best = np.argsort(rank, kind="stable")[:CHANGES]
            rows = pa.concat_tables([rows, pa.Table.from_batches([part]).select(rows.column_names)]).take(best)
            rank = rank[best]
    ids = rows.column("item_id").combine_chunks()
    version, titles = live.inputs["item_features"], dict[str, str | None]()
    wanted = pc.field("item_id").isin(ids)
    for part in lake.batches("item_features", version, ["item_id", "title"], wanted) if len(ids) else ():
        titles |= zip(part.column("item_id").to_pylist(), readable(part.column("title")))
    listed = [
        {"id": row["item_id"], "title": titles.get(row["item_id"]), "why": row["why"]}
        | {"old": row["old_codes"], "new": row["new_codes"]}
        for row in rows.to_pylist()
    ]
    return {"reasons": dict(reasons.most_common()), "rows": listed}


def _places(chosen: NDArray[np.int64], index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the places of the chosen among items ``index``, and which of these are chosen."""
    place = np.minimum(np.searchsorted(chosen, index), len(chosen) - 1)
    there = chosen[place] == index
    return place[there], there


def _matrix(rows: pa.RecordBatch, name: str) -> NDArray[Any]:
    """Return lists of one length as rows [n, L]."""
    values: NDArray[Any] = rows.column(name).flatten().to_numpy(zero_copy_only=False)
    return values.reshape(rows.num_rows, -1)


def _vectors(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    """Return the columns of embeddings, behaviour last."""
    found = [(field.name, field.type) for field in schema if pa.types.is_list(field.type)]
    return sorted(found, key=lambda pair: pair[0] == BEHAVIOR)
