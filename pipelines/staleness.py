"""Find tables of the lake that lag behind their sources, by the lineage in their commits."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from adasid.errors import InputError
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext

_FEATURES = "run jobs/build_features.py"
_FIXES = {
    "content_embeddings": "run jobs/encode_content.py",
    "behavior_embeddings": "run jobs/train.py --stage behavior, then jobs/build_features.py",
    "item_features": _FEATURES,
    "item_stats": _FEATURES,
    "sids": "run jobs/retokenize.py",
}
_EVERY_RUN = {
    "item_features": {"items", "content_embeddings", "item_stats"},
    "item_stats": {"items", "content_embeddings", "interactions"},
    "content_embeddings": {"items"},
}
"""Maps a table to the sources that it must not lag behind when SIDs are computed from it. Behaviour embeddings may lag
until the next training."""


class Lag(NamedTuple):
    """A lag: ``table`` at ``version`` was computed from version ``read`` of ``source``, whose rows changed at ``since``
    and which is at ``newest`` now; ``pinned``: the config asks for that."""

    table: str
    version: int
    source: str
    read: int
    newest: int
    since: datetime
    pinned: bool


def behind(lake: Lake, table: str, version: int | None = None, read: Mapping[str, int] | None = None) -> list[Lag]:
    """Return the sources of ``table`` that are newer than those it was computed from; none where its commit does not
    name them. ``read``: source -> version, in place of what the commit names."""
    version = lake.version(table) if version is None else version
    result = []
    for source, used in (lake.lineage(table, version) if read is None else read).items():
        if newer := lake.newer(source, used):
            result.append(Lag(table, version, source, used, *newer, bool({table, source} & set(lake.pins))))
    return result


def lags(lake: Lake, table: str, version: int | None = None, read: Mapping[str, int] | None = None) -> list[Lag]:
    """Return :func:`behind` of a table and, recursively, of all its sources."""
    version = lake.version(table) if version is None else version
    sources = lake.lineage(table, version) if read is None else read
    behind_sources = behind(lake, table, version, sources)
    for source in sources:
        behind_sources += (
            [lag for lag in lags(lake, source) if lag not in behind_sources] if lake.exists(source) else []
        )
    return [lag._replace(pinned=lag.pinned or table in lake.pins) for lag in behind_sources]


def unrecorded(lake: Lake) -> str | None:
    """Return a sentence where ``behavior_embeddings`` are of a version of adasid that did not record their lineage:
    they may contain vectors of items without events, and know events of the current test split."""
    table = "behavior_embeddings"
    if not lake.exists(table) or not lake.input_hash(table) or lake.lineage(table, lake.version(table)):
        return None
    return f"{table} version {lake.version(table)} does not say what it was trained on: {_FIXES[table]}"


def sentences(lags: list[Lag]) -> list[str]:
    """Return a sentence for each table that lags, with the fix."""
    lines = []
    for table in dict.fromkeys(lag.table for lag in lags):
        lags_of_table = [lag for lag in lags if lag.table == table]
        parts = [f"{lag.source} (read at version {lag.read}, now {lag.newest}: {_newer(lag)})" for lag in lags_of_table]
        fix = "pinned by the config" if all(lag.pinned for lag in lags_of_table) else _FIXES.get(table, _FEATURES)
        lines.append(f"{table} version {lags_of_table[0].version} lags behind {' and '.join(parts)}: {fix}")
    return lines


def _newer(lag: Lag) -> str:
    return f"{lag.newest - lag.read} newer, since {lag.since:%Y-%m-%d %H:%M} UTC"


def check(context: StageContext, version: int) -> None:
    """Note which tables below ``item_features`` at ``version`` lag. Raises InputError where new or changed items or
    events would be missed."""
    result = lags(context.lake, "item_features", version)
    missed = [lag for lag in result if not lag.pinned and lag.source in _EVERY_RUN.get(lag.table, ())]
    if missed:
        lines = (line.removesuffix(f": {_FEATURES}") for line in sentences(missed))
        raise InputError(f"{'; '.join(lines)}: {_FEATURES}, then this job again")
    for line in [*sentences(result), *filter(None, [unrecorded(context.lake)])]:
        context.note(line)
    if result:
        context.facts["lagging"] = ", ".join(dict.fromkeys(lag.table for lag in result))
