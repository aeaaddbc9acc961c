"""Compare two versions of a catalogue as a small nightly run does: real Delta tables, no Spark."""

import shutil
from datetime import date
from types import SimpleNamespace

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from adasid.tables import SIDS
from pipelines.nightly import changes, differences
from pipelines.nightly.differences import NeedsFullRun
from pipelines.nightly.nightly_run import NightlyRun
from pipelines.publish.generations import Generation

FEATURES = pa.schema(
    [("item_id", pa.string()), ("fingerprint", pa.string()), ("stratum", pa.string()), ("interactions", pa.int64())]
)
LIVE = Generation(
    generation=1,
    policy="full",
    run_date=None,
    inputs={"item_features": 0},
    tokenizer="t",
    artifact="a",
    items=4,
    metrics={},
    gates=(),
    churn={},
    drift={},
    parent=None,
    sids_version=0,
    run="r",
    live=True,
)
FIRST = (("a", "1", "head", 9), ("b", "2", "mid", 5), ("c", "3", "tail", 1), ("d", "4", "tail", 1))


def put(lake, *rows):
    lake.write(
        "item_features",
        FEATURES,
        pa.Table.from_pylist([dict(zip(FEATURES.names, row)) for row in rows], FEATURES).to_batches(),
        str(rows),
    )


@pytest.fixture
def nightly(lake, make_config):
    """A nightly after a generation of the four items."""
    row = {
        "codes": [0],
        "weights": [1.0],
        "active": [True],
        "tokens": ["<t0_0>"],
        "collision_rank": 0,
        "tokenizer": "t",
        "generation": 1,
        "gauges": [],
    }
    lake.write(
        "sids",
        SIDS,
        pa.Table.from_pylist([{**row, "item_id": r[0], "fingerprint": r[1]} for r in FIRST], SIDS).to_batches(),
        "sids",
    )
    put(lake, *FIRST)

    def made(most=10):
        cfg = make_config(retokenize={"small_night": most})
        return NightlyRun(
            cfg,
            SimpleNamespace(lake=lake),
            None,
            LIVE,
            lake.version("item_features"),
            str(date(2026, 1, 2)),
            "key",
        )

    return made


def found(nightly, fed=False):
    change, _ = differences.read(nightly, 0, fed)
    return change and dict(zip(change.ids.to_pylist(), change.kind.tolist()))


def test_new_changed_removed_and_those_whose_counts_alone_differ(lake, nightly):
    put(lake, ("a", "1", "head", 10), ("b", "2x", "mid", 5), ("c", "3", "tail", 1), ("e", "5", "cold", 0))
    assert found(nightly()) == {"a": "same", "b": "changed", "d": "removed", "e": "new"}
    change, fed = differences.read(nightly(), 0, False)
    assert not fed
    assert change.before.events.tolist() == [9, 5, 1, 0] and change.after.events.tolist() == [10, 5, 0, 0]
    assert change.before.stratum.tolist()[3] == change.after.stratum.tolist()[2] == -1


def test_counts_alone_change_no_sid(lake, nightly):
    put(lake, *((item, mark, stratum, events + 1) for item, mark, stratum, events in FIRST))
    assert found(nightly()) is None


def test_more_items_than_a_small_nightly_run_may_have(lake, nightly):
    put(lake, *((item, mark + "x", stratum, events) for item, mark, stratum, events in FIRST))
    with pytest.raises(NeedsFullRun, match=r"4 items have other vectors, more than retokenize\.small_night"):
        found(nightly(3))


def test_a_rebuilt_table_is_compared_with_the_published_rows(lake, nightly):
    """Version 0 is another table than the one that the live SIDs were made of."""
    shutil.rmtree(lake.path("item_features"))
    rebuilt = (("a", "1", "head", 9), ("b", "2x", "mid", 5), *FIRST[2:])
    put(lake, *rebuilt)
    put(lake, *rebuilt)
    assert found(nightly()) == {"b": "changed"}


def test_a_version_that_is_gone_is_for_spark(lake, nightly):
    with pytest.raises(NeedsFullRun, match="item_features has no version 7 any more"):
        differences.read(nightly(), 7, False)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (("e", None, "cold", 0), "without an id or a fingerprint"),
        ((None, "5", "cold", 0), "without an id or a fingerprint"),
        (("e", "5", None, 0), "without a stratum"),
        (("a", "1x", "head", 9), "two rows"),
    ],
)
def test_faulty_rows_are_for_spark(lake, nightly, row, why):
    put(lake, *FIRST[:2], ("c", "3x", "tail", 1), row, ("a", "1y", "head", 8) if why == "two rows" else FIRST[3])
    with pytest.raises(NeedsFullRun, match=why):
        found(nightly())


def test_a_long_change_feed_is_not_read(lake, nightly):
    """Counts of all items change by updates of single rows: eight rows of the feed, and no other vectors but of one
    item."""
    shutil.rmtree(lake.path("item_features"))
    rows = pa.Table.from_pylist([dict(zip(FEATURES.names, row)) for row in FIRST], FEATURES)
    write_deltalake(lake.path("item_features"), rows, configuration={"delta.enableChangeDataFeed": "true"})
    DeltaTable(lake.path("item_features")).update({"interactions": "interactions + 1"})
    DeltaTable(lake.path("item_features")).update({"fingerprint": "'3x'"}, predicate="item_id = 'c'")
    assert changes.followed(lake, 0, 2)
    assert (
        found(nightly(), fed=True)
        == found(nightly(1), fed=True)
        == {"a": "same", "b": "same", "c": "changed", "d": "same"}
    )
    assert [differences.read(nightly(most), 0, True)[1] for most in (10, 1)] == [True, False]
    assert differences.read(nightly(1), 1, True)[1], "one row of the feed alone"
