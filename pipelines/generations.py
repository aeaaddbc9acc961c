"""Manage generations of the semantic-ID table: read the live one, publish a new one, roll back to an older one.

A publication is a sequence of commits: ``sids``, ``sid_changes``, ``generations``, then the pointer ``live``. A reader
follows the pointer to a version of ``sids``, so it sees the old table or the new one. The next run of the same job on
the same inputs resumes an interrupted publication; until then it has no effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError

from adasid import tables
from adasid.errors import BusyError, GateError, InputError
from pipelines.engines.lake import Lake, committed, properties
from pipelines.engines.tracking import StageContext

Generation = dict[str, Any]
_ROLLBACK = "rollback to"
_JSON = ("inputs", "gates", "metrics", "drift", "churn")


def history(lake: Lake) -> list[Generation]:
    """Return all generations, oldest first, with their JSON parsed; ``live``: whether the pointer is on it; ``hold``:
    the time since which it is on hold, else None."""
    if not lake.exists("generations"):
        return []
    at, since = pointer(lake), on_hold(lake)
    rows = sorted(lake.read("generations").to_pylist(), key=lambda row: row["generation"])
    state = [{"live": row["generation"] == at, "hold": since if row["generation"] == at else None} for row in rows]
    return [{**row, **{name: json.loads(row[name]) for name in _JSON}, **own} for row, own in zip(rows, state)]


def pointer(lake: Lake) -> int | None:
    """Return the number of the live generation, None if there is none."""
    rows = lake.read("live").to_pylist() if lake.exists("live") else []
    return int(rows[0]["generation"]) if rows else None


def on_hold(lake: Lake) -> str | None:
    """Return the time since which the live generation is on hold, as text; None where it is not."""
    rows = lake.read("live").to_pylist() if lake.exists("live") else []
    if not rows or not rows[0].get("hold"):
        return None
    return f"{committed(next(lake.writes('live'))):%Y-%m-%d %H:%M} UTC"


def check_hold(lake: Lake) -> None:
    """Raise GateError where the live generation is on hold."""
    if since := on_hold(lake):
        fix = "`python jobs/rollback.py --config FILE --release`"
        raise GateError(f"generation {pointer(lake)} is on hold since {since}: nothing is published until {fix}")


def live(lake: Lake) -> Generation:
    """Return the live generation. Raises InputError where nothing was published."""
    found = next((row for row in history(lake) if row["live"]), None)
    if found is None:
        raise InputError(f"nothing is published in {lake.root}: run jobs/write_sids.py, or jobs/run_all.py, first")
    return found


def settled(lake: Lake, key: str) -> bool:
    """Return whether the newest generation carries ``key`` and is live or was live before a roll-back."""
    return lake.fresh(key, "sids", "generations") and lake.made("live", key) is not None


def next_number(lake: Lake) -> int:
    """Return the number after the last recorded generation, live or not."""
    return max((row["generation"] for row in history(lake)), default=0) + 1


def publish(
    context: StageContext,
    key: str,
    facts: Mapping[str, Any],
    expected: int | None,
    write_sids: Callable[[], object],
    write_changes: Callable[[], object] | None,
    before_live: Callable[[Generation], None] = lambda row: None,
    allowed: Callable[[], None] = lambda: None,
) -> Generation:
    """Publish what ``write_sids`` and ``write_changes`` (rows of ``sid_changes`` against the live generation) commit;
    return the new generation.

    ``key``: input hash of the rows, which their commits carry; a step whose commit carries it is not repeated.
    ``facts``: the row of ``generations`` except the columns added here; its number is :func:`next_number`.
    ``expected``: the generation that was live when the work began. ``before_live``: is called before the pointer moves.
    ``allowed``: is called before every commit, and raises where this process may no longer publish.

    Raises GateError where the live generation is on hold, BusyError where another run published meanwhile.
    """
    lake = context.lake
    check_hold(lake)
    parent = pointer(lake)
    if parent != expected:
        raise BusyError(
            f"generation {parent} went live in {lake.root} while this run was at work on {expected}: run it again"
        )
    before = snapshot(lake)
    if lake.fresh(key, "generations"):  # recorded, but interrupted before it was live
        row = history(lake)[-1]
    else:
        number = facts["generation"]
        allowed()
        if not lake.fresh(key, "sids"):
            write_sids()
        version = lake.made("sids", key)
        if version is None:
            raise BusyError(
                f"the rows of generation {number} cannot be found in {lake.path('sids')}: another run replaced them; "
                "run this one again"
            )
        if write_changes is not None and parent is not None:
            allowed()
            write_changes()
        row = {"parent": parent, "sids_version": version, "run": context.cfg.name, **facts}
        text = {name: json.dumps(row[name]) for name in _JSON}
        allowed()
        written = pa.Table.from_pylist([{**row, **text}], schema=tables.GENERATIONS)
        target = DeltaTable(lake.path("generations")) if lake.exists("generations") else lake.path("generations")
        write_deltalake(target, written, mode="append", commit_properties=properties(key, retries=0))
    before_live(row)
    allowed()
    _point(lake, before, row, key)
    context.outputs(
        {"sids": row["sids_version"], "generations": lake.version("generations"), "live": lake.version("live")}
    )
    return {**row, "live": True}


def go_back(context: StageContext, number: int, hold: bool = False) -> Generation:
    """Make generation ``number`` live again, and put it on ``hold`` until :func:`release`; an existing hold stays.
    Raises InputError where there is no such generation, or its rows were vacuumed."""
    lake, before = context.lake, snapshot(context.lake)
    rows = {row["generation"]: row for row in history(lake)}
    if number not in rows:
        known = f"{min(rows)} to {max(rows)}" if rows else "none"
        raise InputError(f"generation {number} does not exist (existing: {known}): name one of them with --to")
    row = rows[number]
    gone = lake.missing("sids", row["sids_version"])
    if gone:
        raise InputError(
            f"generation {number} cannot be read any more: {len(gone)} of its files were vacuumed; choose a later one"
        )
    since = on_hold(lake)
    if row["live"] and (since or not hold):
        context.status = "up to date"
    else:
        _point(lake, before, row, f"{_ROLLBACK} {number}", hold or since is not None)
    return row


def release(context: StageContext) -> Generation:
    """End the hold of the live generation; return that generation."""
    row, before = live(context.lake), snapshot(context.lake)
    if on_hold(context.lake):
        _point(context.lake, before, row, f"release {row['generation']}")
    else:
        context.status = "up to date"
    return row


def snapshot(lake: Lake) -> DeltaTable:
    """Return the pointer's table at its current version; create it if it is missing."""
    DeltaTable.create(lake.path("live"), schema=tables.LIVE, mode="ignore")
    return DeltaTable(lake.path("live"))


def _point(lake: Lake, before: DeltaTable, row: Generation, key: str, hold: bool = False) -> None:
    """Move the pointer. Raises BusyError where another run has moved it since ``before`` was read."""
    state = {"generation": row["generation"], "sids_version": row["sids_version"], "hold": hold}
    there, input_hash = pa.Table.from_pylist([state], schema=tables.LIVE), properties(key, retries=0)
    try:
        write_deltalake(before, there, mode="overwrite", schema_mode="overwrite", commit_properties=input_hash)
    except CommitFailedError:
        raise BusyError(
            f"generation {row['generation']} is not live: another run moved the pointer of {lake.root} meanwhile; run "
            "this one again"
        ) from None
