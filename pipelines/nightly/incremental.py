"""A night whose work is as large as its change: without Spark, where the change feed tells of few items and the codebooks stay.

Vectors are read of the items that changed alone. Counts of the new table follow from those of the live generation and the rows that differ; of the
published table the items and codes are scanned, and merged into. Whatever is out of the ordinary (a fault, a gate that fails, a feed with gaps, drift
that asks for training) is left to Spark, which looks at the whole table and says what is wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from numpy.typing import NDArray

from adasid.errors import InputError
from adasid.metrics.tally import Tally
from adasid.tables import PAD, SID_CHANGES, SIDS, STRATA
from adasid.tokenizers.base import Slot, Tokenizer
from adasid.tokenizers.encode import ENCODED, READ, encode_rows
from pipelines import generations
from pipelines.nightly import changes, drift, verdict
from pipelines.nightly.feed import LATE, RARE, Change, Integers, Mask, Side, Unusual, fed
from pipelines.nightly.feed import read as read_feed
from pipelines.nightly.night import Night
from pipelines.nightly.verdict import Found

_COUNTED = ["codes", "weights", "active", "gauges"]


@dataclass(frozen=True)
class Rows:
    """``codes``, ``weights``, ``active`` [n, L] of rows of ``sids``."""

    codes: Integers
    weights: NDArray[np.float64]
    active: Mask

    @staticmethod
    def of(rows: pa.Table, length: int) -> Rows:
        """Of a table without nulls."""
        flat = [pc.list_flatten(rows[name]).to_numpy().reshape(-1, length) for name in ("codes", "weights", "active")]
        return Rows(flat[0].astype(np.int64), flat[1].astype(np.float64), flat[2].astype(bool))


def publish(night: Night) -> bool:
    """Publish the night, or find that nothing changed; False, with nothing done, where that is Spark's."""
    settings, since = night.cfg.retokenize, night.live["inputs"]["item_features"]
    if settings.policy not in {"frozen", "auto"} or not settings.small_night or "counts" not in night.live["drift"]:
        return False
    if not changes.followed(night.lake, since, night.version) or not _current(night):
        return False
    tokenizer, manifest = night.champion()
    torch.set_num_threads(1)
    try:
        change = read_feed(night, since)
        counts = Counter(change.kind.tolist() if change else [])
        if change is None or set(counts) <= {"same"}:
            night.found("change feed", counts)
            night.unchanged()
            return True
        encoded = _encoded(night, since, change, tokenizer)
        ranks, found = _measured(night, change, encoded, night.slots(manifest))
    except (Unusual, OSError, DeltaError, pa.ArrowException):
        return False
    measured = verdict.facts(night.cfg, night.live, night.version, found)
    if verdict.policy(night.cfg, found.drifted) != "frozen" or not all(gate["passed"] for gate in measured["gates"]):
        return False
    night.found("change feed", counts)
    night.track.metrics(verdict.tracked(measured))
    night.track.note("policy frozen, without Spark")
    number, stamp = generations.next_number(night.lake), night.stamp("frozen", manifest["digest"])
    rows = _with(encoded, generation=number, tokenizer=manifest["digest"], collision_rank=ranks).select(SIDS.names).cast(SIDS)
    moves = _with(_moves(change, encoded), generation=number).select(SID_CHANGES.names).cast(SID_CHANGES)
    gone = change.ids.filter(pa.array(change.of("removed")))
    try:
        night.publish(
            {"generation": number, "policy": "frozen", "run_date": night.day, **measured},
            manifest,
            stamp,
            lambda: night.lake.change("sids", rows, gone, stamp),
            lambda: night.lake.put("sid_changes", moves, f"generation = {number}", stamp),
        )
    except (OSError, DeltaError, pa.ArrowException) as error:
        raise InputError(
            f"night {night.day}: the lake {night.lake.root} cannot be written ({str(error).splitlines()[0]}); generation "
            f"{generations.pointer(night.lake)} stays live: mend the disk or the table, then run the night again"
        ) from error
    return True


