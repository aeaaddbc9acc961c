"""Run a nightly run without Spark, at the cost of its changes, where few items have other vectors and the codebooks
stay.

Only vectors of changed items are encoded. Counts of the new table follow from those of the live generation and the rows
that differ; of the published table the items and codes are scanned, and merged into. All exceptions (a fault, a gate
that fails, a version that is gone, drift that asks for training) are left to Spark, which reads the whole table and
reports the error.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from deltalake.exceptions import DeltaError

from adasid.errors import first_line
from adasid.faults import wrapped
from adasid.metrics.tally import Tally
from adasid.sid import Slot
from adasid.tables import SID_CHANGES, SIDS, STRATA
from adasid.tokenizers.artifact import Manifest
from adasid.tokenizers.base import Tokenizer
from adasid.tokenizers.encode import ENCODED, READ, encode_rows
from pipelines.engines import memory
from pipelines.nightly import changes, differences, verdict
from pipelines.nightly.differences import Change, Integers, NeedsFullRun, Side
from pipelines.nightly.nightly_run import NightlyRun
from pipelines.nightly.regroup import code_matrix, regroup
from pipelines.nightly.verdict import Measurements
from pipelines.publish import drift, generations
from pipelines.publish.churn import churned
from pipelines.publish.generations import Candidate

_FILES = 64
"""From this many files of ``sids`` Spark runs the nightly run and rewrites the table: every small run may add a
file."""


@dataclass(frozen=True)
class _Prepared:
    """A prepared run can be published as ``candidate``. ``manifest``: of its tokenizer; ``version``: of ``sids``, to
    which ``rows`` are added and in which the items ``removed`` are deleted; ``moves``: rows of ``sid_changes``."""

    candidate: Candidate
    manifest: Manifest
    version: int
    rows: pa.Table
    moves: pa.Table
    removed: pa.Array


def publish(nightly: NightlyRun) -> bool:
    """Publish the nightly run, or report that nothing changed; return False, with nothing done, where it needs Spark.
    Raises InputError where the tables cannot be written, BusyError where another run was faster."""
    try:
        how, counts, prepared = _prepare(nightly)
    except (NeedsFullRun, OSError, DeltaError, pa.ArrowException) as error:
        if str(error):
            nightly.context.note(f"full run on Spark: {first_line(error)}")
        return False
    nightly.note_changes(how, counts)
    if prepared is None:
        nightly.unchanged()
        return True
    candidate = prepared.candidate
    nightly.track(candidate)
    nightly.context.note("policy frozen, without Spark")
    input_hash, where = nightly.input_hash("frozen", candidate.tokenizer), f"generation = {candidate.generation}"
    try:
        nightly.publish(
            candidate,
            prepared.manifest,
            input_hash,
            lambda: nightly.lake.change("sids", prepared.version, prepared.rows, prepared.removed, input_hash),
            lambda: nightly.lake.put("sid_changes", prepared.moves, where, input_hash),
        )
    except (OSError, DeltaError, pa.ArrowException) as error:
        raise wrapped(
            error,
            f"nightly run of {nightly.day}: its table or files cannot be written below {nightly.cfg.run_dir} "
            f"({first_line(error)}); generation "
            f"{generations.pointer(nightly.lake)} stays live: mend the disk or the table, then run it again",
        ) from error
    return True


def _prepare(nightly: NightlyRun) -> tuple[str, Counter[str], _Prepared | None]:
    """Return how changes were detected, how many items differ in each way, and the prepared run, None where no SID
    can change. Raises NeedsFullRun, or what reading raises, where this module cannot handle the run."""
    settings, live, since = nightly.cfg.retokenize, nightly.live, nightly.live.inputs["item_features"]
    if settings.policy not in {"frozen", "auto"} or not settings.small_night:
        raise NeedsFullRun
    if live.items > settings.small_table:
        raise NeedsFullRun(f"{live.items} items are more than retokenize.small_table")
    _check_memory(nightly)
    if "counts" not in live.drift or "tail_group_sizes" not in live.metrics:
        raise NeedsFullRun(f"generation {live.generation} was published without its counts")
    version = _base(nightly)
    tokenizer, manifest = nightly.champion()
    torch.set_num_threads(1)  # as on Spark's workers, so that results agree
    by_feed = changes.followed(nightly.lake, since, nightly.version)
    change, by_feed = differences.read(nightly, since, by_feed)
    how = changes.how(by_feed)
    if change is None:
        return how, Counter(), None
    counts = Counter({str(kind): int(n) for kind, n in zip(*np.unique(change.kind, return_counts=True))})
    if set(counts) <= {"same"}:
        return how, counts, None
    encoded = _encoded(nightly, since, change, tokenizer)
    ranks, measured = _measured(nightly, change, encoded, nightly.slots(manifest))
    number = generations.next_number(nightly.lake)
    candidate = verdict.candidate(nightly.cfg, live, nightly.version, measured, number, "frozen", nightly.day)
    failed = [gate.gate for gate in candidate.gates if not gate.passed]
    if failed:
        raise NeedsFullRun(f"gate {failed[0]}")
    if verdict.policy(nightly.cfg, measured.drifted) != "frozen":
        raise NeedsFullRun("drift asks for another tokenizer")
    rows = _with(encoded, generation=number, tokenizer=manifest.digest, collision_rank=ranks)
    moves = _with(_moves(change, encoded), generation=number)
    removed = change.ids.filter(pa.array(change.of("removed")))
    return (
        how,
        counts,
        _Prepared(
            candidate,
            manifest,
            version,
            rows.select(SIDS.names).cast(SIDS),
            moves.select(SID_CHANGES.names).cast(SID_CHANGES),
            removed,
        ),
    )


def _check_memory(nightly: NightlyRun) -> None:
    """Raise NeedsFullRun where the live table could take more memory than is left beside the JVM."""
    whole, heap = memory.limit(), memory.jvm(nightly.cfg.spark.driver_memory)
    needed, left = memory.small_night(nightly.live.items), whole - heap - memory.taken()
    if needed > left:
        raise NeedsFullRun(
            f"{nightly.live.items} items take up to {needed / 2**30:.1f} GiB outside the JVM, and of the limit of "
            f"{whole / 2**30:.1f} GiB only {max(0, left) / 2**30:.1f} GiB are left beside this process and a heap of "
            f"{heap / 2**30:.1f} GiB: raise the limit of the container, or lower the driver's memory"
        )


def _base(nightly: NightlyRun) -> int:
    """Return the newest version of ``sids``. Raises NeedsFullRun unless it has the live rows, or those of this very
    run, which was interrupted."""
    newest = nightly.lake.delta("sids")
    files = newest.file_uris()
    if not nightly.lake.fresh(nightly.input_hash("frozen", nightly.live.tokenizer), "sids"):
        if set(files) != set(nightly.lake.open("sids", nightly.live.sids_version).file_uris()):
            raise NeedsFullRun("the newest rows of sids are not the live ones")
        if len(files) > _FILES:
            raise NeedsFullRun(f"sids has {len(files)} files and is rewritten")
    return int(newest.version())


def _encoded(nightly: NightlyRun, since: int, change: Change, tokenizer: Tokenizer) -> pa.Table:
    """Return rows of :data:`ENCODED` of the new and changed items, in their order; they are also encoded in that order,
    so that the batches in which they are read do not matter. Raises NeedsFullRun where one is missing or faulty."""
    mask = pa.array(change.of("new", "changed"))
    ids, previous = change.ids.filter(mask), change.published["codes"].combine_chunks().filter(mask)
    rows = differences.vectors(nightly, since, change, list(READ), list(tokenizer.widths))
    rows = _with(
        rows, sampled=drift.in_sample_rows(ids, nightly.live.drift["baseline"]["every"]), published=previous
    ).combine_chunks()
    batches = rows.to_batches(max_chunksize=nightly.cfg.sids.batch)
    encoded = pa.Table.from_batches(
        [encode_rows(tokenizer, batch, nightly.cfg.retokenize.slack) for batch in batches], ENCODED
    ).combine_chunks()
    if pc.any(encoded["fault"].is_valid()).as_py():
        raise NeedsFullRun("vectors with faults")
    return encoded


def _measured(
    nightly: NightlyRun, change: Change, encoded: pa.Table, slots: list[Slot]
) -> tuple[pa.Array, Measurements]:
    """Return the collision ranks of the rows ``encoded``, and the measurements of the whole table with them."""
    live, was, now, same = nightly.live, ~change.of("new"), change.of("new", "changed"), change.of("same")
    baseline, length = live.drift["baseline"], len(slots)
    old, unchanged = change.published.filter(pa.array(was)), change.published.filter(pa.array(same))
    new = pa.concat_tables(
        [encoded.select([*verdict.MEASURED]), unchanged.select([*verdict.MEASURED])], promote_options="permissive"
    )
    before = change.before.of(was)
    after = Side(
        *(
            np.concatenate([getattr(change.after.of(part), name) for part in (now, same)])
            for name in ("stratum", "events")
        )
    )
    groups = regroup(nightly, change, code_matrix(encoded, length), encoded)
    known = Tally.known(live.metrics, slots)
    tallies = _tally(slots, old, before), _tally(slots, new, after)
    tally = known.changed(*tallies, groups.sizes, groups.tail_sizes, known.shared + groups.shared)
    if not tally.sound():
        raise NeedsFullRun("the counts of the live generation are not those of its rows")
    metrics = tally.metrics(slots)
    edges, stride = baseline["edges"], baseline["every"]
    sampled = [_sampled(rows["gauges"], side.stratum, edges) for rows, side in ((old, before), (new, after))]
    counts = drift.changed(live.drift["counts"], *sampled)
    drifted = drift.against(baseline, drift.described(nightly.lake, counts, stride, edges))
    return groups.ranks, Measurements(
        folder=nightly.artifact,
        tokenizer=live.tokenizer,
        metrics=metrics,
        churn=churned(_churn_groups(change, encoded, length), metrics, live.items),
        baseline=baseline,
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
        slots, code_matrix(rows, len(slots)), weights.astype(np.float64), active.astype(bool), side.stratum, side.events
    )


def _sampled(gauges: pa.ChunkedArray, strata: Integers, edges: dict[str, list[float]]) -> dict[str, drift.Counts]:
    """Count the norms and errors of rows, whose ``strata`` [n] are given."""
    gauges = gauges.combine_chunks()
    flat, row = gauges.flatten(), pc.list_parent_indices(gauges).to_numpy()
    modality, norm, error = (flat.field(name).to_numpy(zero_copy_only=False) for name in ("modality", "norm", "error"))
    return drift.counted(modality, np.array(STRATA, object)[strata[row]], norm, error.astype(np.float64), edges)


def _churn_groups(change: Change, encoded: pa.Table, length: int) -> list[dict[str, Any]]:
    """Return the groups that :func:`pipelines.publish.churn.churned` takes."""
    changed = change.kind[change.of("new", "changed")] == "changed"
    differ = code_matrix(encoded, length)[changed] != code_matrix(
        change.published.filter(pa.array(change.of("changed"))), length
    )
    moved, current = differ.any(1), change.after.of(change.of("changed"))
    groups = [{"stratum": None, "kind": "removed", "items": int(change.of("removed").sum()), "events": None}]
    for index, stratum in enumerate(STRATA):
        moved_here, new_here = moved & (current.stratum == index), change.of("new") & (change.after.stratum == index)
        slots = {f"s{i}": int(count) for i, count in enumerate(differ[moved_here].sum(0))}
        groups.append(
            {
                "stratum": stratum,
                "kind": "moved",
                "items": int(moved_here.sum()),
                "events": int(current.events[moved_here].sum()),
                **slots,
            }
        )
        groups.append(
            {
                "stratum": stratum,
                "kind": "new",
                "items": int(new_here.sum()),
                "events": int(change.after.events[new_here].sum()),
            }
        )
    return groups


def _moves(change: Change, encoded: pa.Table) -> pa.Table:
    """Return the rows of ``sid_changes`` without the generation."""
    encoded_mask, removed_mask = (pa.array(change.of(*kinds)) for kinds in (("new", "changed"), ("removed",)))
    codes = change.published["codes"].combine_chunks()
    why = pa.array(change.kind.astype(object), pa.string())
    current = {
        "item_id": change.ids.filter(encoded_mask),
        "old_codes": codes.filter(encoded_mask),
        "new_codes": encoded["codes"],
        "why": why.filter(encoded_mask),
    }
    removed = {
        "item_id": change.ids.filter(removed_mask),
        "old_codes": codes.filter(removed_mask),
        "why": why.filter(removed_mask),
    }
    rows = pa.concat_tables([pa.table(current), pa.table(removed)], promote_options="permissive")
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
