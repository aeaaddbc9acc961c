"""Declare what stages read, write and depend on; :func:`run` resolves versions, hashes, decides and records.

Each (table, version) is resolved once, before anything is hashed or read. The body then reads through a lake that is
pinned to these versions and that refuses any table which the stage does not declare. So the output is computed from the
versions that were hashed, whatever other processes commit meanwhile, and the next run notices those commits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from deltalake import DeltaTable
from pydantic import BaseModel

from adasid.config import Config, digest
from adasid.files import write_json
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.run import Run

_LONG = 60


class Inputs(NamedTuple):
    """Inputs are what one run of a stage depends on. ``cfg``: the config, with the values decided from the data;
    ``versions``: table -> version; ``input_hashes``: table -> input hash of that version; ``settings``: dotted key ->
    value; ``hash``: the input hash of all of them; ``lake``: pinned to ``versions``, and refusing what the stage does
    not declare."""

    cfg: Config
    versions: dict[str, int]
    input_hashes: dict[str, str]
    settings: dict[str, object]
    hash: str
    lake: Lake


def nothing(cfg: Config) -> tuple[str, ...]:
    """Return no table."""
    return ()


@dataclass(frozen=True)
class Stage:
    """A stage is a step of the pipeline.

    ``name``: shown to users; ``reads`` and ``writes``: its tables; ``appends``: tables to which it adds rows in a
    separate transaction, and to which other stages may add too; ``also``: tables that it reads where they exist, which
    are not hashed as they decide nothing; ``uses`` and ``makes``: artifacts outside the lake, by name; ``settings``:
    dotted config key -> value of what counts besides the tables; ``unhashed``: those of them that change how rows are
    stored and no row, so that they are not hashed; ``body``: does the work and returns the versions that it wrote;
    ``decide``: the config with the values decided from the pinned lake; ``fresh``: whether the output of an input hash
    exists (default: the latest version of each table in ``writes`` carries it); ``prefix``: first part of the input
    hash.
    """

    name: str
    engine: Literal["spark", "ray", "python"]
    reads: Callable[[Config], tuple[str, ...]]
    writes: Callable[[Config], tuple[str, ...]]
    settings: Callable[[Config, Lake], Mapping[str, object]]
    body: Callable[[Inputs, StageContext], Mapping[str, int]]
    prefix: str
    appends: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    unhashed: frozenset[str] = frozenset()
    decide: Callable[[Config, Lake], Config] = field(default=lambda cfg, lake: cfg)
    fresh: Callable[[Inputs, Lake], bool] | None = None


class Undeclared(AssertionError):
    """Raised where a stage's body reads or writes a table that the stage does not declare: a fault of the code, not of
    its input."""


@dataclass(frozen=True)
class StageLake(Lake):
    """This lake opens only the tables in ``readable`` and replaces only those in ``writable_tables``."""

    stage: str = ""
    readable: frozenset[str] = frozenset()
    writable_tables: frozenset[str] = frozenset()

    def open(self, table: str, version: int | None = None) -> DeltaTable:
        """Open as :meth:`Lake.open`. Raises Undeclared for a table that the stage declares in no way."""
        if table not in self.readable | self.writable_tables:
            raise Undeclared(f"stage {self.stage} reads {table}, which it does not declare")
        return super().open(table, version)

    def target(self, table: str) -> str:
        """Return the same as :meth:`Lake.target`. Raises Undeclared for a table that the stage does not write."""
        if table not in self.writable_tables:
            raise Undeclared(f"stage {self.stage} writes {table}, which it does not declare")
        return super().target(table)


def resolve(stage: Stage, cfg: Config, lake: Lake) -> Inputs:
    """Resolve the version of each table that the stage reads, once, and hash. Raises InputError for a missing table."""
    versions = lake.versions(*stage.reads(cfg))
    writable = frozenset((*stage.writes(cfg), *stage.appends))
    also = lake.versions(*(table for table in stage.also if lake.exists(table)))
    pinned = StageLake(
        lake.root, {**lake.pins, **also, **versions}, stage.name, frozenset({**also, **versions}), writable
    )
    decided = stage.decide(cfg, pinned)
    input_hashes = lake.input_hashes(versions)
    settings = dict(stage.settings(decided, pinned))
    counted = [value for key, value in settings.items() if key not in stage.unhashed]
    parts = (*counted, input_hashes) if versions else counted
    return Inputs(decided, versions, input_hashes, settings, digest(stage.prefix, *parts), pinned)


def up_to_date(stage: Stage, inputs: Inputs, lake: Lake) -> bool:
    """Return whether the stage's output was computed from these inputs."""
    if stage.fresh:
        return stage.fresh(inputs, lake)
    return lake.fresh(inputs.hash, *stage.writes(inputs.cfg))