def _current(night: Night) -> bool:
    """Whether the newest rows of ``sids`` are the live ones, or those of this very night, which was cut off."""
    if night.lake.fresh(night.stamp("frozen", night.live["tokenizer"]), "sids"):
        return True
    newest = DeltaTable(night.lake.path("sids"))
    return set(newest.file_uris()) == set(night.lake.open("sids", night.live["sids_version"]).file_uris())


def _encoded(night: Night, since: int, change: Change, tokenizer: Tokenizer) -> pa.Table:
    """Rows of :data:`ENCODED` of the items that are new or changed, in their order."""
    chosen = pa.array(change.of("new", "changed"))
    ids, version, held = change.ids.filter(chosen), change.version.filter(chosen), change.published["codes"].combine_chunks().filter(chosen)
    one_of, batch, parts = night.live["drift"]["baseline"]["every"], night.cfg.sids.batch, list[pa.RecordBatch]()
    for part in fed(night, since, [*READ, *tokenizer.widths]):
        place = pc.index_in(part["item_id"], ids)
        newest = pc.and_(pc.equal(part["_commit_version"], version.take(place)).fill_null(False), pc.is_in(part["_change_type"], LATE))
        rows = part.filter(newest).append_column("published", held.take(place.filter(newest)))
        rows = rows.append_column("gauged", drift.gauged_rows(rows["item_id"], one_of))
        parts += [encode_rows(tokenizer, rows.slice(start, batch), night.cfg.retokenize.slack) for start in range(0, rows.num_rows, batch)]
    made = pa.Table.from_batches(parts, ENCODED).combine_chunks()
    place = pc.index_in(ids, made["item_id"].combine_chunks())
    if place.null_count or made.num_rows != len(ids) or pc.any(made["fault"].is_valid()).as_py():
        raise Unusual
    return made.take(place)


def _measured(night: Night, change: Change, encoded: pa.Table, slots: list[Slot]) -> tuple[pa.Array, Found]:
    """The collision ranks of the rows ``encoded``, and what is measured of the whole table with them."""
    live, was, now, same = night.live, ~change.of("new"), change.of("new", "changed"), change.of("same")
    base, length = live["drift"]["baseline"], len(slots)
    old, still = change.published.filter(pa.array(was)), change.published.filter(pa.array(same))
    new = pa.concat_tables([encoded.select(_COUNTED), still.select(_COUNTED)], promote_options="permissive")
    before = change.before.of(was)
    after = Side(*(np.concatenate([getattr(change.after.of(part), name) for part in (now, same)]) for name in ("stratum", "events")))
    ranks, groups, shared = _grouped(night, change, Rows.of(encoded, length).codes, encoded)
    known = Tally.known(live["metrics"], slots)
    tallies = _tally(slots, old, before), _tally(slots, new, after)
    metrics = known.changed(*tallies, groups, known.shared + shared).metrics(slots)
    gauged = [_gauged(rows["gauges"], side.stratum, base["edges"]) for rows, side in ((old, before), (new, after))]
    counts = drift.changed(live["drift"]["counts"], *gauged)
    drifted = drift.against(base, drift.described(night.lake, counts, base["every"], base["edges"]))
    return ranks, Found(
        folder=night.artifact,
        tokenizer=live["tokenizer"],
        metrics=metrics,
        churn=changes.churned(_churn_groups(change, encoded, length), metrics, live["items"]),
        baseline=base,
        counts=counts,
        drifted=drifted,
        items=night.lake.open("item_features", night.version).count(),
        error=verdict.largest_error(drifted),
        distinct=metrics["items"],
        known=metrics["items"],
        broken=0,
    )


def _tally(slots: list[Slot], rows: pa.Table, side: Side) -> Tally:
    own = Rows.of(rows, len(slots))
    return Tally.of(slots, own.codes, own.weights, own.active, side.stratum, side.events)


