"""Test labels, ratings and histories, through the checks and the first part of the stage."""

from __future__ import annotations

import pyarrow as pa
import pytest

from adasid import tables
from adasid.config import Features, build
from adasid.errors import InputError
from pipelines.features import check, events, labels

GOOD = [1.0, 2.0]
NAN = float("nan")


def labelled(spark, pairs, **settings):
    """(label, in_history) of events with these (rating, label)."""
    frame = spark.createDataFrame([(i, *pair) for i, pair in enumerate(pairs)], "pos int, rating float, label float")
    totals = frame.agg(*labels.sums()).first().asDict()
    found = labels.labelled(frame, Features(**settings), totals).orderBy("pos").collect()
    return [(row["label"], row["in_history"]) for row in found]


def test_labels_ratings_and_neither(spark):
    assert labelled(spark, [(None, None)] * 2) == [(1, True)] * 2
    assert labelled(spark, [(2.0, None), (5.0, None), (None, None)]) == [(0, True), (1, True), (None, True)]
    assert labelled(spark, [(None, 0.0), (None, 1.0), (None, None)]) == [(0, False), (1, True), (None, True)]
    assert labelled(spark, [(5.0, 0.0), (1.0, 1.0), (5.0, None)]) == [(0, False), (1, True), (1, True)], (
        "a label counts before a rating"
    )


def test_a_rating_equal_to_the_limit_is_not_above_it(spark):
    assert labelled(spark, [(3.9, None), (4.1, None)], positive_rating=3.9) == [(0, True), (1, True)]
    with pytest.raises(InputError, match=r"highest rating is 3.9, not above features.positive_rating 3.9"):
        labelled(spark, [(3.9, None)], positive_rating=3.9)


def test_events_are_rated_low_where_their_labels_are_0(lake):
    row = {"user_id": "u", "item_id": "i", "timestamp": "1", "rating": 3.9}
    lake.write_rows("interactions", tables.INTERACTIONS, [row], "h")
    assert events._rated(Features(positive_rating=3.9), lake) and not events._rated(Features(positive_rating=3.8), lake)


def test_events_outside_histories_are_known_from_the_totals(spark):
    for pairs in ([(None, None)], [(2.0, None), (5.0, None)], [(None, 1.0)], [(None, 0.0), (None, 1.0)]):
        for histories in ("auto", "all", "positive"):
            frame = spark.createDataFrame(pairs, "rating float, label float")
            totals, chosen = frame.agg(*labels.sums()).first().asDict(), Features(histories=histories)
            shown = [row["in_history"] for row in labels.labelled(frame, chosen, totals).collect()]
            assert labels.outside(chosen, totals) or all(shown), (pairs, histories)
            assert not labels.outside(chosen, totals) or histories == "positive" or not all(shown)


def test_a_key_decides_what_makes_histories(spark):
    pairs = [(None, 0.0), (2.0, None), (5.0, None), (None, None)]
    assert [shown for _, shown in labelled(spark, pairs)] == [False, True, True, True]
    assert [shown for _, shown in labelled(spark, pairs, histories="all")] == [True] * 4
    assert [shown for _, shown in labelled(spark, pairs, histories="positive")] == [False, False, True, True]


def test_data_without_a_positive_event_is_refused(spark):
    with pytest.raises(
        InputError,
        match=(
            r"highest rating is 1, not above features.positive_rating 3, .*: call the column "
            r"'label' if 1 means positive"
        ),
    ):
        labelled(spark, [(0.0, None), (1.0, None)])
    with pytest.raises(
        InputError,
        match=(
            r"highest rating is 3, not above features.positive_rating 3, so no rated event is "
            r"positive: set features.positive_r"
        ),
    ):
        labelled(spark, [(3.0, None), (1.0, None)])
    with pytest.raises(InputError, match=r"all labels are 0, so no event is positive"):
        labelled(spark, [(None, 0.0), (None, None)])


def write(lake, table, schema, rows, stamp="ingest"):
    lake.write(table, schema, pa.Table.from_pylist(rows, schema).to_batches(), stamp)


def config(**settings):
    return build({"features": {"content": ["text"], "ranking_split": "same", **settings}})


def event(user, item, pos=0, **more):
    return {"user_id": user, "item_id": item, "pos": pos, **more}


ITEMS = [{"item_id": name, "text": GOOD} for name in "abc"]


