"""Manage generations of the semantic-ID table: read the live one, publish a new one, roll back to an older one.

A publication is a sequence of commits: ``sids``, ``sid_changes``, ``generations``, then the pointer ``live``. A reader
follows the pointer to a version of ``sids``, so it sees the old table or the new one. The next run of the same job on
the same inputs resumes an interrupted publication; until then it has no effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError
from pydantic import BaseModel, ConfigDict

from adasid import tables
from adasid.errors import BusyError, GateError, InputError
from adasid.storage import delta_options
from pipelines.engines.lake import Lake, committed, properties
from pipelines.engines.tracking import StageContext
from pipelines.publish.gates import Gate, Metrics

_ROLLBACK = "rollback to"
_JSON = ("inputs", "gates", "metrics", "drift", "churn")
"""These columns of ``generations`` contain JSON."""


class Candidate(BaseModel):
    """A candidate is a generation before it is published. ``generation``: its number; ``policy``: ``full``, ``frozen``,
    ``warm`` or ``refit``; ``run_date``: of the nightly run, None outside of it; ``inputs``: table -> version that was
    read; ``tokenizer``: digest of the artifact in the folder ``artifact``; ``metrics``: of
    :func:`pipelines.publish.measure.measure`; ``churn``: of :func:`pipelines.publish.churn.churned`, empty for the
    first generation; ``drift``: of :mod:`pipelines.publish.drift`."""

    model_config = ConfigDict(frozen=True)

    generation: int
    policy: str
    run_date: str | None
    inputs: dict[str, int]
    tokenizer: str
    artifact: str
    items: int
    metrics: Metrics
    gates: tuple[Gate, ...]
    churn: Metrics
    drift: dict[str, Any]


class Generation(Candidate):
    """A generation is a published candidate. ``parent``: the generation that was live before; ``sids_version``: of its
    rows; ``run``: name of the run; ``live``: whether the pointer is on it; ``hold``: the time since which it is on
    hold, None where it is not."""

    parent: int | None
    sids_version: int
    run: str
    live: bool = False
    hold: str | None = None

    def row(self) -> dict[str, Any]:
        """Return the row of the table ``generations``."""
        values = self.model_dump(exclude={"live", "hold"})
        return values | {name: json.dumps(values[name]) for name in _JSON}


def history(lake: Lake) -> list[Generation]:
    """Return all generations, oldest first."""
    if not lake.exists("generations"):
        return []
    number, since = pointer(lake), on_hold(lake)
    rows = sorted(lake.read("generations").to_pylist(), key=lambda row: row["generation"])
    generations = list[Generation]()
    for row in rows:
        parsed, live = {name: json.loads(row[name]) for name in _JSON}, row["generation"] == number
        generations.append(Generation(**{**row, **parsed, "live": live, "hold": since if live else None}))
    return generations


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
    generation = next((generation for generation in history(lake) if generation.live), None)
    if generation is None:
        raise InputError(f"nothing is published in {lake.root}: run jobs/write_sids.py, or jobs/run_all.py, first")
    return generation


def settled(lake: Lake, key: str) -> bool:
    """Return whether the newest generation carries ``key`` and is live or was live before a roll-back."""
    return lake.fresh(key, "sids", "generations") and lake.made("live", key) is not None


def next_number(lake: Lake) -> int:
    """Return the number after the last recorded generation, live or not."""
    return max((generation.generation for generation in history(lake)), default=0) + 1


def publish(
    context: StageContext,
    key: str,
    candidate: Candidate,
    expected: int | None,
    write_sids: Callable[[], object],
    write_changes: Callable[[], object] | None,
    before_live: Callable[[Generation], None] = lambda generation: None,
    allowed: Callable[[], None] = lambda: None,
) -> Generation:
    """Publish what ``write_sids`` and ``write_changes`` (rows of ``sid_changes`` against the live generation) commit
    as the generation ``candidate``, whose number is :func:`next_number`; return the generation.

    ``key``: input hash of the rows, which their commits carry; a step whose commit carries it is not repeated.
    ``expected``: the generation that was live when the work began. ``before_live``: is called before the pointer moves.
    ``allowed``: is called before every commit, and raises where this process may no longer publish.

    Raises GateError where the live generation is on hold, BusyError where another run published meanwhile.
    """
    lake = context.lake
    check_hold(lake)
    before = snapshot(lake)  # the commits of live and generations succeed only on the versions that are read here
    recorded = lake.delta("generations") if lake.exists("generations") else None
    parent = pointer(lake)
    if parent != expected:
        raise BusyError(
            f"generation {parent} went live in {lake.root} while this run was at work on {expected}: run it again"
        )
    last = history(lake)[-1] if lake.fresh(key, "generations") else None  # recorded, but interrupted before it was live
    if last and last.parent == parent:
        generation = last
    else:  # changes and churn of ``last`` are against another generation
        allowed()
        if last or not lake.fresh(key, "sids"):
            write_sids()
        version = lake.made("sids", key)
        if version is None:
            raise BusyError(
                f"the rows of generation {candidate.generation} cannot be found in {lake.path('sids')}: another run "
                "replaced them; run this one again"
            )
        if write_changes is not None and parent is not None:
            allowed()
            write_changes()
        generation = Generation(**dict(candidate), parent=parent, sids_version=version, run=context.cfg.name)
        allowed()
        _record(lake, recorded, generation, key)
    before_live(generation)
    allowed()
    _point(lake, before, generation, key)
    context.outputs(
        {"sids": generation.sids_version, "generations": lake.version("generations"), "live": lake.version("live")}
    )
    return generation.model_copy(update={"live": True})


def go_back(context: StageContext, number: int, hold: bool = False) -> Generation:
    """Make generation ``number`` live again, and put it on ``hold`` until :func:`release`; an existing hold stays.
    Raises InputError where there is no such generation, or its rows were vacuumed."""
    lake, before = context.lake, snapshot(context.lake)
    existing = {generation.generation: generation for generation in history(lake)}
    if number not in existing:
        known = f"{min(existing)} to {max(existing)}" if existing else "none"
        raise InputError(f"generation {number} does not exist (existing: {known}): name one of them with --to")
    generation = existing[number]
    missing = lake.missing("sids", generation.sids_version)
    if missing:
        raise InputError(
            f"generation {number} cannot be read any more: {len(missing)} of its files were vacuumed; choose a later "
            "one"
        )
    since = on_hold(lake)
    if generation.live and (since or not hold):
        context.status = "up to date"
    else:
        _point(lake, before, generation, f"{_ROLLBACK} {number}", hold or since is not None)
    return generation


def release(context: StageContext) -> Generation:
    """End the hold of the live generation; return that generation."""
    generation, before = live(context.lake), snapshot(context.lake)
    if on_hold(context.lake):
        _point(context.lake, before, generation, f"release {generation.generation}")
    else:
        context.status = "up to date"
    return generation


def snapshot(lake: Lake) -> DeltaTable:
    """Return the pointer's table at its current version; create it if it is missing."""
    options = delta_options(lake.root)
    DeltaTable.create(lake.path("live"), schema=tables.LIVE, mode="ignore", storage_options=options)
    return lake.delta("live")