def check_fresh(stage: Stage, cfg: Config, lake: Lake) -> bool:
    """Return whether the stage is up to date now."""
    return up_to_date(stage, resolve(stage, cfg, lake), lake)


def run(stage: Stage, cfg: Config, context: StageContext, inputs: Inputs | None = None) -> Inputs | None:
    """Run the stage unless its output is up to date; return its inputs, or None where it is.

    Notes why it runs, records the versions that were read and written in MLflow, and the inputs of the output in the
    run's folder. Raises what the body raises.
    """
    inputs = inputs or resolve(stage, cfg, context.lake)
    context.inputs(inputs.versions)
    if up_to_date(stage, inputs, context.lake):
        return None
    if context.journal:
        context.note(f"{stage.name} runs: {reason(stage, inputs, context.lake)}")
    with _only(context, inputs.lake):
        written = stage.body(inputs, context)
    context.outputs(written)
    if not context.journal:  # a cell of a comparison: many cells share a stage
        return inputs
    path = Run(cfg).record(stage.name)
    produced = {
        "hash": inputs.hash,
        "versions": inputs.versions,
        "input_hashes": inputs.input_hashes,
        "settings": flat(inputs.settings),
    }
    write_json(path, produced)
    return inputs


@contextmanager
def _only(context: StageContext, lake: Lake) -> Iterator[None]:
    """Restrict the body to the pinned lake."""
    outer, context.lake = context.lake, lake
    try:
        yield
    finally:
        context.lake = outer


def reason(stage: Stage, inputs: Inputs, lake: Lake) -> str:
    """Return why the stage is not up to date: the tables, versions and settings that differ from those of the last
    run."""
    for table in stage.writes(inputs.cfg):
        if not lake.exists(table):
            return f"no output yet (table {table})"
    last = recorded(stage, inputs.cfg)
    if last is None:
        return "no output yet" if not stage.writes(inputs.cfg) else "no record of the inputs of its output"
    changes = [
        f"{table} is at version {version}, was {last['versions'].get(table, 'not read')}"
        for table, version in inputs.versions.items()
        if last["input_hashes"].get(table) != inputs.input_hashes[table]
    ]
    old, new = last["settings"], json.loads(json.dumps(flat(inputs.settings), default=str))
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if before != after:
            short = all(len(str(value)) <= _LONG for value in (before, after))
            changes.append(f"{key} {before} -> {after}" if short else f"{key} changed")
    return "; ".join(changes) or "its output was replaced or removed since"


def recorded(stage: Stage, cfg: Config) -> dict[str, Any] | None:
    """Return the recorded inputs of the stage's last output; None where the run's folder has no record."""
    path = Run(cfg).record(stage.name)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def flat(settings: Mapping[str, object]) -> dict[str, Any]:
    """Flatten nested settings into dotted keys and plain values."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        if isinstance(plain, Mapping) and plain:
            result |= flat({f"{key}.{name}": part for name, part in plain.items()})
        else:
            result[key] = list(plain) if isinstance(plain, tuple) else plain
    return result