def _gauged(gauges: pa.ChunkedArray, strata: Integers, edges: dict[str, list[float]]) -> dict[str, drift.Counts]:
    """Counts of the norms and errors of rows, whose ``strata`` [n] are given."""
    gauges = gauges.combine_chunks()
    flat, row = gauges.flatten(), pc.list_parent_indices(gauges).to_numpy()
    modality, norm, error = (flat.field(name).to_numpy(zero_copy_only=False) for name in ("modality", "norm", "error"))
    return drift.counted(modality, np.array(STRATA, object)[strata[row]], norm, error.astype(np.float64), edges)


def _keys(codes: Integers) -> NDArray[np.uint64]:
    """A number for each row of codes [n, L]; equal rows have equal ones."""
    factors = np.random.default_rng(0).integers(1, 2**63, codes.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    keys: NDArray[np.uint64] = ((codes - PAD).astype(np.uint64) * factors).sum(1, dtype=np.uint64)
    return keys


def _grouped(night: Night, change: Change, codes: Integers, encoded: pa.Table) -> tuple[pa.Array, dict[int, int], int]:
    """Of the SIDs that gain, lose or recount an item: the collision ranks of the rows ``encoded`` with ``codes``, after those that stay; the sizes of all groups
    then; and by how much the number of rare items in shared groups grows."""
    live, length = night.live, codes.shape[1]
    leaving = Rows.of(change.published.filter(pa.array(~change.of("new"))), length).codes
    distinct = np.unique(np.concatenate([codes, leaving]), axis=0)
    order = _keys(distinct).argsort()
    distinct, keys = distinct[order], _keys(distinct)[order]
    if (keys[1:] == keys[:-1]).any():
        raise Unusual

    def group(rows: Integers) -> Integers:
        """Place of each row of codes in ``distinct``; -1 for none."""
        place = np.minimum(np.searchsorted(keys, _keys(rows)), len(keys) - 1)
        return np.where((distinct[place] == rows).all(1), place, -1)

    ids, of, rank = list[pa.Array](), list[Integers](), list[Integers]()
    for part in night.lake.batches("sids", live["sids_version"], ["item_id", "codes", "collision_rank"]):
        place = group(pc.list_flatten(part["codes"]).to_numpy().reshape(part.num_rows, length).astype(np.int64))
        there = place >= 0
        ids.append(part["item_id"].filter(pa.array(there)))
        of.append(place[there])
        rank.append(part["collision_rank"].to_numpy()[there])
    members, of_member, ranks = pa.chunked_array(ids, pa.string()).combine_chunks(), np.concatenate(of), np.concatenate(rank)
    before, after = _rare(night, change, members)
    stays = ~pc.is_in(members, change.ids.filter(pa.array(change.of("changed", "removed")))).to_numpy(zero_copy_only=False)
    own, rare = group(codes), change.after.of(change.of("new", "changed")).rare()
    n = len(keys)
    size = np.bincount(of_member, minlength=n), np.bincount(of_member[stays], minlength=n) + np.bincount(own, minlength=n)
    few = np.bincount(of_member, before, n), np.bincount(of_member[stays], after[stays], n) + np.bincount(own, rare, n)
    groups = Counter({int(s): int(number) for s, number in live["metrics"]["group_sizes"]})
    groups.subtract(size[0].tolist())
    groups.update(size[1].tolist())
    del groups[0]
    shared = few[1][size[1] > 1].sum() - few[0][size[0] > 1].sum()
    first = np.zeros(n, np.int64)
    np.maximum.at(first, of_member[stays], ranks[stays] + 1)
    return _ranks(own, first, encoded), {s: number for s, number in groups.items() if number}, int(shared)


def _rare(night: Night, change: Change, members: pa.Array) -> tuple[Mask, Mask]:
    """Which of ``members`` are tail or cold, before and after."""
    parts = night.lake.batches("item_features", night.version, ["item_id", "stratum"], pc.field("item_id").isin(members))
    rows = pa.Table.from_batches(parts, pa.schema([("item_id", pa.string()), ("stratum", pa.string())]))
    known = pc.is_in(rows["stratum"].take(pc.index_in(members, rows["item_id"].combine_chunks())), pa.array([STRATA[place] for place in RARE]))
    place = pc.index_in(members, change.ids).fill_null(-1).to_numpy()
    found = pc.is_in(members, rows["item_id"].combine_chunks()).to_numpy(zero_copy_only=False)
    if (~found & (place < 0)).any():
        raise Unusual
    now = known.to_numpy()
    return np.where(place < 0, now, change.before.rare()[place]), now


def _ranks(own: Integers, first: Integers, encoded: pa.Table) -> pa.Array:
    """Rank of each row in its group ``own`` [n] by (events desc, item_id), from ``first`` of the group on."""
    rows = pa.table({"group": own, "interactions": encoded["interactions"], "item_id": encoded["item_id"]})
    order = pc.sort_indices(rows, [("group", "ascending"), ("interactions", "descending"), ("item_id", "ascending")]).to_numpy()
    groups = own[order]
    opens = np.flatnonzero(np.append(True, groups[1:] != groups[:-1])) if len(groups) else np.zeros(0, np.int64)
    ranks = np.empty(len(own), np.int64)
    ranks[order] = first[groups] + np.arange(len(own)) - np.repeat(opens, np.diff(np.append(opens, len(own))))
    return pa.array(ranks, pa.int32())


def _churn_groups(change: Change, encoded: pa.Table, length: int) -> list[dict[str, Any]]:
    """What :func:`changes.churned` takes."""
    fresh = change.of("new", "changed")
    changed = change.kind[fresh] == "changed"
    new = Rows.of(encoded, length).codes[changed]
    differ = new != Rows.of(change.published.filter(pa.array(change.of("changed"))), length).codes
    moved, today = differ.any(1), change.after.of(change.of("changed"))
    groups = [{"stratum": None, "kind": "removed", "items": int(change.of("removed").sum()), "events": None}]
    for place, stratum in enumerate(STRATA):
        own, came = moved & (today.stratum == place), change.of("new") & (change.after.stratum == place)
        slots = {f"s{i}": int(count) for i, count in enumerate(differ[own].sum(0))}
        groups.append({"stratum": stratum, "kind": "moved", "items": int(own.sum()), "events": int(today.events[own].sum()), **slots})
        groups.append({"stratum": stratum, "kind": "new", "items": int(came.sum()), "events": int(change.after.events[came].sum())})
    return groups


def _moves(change: Change, encoded: pa.Table) -> pa.Table:
    """Rows of ``sid_changes`` but for the generation."""
    fresh, gone = (pa.array(change.of(*kinds)) for kinds in (("new", "changed"), ("removed",)))
    codes = change.published["codes"].combine_chunks()
    why = pa.array(change.kind.astype(object), pa.string())
    came = {"item_id": change.ids.filter(fresh), "old_codes": codes.filter(fresh), "new_codes": encoded["codes"], "why": why.filter(fresh)}
    left = {"item_id": change.ids.filter(gone), "old_codes": codes.filter(gone), "why": why.filter(gone)}
    rows = pa.concat_tables([pa.table(came), pa.table(left)], promote_options="permissive")
    text = [pc.binary_join(pc.cast(rows[name], pa.list_(pa.string())), " ").fill_null("") for name in ("old_codes", "new_codes")]
    return rows.filter(pc.not_equal(*text))


def _with(rows: pa.Table, **columns: object) -> pa.Table:
    """With further columns: arrays, or one value for all rows."""
    for name, value in columns.items():
        rows = rows.append_column(name, value if isinstance(value, pa.Array) else pa.repeat(value, rows.num_rows))
    return rows