def _record(lake: Lake, recorded: DeltaTable | None, generation: Generation, key: str) -> None:
    """Add the row of a generation. Raises BusyError where another run has added one since ``recorded`` was read (None:
    there was no table)."""
    row, input_hash = pa.Table.from_pylist([generation.row()], schema=tables.GENERATIONS), properties(key, retries=0)
    try:
        if recorded is None:
            options = delta_options(lake.root)
            write_deltalake(
                lake.path("generations"), row, mode="error", commit_properties=input_hash, storage_options=options
            )
        else:
            write_deltalake(recorded, row, mode="append", commit_properties=input_hash)
    except DeltaError as error:
        if not isinstance(error, CommitFailedError) and "already exists" not in str(error):
            raise
        raise BusyError(
            f"generation {generation.generation} is not recorded: another run wrote to {lake.path('generations')} "
            "meanwhile; run this one again"
        ) from None


def _point(lake: Lake, before: DeltaTable, generation: Generation, key: str, hold: bool = False) -> None:
    """Move the pointer. Raises BusyError where another run has moved it since ``before`` was read."""
    row = {"generation": generation.generation, "sids_version": generation.sids_version, "hold": hold}
    written, input_hash = pa.Table.from_pylist([row], schema=tables.LIVE), properties(key, retries=0)
    try:
        write_deltalake(before, written, mode="overwrite", schema_mode="overwrite", commit_properties=input_hash)
    except CommitFailedError:
        raise BusyError(
            f"generation {generation.generation} is not live: another run moved the pointer of {lake.root} meanwhile; "
            "run this one again"
        ) from None
