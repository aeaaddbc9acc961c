"""Test the lake: small changes of a table in one commit, and the input hashes of commits."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from adasid.errors import BusyError, InputError
from pipelines.engines.lake import Lake, committed, properties
from pipelines.staleness import lags

SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), False),
        pa.field("codes", pa.list_(pa.int32()), False),
        pa.field("generation", pa.int64(), False),
    ]
)


def rows(*items):
    return pa.Table.from_pylist(
        [{"item_id": item, "codes": codes, "generation": number} for item, codes, number in items], SCHEMA
    )


@pytest.fixture
def lake(tmp_path):
    made = Lake(str(tmp_path), {})
    made.write("sids", SCHEMA, rows(("a", [1, 2], 1), ("b", [3, 4], 1), ("c", [5, 6], 1)).to_batches(), "first")
    return made


def test_a_change_replaces_adds_and_removes_rows_in_one_stamped_commit(lake):
    lake.change("sids", 0, rows(("b", [7, 8], 2), ("d", [9, 9], 2)), pa.array(["c"]), "second")
    assert lake.read("sids").sort_by("item_id").equals(rows(("a", [1, 2], 1), ("b", [7, 8], 2), ("d", [9, 9], 2)))
    assert lake.version("sids") == lake.made("sids", "second") == 1 and lake.fresh("second", "sids")
    lake.change("sids", 1, rows(), pa.array(["a", "b"]), "third")
    assert lake.read("sids").equals(rows(("d", [9, 9], 2)))


def test_a_change_of_a_version_that_is_not_the_newest_is_refused(lake):
    lake.change("sids", 0, rows(("b", [7, 8], 2)), pa.array([], pa.string()), "second")
    with pytest.raises(BusyError, match=r"sids: another run wrote to .*sids after version 0; run this one again"):
        lake.change("sids", 0, rows(("b", [0, 0], 3)), pa.array([], pa.string()), "third")
    assert lake.version("sids") == 1


def test_a_version_made_of_the_same_is_no_newer_one_and_maintenance_keeps_what_was_read(lake):
    sources = {"sids": 0}
    lake.write("changes", SCHEMA, rows(("a", [1, 2], 1)).to_batches(), "made", sources)
    assert lake.lineage("changes") == sources and lake.lineage("sids") == {}
    stamp = properties(lake.input_hash("sids"), sources=lake.lineage("sids"))
    DeltaTable(lake.path("sids")).alter.set_table_properties(
        {"delta.enableExpiredLogCleanup": "false"}, commit_properties=stamp
    )
    assert lake.version("sids") == 1 and not lags(lake, "changes")
    lake.change("sids", 1, rows(("b", [7, 8], 2)), pa.array([], pa.string()), "second")
    lake.change("sids", 2, rows(("b", [7, 9], 2)), pa.array([], pa.string()), "third")
    stamp = properties(lake.input_hash("changes"), sources=lake.lineage("changes"))
    DeltaTable(lake.path("changes")).alter.set_table_properties(
        {"delta.enableExpiredLogCleanup": "false"}, commit_properties=stamp
    )
    (lag,) = lags(lake, "changes")
    assert (lag.version, lag.source, lag.read, lag.newest, lag.pinned) == (1, "sids", 0, 3, False)
    assert lag.since == committed(
        next(entry for entry in DeltaTable(lake.path("sids")).history() if entry["version"] == 2)
    )
    assert lags(Lake(lake.root, {"sids": 0}), "changes")[0].pinned
    lake.write("sids", SCHEMA, rows(("a", [1, 2], 1)).to_batches(), "first")
    assert not lags(lake, "changes")  # as it was


def test_maintenance_of_a_table_without_a_stamp_gives_it_none(lake):
    lake.write("theirs", SCHEMA, rows(("a", [1, 2], 1)).to_batches(), "ours")
    DeltaTable(lake.path("theirs")).delete("item_id = 'a'")
    for _ in range(2):
        assert lake.input_hash("theirs") is None
        name = f"{lake.path('theirs')}@{lake.version('theirs')}"
        assert lake.input_hashes(lake.versions("theirs")) == {"theirs": name}
        DeltaTable(lake.path("theirs")).alter.set_table_properties(
            {"delta.enableExpiredLogCleanup": "false"}, commit_properties=properties(lake.input_hash("theirs"))
        )


def test_threads_may_ask_at_once_whether_the_lake_is_writable(lake):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: lake.writable(), range(200)))
    assert list(Path(lake.root).glob(".probe*")) == []


def test_a_file_system_without_hard_links_is_named(lake, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)  # as blobfuse, s3fs and Azure Files answer
    with pytest.raises(InputError, match="has no hard links"):
        lake.writable()
    assert list(Path(lake.root).glob(".probe*")) == []
