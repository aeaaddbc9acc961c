"""Run a nightly run without Spark, at the cost of its changes, where few items have other vectors and the codebooks
stay.

Only vectors of changed items are encoded. Counts of the new table follow from those of the live generation and the rows
that differ; of the published table the items and codes are scanned, and merged into. All exceptions (a fault, a gate
that fails, a version that is gone, drift that asks for training) are left to Spark, which reads the whole table and
reports the error.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from numpy.typing import NDArray

from adasid.errors import InputError, first_line
from adasid.metrics.tally import RARE, Tally
from adasid.sid import Slot
from adasid.tables import PAD, SID_CHANGES, SIDS, STRATA
from adasid.tokenizers.artifact import Manifest
from adasid.tokenizers.base import Tokenizer
from adasid.tokenizers.encode import ENCODED, READ, encode_rows
from pipelines import generations
from pipelines.nightly import changes, differences, drift, verdict
from pipelines.nightly.differences import Change, Integers, Mask, NeedsFullRun, Side
from pipelines.nightly.nightly_run import NightlyRun
from pipelines.nightly.verdict import Measurements

_Sizes = dict[int, int]

_FILES = 64
"""From this many files of ``sids`` Spark runs the nightly run and rewrites the table: every small run may add a
file."""


@dataclass(frozen=True)
class _Prepared:
    """A prepared run may be published: the rows of ``sids`` and ``sid_changes`` to write, the items ``gone``, the
    ``version`` of ``sids`` that they change, and the run's ``facts``; no rows where nothing changed. ``how``: the
    method of detection."""

    how: str
    counts: Counter[str]
    version: int = 0
    manifest: Manifest | None = None
    rows: pa.Table | None = None
    moves: pa.Table | None = None
    gone: pa.Array | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def publish(nightly: NightlyRun) -> bool:
    """Publish the nightly run, or report that nothing changed; return False, with nothing done, where it needs Spark.
    Raises InputError where the tables cannot be written, BusyError where another run was faster."""
    try:
        made = _prepared(nightly)
    except (NeedsFullRun, OSError, DeltaError, pa.ArrowException) as error:
        if str(error):
            nightly.context.note(f"full run on Spark: {first_line(error)}")
        return False
    nightly.found(made.how, made.counts)
    rows, moves, facts = made.rows, made.moves, made.facts
    if rows is None or moves is None or made.manifest is None:
        nightly.unchanged()
        return True
    nightly.measured(facts)
    nightly.context.note("policy frozen, without Spark")
    input_hash, where = nightly.input_hash("frozen", facts["tokenizer"]), f"generation = {facts['generation']}"
    try:
        nightly.publish(
            facts,
            made.manifest,
            input_hash,
            lambda: nightly.lake.change("sids", made.version, rows, made.gone, input_hash),
            lambda: nightly.lake.put("sid_changes", moves, where, input_hash),
        )
    except (OSError, DeltaError, pa.ArrowException) as error:
        raise InputError(
            f"nightly run of {nightly.day}: its table or files cannot be written below {nightly.cfg.run_dir} "
            f"({first_line(error)}); generation "
            f"{generations.pointer(nightly.lake)} stays live: mend the disk or the table, then run it again"
        ) from error
    return True


def _prepared(nightly: NightlyRun) -> _Prepared:
    """Prepare the run. Raises NeedsFullRun, or what reading raises, where this module cannot handle it."""
    settings, live, since = nightly.cfg.retokenize, nightly.live, nightly.live["inputs"]["item_features"]
    if settings.policy not in {"frozen", "auto"} or not settings.small_night:
        raise NeedsFullRun
    if live["items"] > settings.small_table:
        raise NeedsFullRun(f"{live['items']} items are more than retokenize.small_table")
    if "counts" not in live["drift"] or "tail_group_sizes" not in live["metrics"]:
        raise NeedsFullRun(f"generation {live['generation']} was published without its counts")
    version = _base(nightly)
    tokenizer, manifest = nightly.champion()
    torch.set_num_threads(1)  # as on Spark's workers, so that results agree
    fed = changes.followed(nightly.lake, since, nightly.version)
    change, fed = differences.read(nightly, since, fed)
    how = changes.how(fed)
    counts = Counter(
        {str(kind): int(n) for kind, n in zip(*np.unique(change.kind, return_counts=True))} if change else {}
    )
    if change is None or set(counts) <= {"same"}:
        return _Prepared(how, counts)
    encoded = _encoded(nightly, since, change, tokenizer)
    ranks, found = _measured(nightly, change, encoded, nightly.slots(manifest))
    measured = verdict.facts(nightly.cfg, live, nightly.version, found)
    failed = [gate["gate"] for gate in measured["gates"] if not gate["passed"]]
    if failed:
        raise NeedsFullRun(f"gate {failed[0]}")
    if verdict.policy(nightly.cfg, found.drifted) != "frozen":
        raise NeedsFullRun("drift asks for another tokenizer")
    number = generations.next_number(nightly.lake)
    return _Prepared(
        how,
        counts,
        version,
        manifest,
        rows=_with(encoded, generation=number, tokenizer=manifest.digest, collision_rank=ranks)
        .select(SIDS.names)
        .cast(SIDS),
        moves=_with(_moves(change, encoded), generation=number).select(SID_CHANGES.names).cast(SID_CHANGES),
        gone=change.ids.filter(pa.array(change.of("removed"))),
        facts={"generation": number, "policy": "frozen", "run_date": nightly.day, **measured},
    )


def _base(nightly: NightlyRun) -> int:
    """Return the newest version of ``sids``. Raises NeedsFullRun unless it has the live rows, or those of this very
    run, which was interrupted."""
    newest = DeltaTable(nightly.lake.path("sids"))
    files = newest.file_uris()
    if not nightly.lake.fresh(nightly.input_hash("frozen", nightly.live["tokenizer"]), "sids"):
        if set(files) != set(nightly.lake.open("sids", nightly.live["sids_version"]).file_uris()):
            raise NeedsFullRun("the newest rows of sids are not the live ones")
        if len(files) > _FILES:
            raise NeedsFullRun(f"sids has {len(files)} files and is rewritten")
    return int(newest.version())


def _encoded(nightly: NightlyRun, since: int, change: Change, tokenizer: Tokenizer) -> pa.Table:
    """Return rows of :data:`ENCODED` of the new and changed items, in their order; they are also encoded in that order,
    so that the batches in which they are read do not matter. Raises NeedsFullRun where one is missing or faulty."""
    chosen = pa.array(change.of("new", "changed"))
    ids, previous = change.ids.filter(chosen), change.published["codes"].combine_chunks().filter(chosen)
    rows = differences.vectors(nightly, since, change, list(READ), list(tokenizer.widths))
    rows = _with(
        rows, sampled=drift.in_sample_rows(ids, nightly.live["drift"]["baseline"]["every"]), published=previous
    ).combine_chunks()
    batches = rows.to_batches(max_chunksize=nightly.cfg.sids.batch)
    made = pa.Table.from_batches(
        [encode_rows(tokenizer, batch, nightly.cfg.retokenize.slack) for batch in batches], ENCODED
    ).combine_chunks()
    if pc.any(made["fault"].is_valid()).as_py():
        raise NeedsFullRun("vectors with faults")
    return made


def _codes(rows: pa.Table | pa.RecordBatch, length: int) -> Integers:
    """Return the codes [n, L] of rows of ``sids``."""
    return np.asarray(pc.list_flatten(rows["codes"]).to_numpy().reshape(-1, length), np.int64)


def _measured(
    nightly: NightlyRun, change: Change, encoded: pa.Table, slots: list[Slot]
) -> tuple[pa.Array, Measurements]:
    """Return the collision ranks of the rows ``encoded``, and the measurements of the whole table with them."""
    live, was, now, same = nightly.live, ~change.of("new"), change.of("new", "changed"), change.of("same")
    base, length = live["drift"]["baseline"], len(slots)
    old, still = change.published.filter(pa.array(was)), change.published.filter(pa.array(same))
    new = pa.concat_tables(
        [encoded.select([*verdict.MEASURED]), still.select([*verdict.MEASURED])], promote_options="permissive"
    )
    before = change.before.of(was)
    after = Side(
        *(
            np.concatenate([getattr(change.after.of(part), name) for part in (now, same)])
            for name in ("stratum", "events")
        )
    )
    ranks, groups, tail_only, shared = _grouped(nightly, change, _codes(encoded, length), encoded)
    known = Tally.known(live["metrics"], slots)
    tallies = _tally(slots, old, before), _tally(slots, new, after)
    tally = known.changed(*tallies, groups, tail_only, known.shared + shared)
    if not tally.sound():
        raise NeedsFullRun("the counts of the live generation are not those of its rows")
    metrics = tally.metrics(slots)
    sampled = [_sampled(rows["gauges"], side.stratum, base["edges"]) for rows, side in ((old, before), (new, after))]
    counts = drift.changed(live["drift"]["counts"], *sampled)
    drifted = drift.against(base, drift.described(nightly.lake, counts, base["every"], base["edges"]))
    return ranks, Measurements(
        folder=nightly.artifact,
        tokenizer=live["tokenizer"],
        metrics=metrics,
        churn=changes.churned(_churn_groups(change, encoded, length), metrics, live["items"]),
        baseline=base,
        counts=counts,
        drifted=drifted,
        items=nightly.lake.open("item_features", nightly.version).count(),
        error=verdict.largest_error(drifted),
        distinct=metrics["items"],
        known=metrics["items"],
        broken=0,
    )


def _tally(slots: list[Slot], rows: pa.Table, side: Side) -> Tally:
    weights, active = (pc.list_flatten(rows[name]).to_numpy().reshape(-1, len(slots)) for name in ("weights", "active"))
    return Tally.of(
        slots, _codes(rows, len(slots)), weights.astype(np.float64), active.astype(bool), side.stratum, side.events
    )


def _sampled(gauges: pa.ChunkedArray, strata: Integers, edges: dict[str, list[float]]) -> dict[str, drift.Counts]:
    """Count the norms and errors of rows, whose ``strata`` [n] are given."""
    gauges = gauges.combine_chunks()
    flat, row = gauges.flatten(), pc.list_parent_indices(gauges).to_numpy()
    modality, norm, error = (flat.field(name).to_numpy(zero_copy_only=False) for name in ("modality", "norm", "error"))
    return drift.counted(modality, np.array(STRATA, object)[strata[row]], norm, error.astype(np.float64), edges)


def _keys(codes: Integers) -> NDArray[np.uint64]:
    """Hash each row of codes [n, L] to an integer; equal rows have equal hashes."""
    factors = np.random.default_rng(0).integers(1, 2**63, codes.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    keys: NDArray[np.uint64] = ((codes - PAD).astype(np.uint64) * factors).sum(1, dtype=np.uint64)
    return keys


def _grouped(
    nightly: NightlyRun, change: Change, codes: Integers, encoded: pa.Table
) -> tuple[pa.Array, _Sizes, _Sizes, int]:
    """Regroup the SIDs that gain, lose or recount an item. Returns the collision ranks of the rows ``encoded`` with
    ``codes``, as in :func:`sids.ranked`; the new sizes of all groups, over all items and over the tail and cold ones;
    and the increase of the number of tail and cold items in shared groups."""
    live, length = nightly.live, codes.shape[1]
    leaving = _codes(change.published.filter(pa.array(~change.of("new"))), length)
    distinct = np.unique(np.concatenate([codes, leaving]), axis=0)
    order = _keys(distinct).argsort()
    distinct, keys = distinct[order], _keys(distinct)[order]
    if (keys[1:] == keys[:-1]).any():
        raise NeedsFullRun("two SIDs have the same hash")

    def group(rows: Integers) -> Integers:
        """Return the index of each row of codes in ``distinct``; -1 for none."""
        place = np.minimum(np.searchsorted(keys, _keys(rows)), len(keys) - 1)
        return np.where((distinct[place] == rows).all(1), place, -1)

    ids, places, ranked = list[pa.Array](), list[Integers](), list[Integers]()
    for part in nightly.lake.batches("sids", live["sids_version"], ["item_id", "codes", "collision_rank"]):
        place = group(_codes(part, length))
        there = place >= 0
        ids.append(part["item_id"].filter(pa.array(there)))
        places.append(place[there])
        ranked.append(part["collision_rank"].to_numpy()[there])
    members, of_member, ranks = (
        pa.chunked_array(ids, pa.string()).combine_chunks(),
        np.concatenate(places),
        np.concatenate(ranked),
    )
    before, after = _rare(nightly, change, members)
    stays = ~pc.is_in(members, change.ids.filter(pa.array(change.of("changed", "removed")))).to_numpy(
        zero_copy_only=False
    )
    own, tail_only = group(codes), change.after.of(change.of("new", "changed")).tail_only()
    n = len(keys)
    size = (
        np.bincount(of_member, minlength=n),
        np.bincount(of_member[stays], minlength=n) + np.bincount(own, minlength=n),
    )
    few = (
        np.bincount(of_member, before, n),
        np.bincount(of_member[stays], after[stays], n) + np.bincount(own, tail_only, n),
    )
    groups, rares = (
        _resized(live["metrics"][name], *sides) for name, sides in (("group_sizes", size), ("tail_group_sizes", few))
    )
    shared = few[1][size[1] > 1].sum() - few[0][size[0] > 1].sum()
    member = pc.index_in(encoded["item_id"].combine_chunks(), members).fill_null(-1).to_numpy()
    previous = np.where(np.append(of_member, -1)[member] == own, np.append(ranks, -1)[member], -1)
    first = np.zeros(n, np.int64)
    np.maximum.at(first, of_member[stays], ranks[stays] + 1)
    np.maximum.at(first, own, previous + 1)
    return _ranks(own, first, previous, encoded), groups, rares, int(shared)


def _resized(known: list[list[int]], before: NDArray[Any], after: NDArray[Any]) -> _Sizes:
    """Return size -> number of groups, where some of the ``known`` groups have another size."""
    groups = Counter({size: number for size, number in known})
    groups.subtract(before.astype(np.int64).tolist())
    groups.update(after.astype(np.int64).tolist())
    return {size: number for size, number in groups.items() if size and number}


def _rare(nightly: NightlyRun, change: Change, members: pa.Array) -> tuple[Mask, Mask]:
    """Return the boolean masks of ``members`` that are tail or cold, before and after."""
    parts = nightly.lake.batches(
        "item_features", nightly.version, ["item_id", "stratum"], pc.field("item_id").isin(members)
    )
    schema = pa.schema([("item_id", pa.string()), ("stratum", pa.string())])
    rows = pa.Table.from_batches([part.cast(schema) for part in parts], schema)
    known = pc.is_in(
        rows["stratum"].take(pc.index_in(members, rows["item_id"].combine_chunks())),
        pa.array([STRATA[place] for place in RARE]),
    )
    place = pc.index_in(members, change.ids).fill_null(-1).to_numpy()
    found = pc.is_in(members, rows["item_id"].combine_chunks()).to_numpy(zero_copy_only=False)
    if (~found & (place < 0)).any():
        raise NeedsFullRun("a published item is not in item_features, and was not when it got its SID")
    now = known.to_numpy()
    return np.where(place < 0, now, change.before.tail_only()[place]), now


def _ranks(own: Integers, first: Integers, previous: Integers, encoded: pa.Table) -> pa.Array:
    """Return the rank of each row in its group ``own`` [n]: ``previous`` [n] where that is not -1; else by (events
    desc, item_id), starting at ``first`` of the group."""
    rows = pa.table(
        {
            "group": own,
            "interactions": encoded["interactions"],
            "item_id": encoded["item_id"],
            "row": np.arange(len(own)),
        }
    )
    rows = rows.filter(pa.array(previous < 0)).sort_by(
        [("group", "ascending"), ("interactions", "descending"), ("item_id", "ascending")]
    )
    groups = rows["group"].to_numpy()
    opens = np.flatnonzero(np.append(True, groups[1:] != groups[:-1])) if len(groups) else np.zeros(0, np.int64)
    ranks = previous.copy()
    ranks[rows["row"].to_numpy()] = (
        first[groups] + np.arange(len(groups)) - np.repeat(opens, np.diff(np.append(opens, len(groups))))
    )
    return pa.array(ranks, pa.int32())


def _churn_groups(change: Change, encoded: pa.Table, length: int) -> list[dict[str, Any]]:
    """Return the groups that :func:`changes.churned` takes."""
    fresh = change.of("new", "changed")
    changed = change.kind[fresh] == "changed"
    differ = _codes(encoded, length)[changed] != _codes(change.published.filter(pa.array(change.of("changed"))), length)
    moved, today = differ.any(1), change.after.of(change.of("changed"))
    groups = [{"stratum": None, "kind": "removed", "items": int(change.of("removed").sum()), "events": None}]
    for place, stratum in enumerate(STRATA):
        own, came = moved & (today.stratum == place), change.of("new") & (change.after.stratum == place)
        slots = {f"s{i}": int(count) for i, count in enumerate(differ[own].sum(0))}
        groups.append(
            {
                "stratum": stratum,
                "kind": "moved",
                "items": int(own.sum()),
                "events": int(today.events[own].sum()),
                **slots,
            }
        )
        groups.append(
            {
                "stratum": stratum,
                "kind": "new",
                "items": int(came.sum()),
                "events": int(change.after.events[came].sum()),
            }
        )
    return groups


def _moves(change: Change, encoded: pa.Table) -> pa.Table:
    """Return the rows of ``sid_changes`` without the generation."""
    fresh, gone = (pa.array(change.of(*kinds)) for kinds in (("new", "changed"), ("removed",)))
    codes = change.published["codes"].combine_chunks()
    why = pa.array(change.kind.astype(object), pa.string())
    came = {
        "item_id": change.ids.filter(fresh),
        "old_codes": codes.filter(fresh),
        "new_codes": encoded["codes"],
        "why": why.filter(fresh),
    }
    left = {"item_id": change.ids.filter(gone), "old_codes": codes.filter(gone), "why": why.filter(gone)}
    rows = pa.concat_tables([pa.table(came), pa.table(left)], promote_options="permissive")
    text = [
        pc.binary_join(pc.cast(rows[name], pa.list_(pa.string())), " ").fill_null("")
        for name in ("old_codes", "new_codes")
    ]
    return rows.filter(pc.not_equal(*text))


def _with(rows: pa.Table, **columns: object) -> pa.Table:
    """Append columns: arrays, or one value for all rows."""
    for name, value in columns.items():
        rows = rows.append_column(name, value if isinstance(value, pa.Array) else pa.repeat(value, rows.num_rows))
    return rows
