"""Check the lake's format number, as every job does, and migrate an older lake.

Format 1: one table ``catalog_stats`` with the statistics of both features stages; the input hash is a column ``run``.
Format 2: the second stage writes ``richness_stats``; the column is ``input_hash``, in ``rejected_rows`` too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from adasid import tables
from adasid.errors import InputError
from adasid.files import location, write_json
from pipelines.engines.lake import Lake

FORMAT = 2
_FILE = "format.json"


def current(lake: Lake) -> int | None:
    """Return the format of a lake; None where it has no table yet."""
    path = location(lake.root) / _FILE
    if path.exists():
        return int(json.loads(path.read_text(encoding="utf-8"))["format"])
    return 1 if lake.tables() else None


def check(lake: Lake) -> None:
    """Write the current format into a lake without tables. Raises InputError for a lake of another format."""
    version = current(lake)
    if version is None:
        write_json(location(lake.root) / _FILE, {"format": FORMAT})
    elif version < FORMAT:
        raise InputError(
            f"lake {lake.root} has format {version}, this version of adasid reads {FORMAT}: run "
            "`python jobs/maintain.py --config FILE --migrate`"
        )
    elif version > FORMAT:
        raise InputError(
            f"lake {lake.root} has format {version}, this version of adasid reads {FORMAT}: it was written by a newer "
            "version; install that one"
        )


def migrate(lake: Lake) -> list[str]:
    """Bring an older lake up to :data:`FORMAT`; return what was done. Running it again after an interruption resumes
    it. Raises InputError for a newer lake."""
    done = list[str]()
    if current(lake) == 1:
        done += _from_1(Lake(lake.root, {}))
        write_json(location(lake.root) / _FILE, {"format": FORMAT})
    check(lake)
    return done


def _from_1(lake: Lake) -> list[str]:
    done = list[str]()
    if lake.exists("catalog_stats") and "run" in lake.schema("catalog_stats").names:
        row = _row(lake)
        mark = row["run"]
        if row["spearman"] is not None:
            input_hash, sources = lake.input_hash("catalog_stats"), _sources(lake, "item_features")
            written = {**row, "input_hash": input_hash}
            lake.write_rows("richness_stats", tables.RICHNESS_STATS, [written], str(input_hash), sources)
            done.append("richness_stats: written, with columns of catalog_stats")
        sources = _sources(lake, "item_stats")
        lake.write_rows("catalog_stats", tables.CATALOG_STATS, [{**row, "input_hash": mark}], mark, sources)
        done.append("catalog_stats: column run is input_hash")
    if lake.exists("rejected_rows") and "run" in lake.schema("rejected_rows").names:
        input_hash = str(lake.input_hash("rejected_rows"))
        old = lake.open("rejected_rows").to_pyarrow_dataset()  # a write cannot open a table, so open it first
        lake.write("rejected_rows", tables.REJECTED_ROWS, _renamed(old), input_hash)
        done.append("rejected_rows: column run is input_hash")
    return done


def _row(lake: Lake) -> dict[str, Any]:
    return dict(lake.read("catalog_stats").to_pylist()[0])


def _sources(lake: Lake, table: str) -> dict[str, int]:
    return lake.lineage(table) if lake.exists(table) else {}


def _renamed(rows: ds.Dataset) -> Iterator[pa.RecordBatch]:
    for batch in rows.to_batches():
        names = ["input_hash" if name == "run" else name for name in batch.schema.names]
        table = pa.Table.from_batches([batch]).rename_columns(names).select(tables.REJECTED_ROWS.names)
        yield from table.cast(tables.REJECTED_ROWS).to_batches()