def test_lines_that_ingest_could_not_parse_count_in_the_limit(spark, lake):
    write(lake, "items", tables.items(["text"]), ITEMS)
    write(lake, "interactions", tables.INTERACTIONS, [event("u", "a"), event("u", "b", 1)])
    line = {"input_hash": "ingest", "row_hash": "h", "reason": "unparsable_json", "row": "x"}
    write(
        lake,
        "rejected_rows",
        tables.REJECTED_ROWS,
        [
            {**line, "table": "items", "copies": 7},
            {**line, "input_hash": "of before", "table": "interactions", "copies": 9},
        ],
    )
    notes = []
    with pytest.raises(
        InputError,
        match=r"table items: 7 of 10 rows rejected, more than features.max_rejected 0.05 \(unparsable_json: 7\)",
    ):
        check.check(spark, config(), lake, "m", notes.append)
    checked = check.check(spark, config(max_rejected=0.8), lake, "m", notes.append)
    assert checked.rejected == {"unparsable_json": 7}


def test_what_is_odd_is_reported(spark, lake):
    items = [
        *ITEMS,
        {"item_id": "d", "text": []},
        {"item_id": "e", "text": [0.0, 0.0]},
        {"item_id": "e", "text": [0.0, 0.0]},
    ]
    items += [{"item_id": name, "text": GOOD} for name in ("caf\u00e9", "cafe\u0301", "a ")]
    write(lake, "items", tables.items(["text"]), items)
    seen = [
        event("u", "a"),
        event("u ", "a"),
        event("v", "a", timestamp="20200913"),
        event("w", "a", timestamp="1600000000"),
    ]
    write(lake, "interactions", tables.INTERACTIONS, seen)
    notes = []
    checked = check.check(spark, config(max_rejected=0.3), lake, "m", notes.append)
    assert (checked.accepted["rows"], checked.rejected, checked.duplicate_items, checked.missing) == (
        3,
        {"implausible_timestamp": 1},
        1,
        {"text": 2},
    )
    assert notes == [
        "interactions: times that are refused, implausible: for example '20200913' reads as the date 2020-09-13: write "
        "dates as YYYY-MM-DD",
        "items: 2 groups of item_id differ in blanks or Unicode form only (first: 'a' and 'a '): trim and normalize "
        "them (NFC) in the source if they mean "
        "the same; they count as different ids",
        "interactions: 1 groups of user_id differ in blanks or Unicode form only (first: 'u' and 'u '): trim and "
        "normalize them (NFC) in the source if they mean "
        "the same; they count as different ids",
        "items: 2 have an empty or a zero vector in 'text': they count as items without it",
    ]
    with pytest.raises(
        InputError,
        match=(
            r"1 of 4 rows rejected.*implausible: for example '20200913' reads as the date "
            r"2020-09-13: write dates as YYYY-MM-DD; look at them"
        ),
    ):
        check.check(spark, config(), lake, "n", notes.append)


def test_a_modality_that_no_item_has_is_named(spark, lake):
    write(lake, "items", tables.items(["text"]), [{"item_id": "a", "text": []}, {"item_id": "b"}])
    with pytest.raises(
        InputError,
        match=r"table items: no item has a vector in column 'text' \(empty and zero vectors do not count\): bring some",
    ):
        check.check(spark, config(), lake, "m", print)


def test_tables_of_two_runs_of_ingest_are_refused(lake):
    write(lake, "items", tables.items(["text"]), ITEMS, "today")
    write(lake, "interactions", tables.INTERACTIONS, [event("u", "a")], "yesterday")
    with pytest.raises(
        InputError, match=r"items and interactions come from different runs of ingest .*: run jobs/ingest.py again"
    ):
        events.same_source(config(), lake)
    events.same_source(config().model_copy(update={"pins": {"items": 0}}), lake)  # a pin is on purpose


def test_a_heavy_user_is_capped_before_anything_is_counted(spark, lake):
    write(lake, "items", tables.items(["text"]), ITEMS)
    seen = [event("bot", "abc"[i % 3], i) for i in range(50)] + [event("u", "a"), event("u", "a"), event("u", "b", 1)]
    write(lake, "interactions", tables.INTERACTIONS, seen)
    cfg, notes = config(max_user_events=5, k_core=2), []

    class StageContext:
        note = staticmethod(notes.append)

    checked = check.check(spark, cfg, lake, "m", notes.append)
    clean = events.prepare(checked, cfg.features, StageContext())
    assert clean.counts == {
        "interactions": 6,
        "users": 2,
        "outside_histories": 0,
        "tied": 0,
        "duplicates": 1,
        "capped": 45,
        "below_k_core": 1,
    }
    assert notes == [
        "1 users have more than features.max_user_events 5 events (user 'bot' has 50): the latest 5 of each are kept, "
        "45 dropped"
    ]
