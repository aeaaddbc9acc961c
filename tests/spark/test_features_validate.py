"""Every reason for which a row is refused, what is kept of it, and when the stage stops."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest

from adasid import tables
from adasid.errors import ConfigError, InputError
from pipelines import features
from pipelines.engines import tracking
from pipelines.engines.spark import struct, write
from pipelines.features import validate

NAN, INF = float("nan"), float("inf")
GOOD = [1.0, 2.0, 3.0]
SMALL = {"tokenizer": {"content_experts": {"text": 1}}, "spark": {"master": "local[2]", "shuffle_partitions": 2}}


def items_frame(spark, rows):
    return spark.createDataFrame([(item, title, text) for item, title, text in rows], struct(tables.items(["text"])))


def events_frame(spark, rows):
    return spark.createDataFrame(rows, struct(tables.INTERACTIONS))


def run(spark, cfg, items, events, part="events"):
    """Write the two tables, run the stage, return its lake."""
    with tracking.stage(cfg, "features") as track:
        write(items_frame(spark, items), track.lake, "items", tables.items(["text"]), "i")
        write(events_frame(spark, events), track.lake, "interactions", tables.INTERACTIONS, "e")
        features.run(cfg, track, part)
    return track.lake


def reason_of(spark, rows):
    frame = items_frame(spark, rows)
    judged = validate.judge_items(frame, validate.widths(frame, ["text"]))
    return sorted(((row["item_id"] or "", row["title"], row["reason"]) for row in judged.collect()), key=str)


def test_every_reason_for_an_item(spark):
    rows = [
        (None, "a", GOOD), ("  ", "b", GOOD), ("wide", "c", [1.0, 2.0]), ("nan", "d", [1.0, NAN, 0.0]), ("inf", "e", [INF, 1.0, 1.0]),
        ("minus", "f", [-INF, 1.0, 1.0]), ("hole", "g", [1.0, None, 1.0]), ("zero", "h", [0.0, -0.0, 0.0]), ("none", "i", None), ("fine", "j", [0.0, 0.0, 1e-9]),
        ("holes", "k", [None, None, None]),
    ]
    assert reason_of(spark, rows) == sorted([
        ("", "a", "null_item_id"), ("  ", "b", "empty_item_id"), ("wide", "c", "wrong_dimension"), ("nan", "d", "non_finite"), ("inf", "e", "non_finite"),
        ("minus", "f", "non_finite"), ("hole", "g", "non_finite"), ("zero", "h", "zero_vector"), ("none", "i", None), ("fine", "j", None), ("holes", "k", "non_finite"),
    ], key=str)


def test_of_duplicates_a_faultless_one_is_kept_whatever_the_order(spark):
    rows = [("x", "bad", [0.0, 0.0, 0.0]), ("x", "first", GOOD), ("x", "second", GOOD), ("same", "s", GOOD), ("same", "s", GOOD), ("worse", "w", [NAN] * 3), ("worse", "w", [NAN] * 3)]
    found = reason_of(spark, rows)
    assert found == reason_of(spark, rows[::-1])
    kept = [title for _, title, reason in found if reason is None]
    assert sorted(kept) in (["first", "s"], ["s", "second"])
    assert ("x", "bad", "duplicate_item") in found
    assert [reason for item, _, reason in found if item == "worse"] == ["non_finite", "non_finite"]  # identical rows share one reason: row_hash stays a key


def test_every_reason_for_an_interaction(spark):
    now = datetime(2020, 1, 1, tzinfo=timezone.utc)
    cases = {
        "null_user_id": (None, "x", "1", None), "empty_user_id": (" ", "x", "1", None), "null_item_id": ("u", None, "1", None), "empty_item_id": ("u", "", "1", None),
        "unknown_item": ("u", "y", "1", None), "no_order": ("u", "x", " ", None), "unparsable_timestamp": ("u", "x", "yesterday", 1), "future_timestamp": ("u", "x", "2020-01-02", 1),
    }
    frame = events_frame(spark, [(*row, None) for row in cases.values()] + [("u", "x", None, 3, None), ("u", "x", "2020-01-01T00:00:00", None, 5.0)])
    known = spark.createDataFrame([("x",)], "item_id string")
    found = [(tuple(row)[:4], row["reason"]) for row in validate.judge_events(frame, known, now).collect()]
    assert sorted(found, key=str) == sorted([*((row, reason) for reason, row in cases.items()), (("u", "x", None, 3), None), (("u", "x", "2020-01-01T00:00:00", None), None)], key=str)


def test_timestamps_are_seconds_milliseconds_or_iso(spark):
    texts = {
        "0": 0, "100000000000": 10**11, "100000000001": 100_000_000.001, "-86400": -86400, "1970-01-02": 86400, "1970-01-01T01:00:00+01:00": 0, "1970-01-01 00:00:01.5": 1.5,
        "1.5": None, "12:30": None, "9" * 30: None, "9" * 17: None, "2020-13-01": None, "soon": None,
    }
    frame = spark.createDataFrame([(text,) for text in texts], "text string")
    rows = {row["text"]: row["seconds"] for row in frame.select("text", validate.parse_time(frame["text"]).cast("double").alias("seconds")).collect()}
    assert rows == pytest.approx(texts)


def test_the_clock_can_be_set():
    assert validate.clock("2020-01-01T00:00:00Z") == validate.clock("2020-01-01") == datetime(2020, 1, 1, tzinfo=timezone.utc)
    assert abs(validate.clock(None) - datetime.now(timezone.utc)) < timedelta(minutes=1)
    with pytest.raises(ConfigError, match=r"features.now is 'soon'"):
        validate.clock("soon")


def test_refused_rows_are_kept_whole_once_a_run(spark, make_config):
    cfg = make_config(**SMALL, features={"max_rejected": 0.5})
    items = [("a", "t", GOOD), ("b", None, GOOD), ("z", None, [0.0, NAN, 0.0]), ("z", None, [0.0, NAN, 0.0])]
    events = [("u", "a", "1", None, None), ("u", "b", "2", None, 4.0), ("u", "b", "2", None, 4.0), ("u", "b", "3", None, None), ("v", "q", "3", 7, None), ("v", "q", "3", 7, None)]
    lake = run(spark, cfg, items, events)
    rows = {(row["table"], row["reason"]): row for row in lake.read("rejected_rows").to_pylist()}
    assert {key: row["copies"] for key, row in rows.items()} == {("items", "non_finite"): 2, ("interactions", "unknown_item"): 2}
    assert json.loads(rows["items", "non_finite"]["row"]) == {"item_id": "z", "title": None, "text": [0.0, "NaN", 0.0]}
    assert json.loads(rows["interactions", "unknown_item"]["row"]) == {"user_id": "v", "item_id": "q", "timestamp": "3", "pos": 7, "rating": None}
    stats = lake.read("catalog_stats").to_pylist()[0]
    assert dict(stats["rejected"]) == {"non_finite": 2, "unknown_item": 2}
    assert (stats["duplicates"], stats["interactions"], stats["items"], stats["users"]) == (1, 3, 2, 1)
    assert rows["items", "non_finite"]["run"] == stats["run"]


def test_too_many_refused_rows_stop_the_stage_after_they_were_written(spark, make_config):
    cfg = make_config(**SMALL)
    items, events = [("a", None, GOOD), ("b", None, GOOD)], [("u", "a", "1", None, None), ("u", "b", "tomorrow", None, None), ("", "b", "2", None, None)]
    with pytest.raises(InputError, match=r"table interactions: 2 of 3 rows rejected, more than features.max_rejected 0.05 \(empty_user_id: 1, unparsable_timestamp: 1\).*rejected_rows"):
        run(spark, cfg, items, events)
    lake = tracking.open_lake(cfg)
    assert lake.read("rejected_rows").num_rows == 2
    assert not lake.exists("item_stats")


def test_two_widths_are_named_with_their_counts(spark, make_config):
    items = [("a", None, GOOD), ("b", None, GOOD), ("c", None, GOOD[:2])]
    with pytest.raises(InputError, match=r"table items: 1 of 3 rows rejected.*'text' has vectors of width 3 \(2 rows\) and 2 \(1 rows\): embed all items with one model"):
        run(spark, make_config(**SMALL), items, [("u", "a", "1", None, None)])


@pytest.mark.parametrize(
    ("items", "events", "message"),
    [
        ([], [("u", "a", "1", None, None)], "table items has no rows"),
        ([("a", None, GOOD)], [], "table interactions has no rows"),
        ([("", None, GOOD)], [("u", "a", "1", None, None)], r"table items: none of its 1 rows was accepted \(empty_item_id: 1\)"),
    ],
)
def test_nothing_to_work_on(spark, make_config, items, events, message):
    with pytest.raises(InputError, match=message):
        run(spark, make_config(**SMALL, features={"max_rejected": 1.0}), items, events)


def test_a_configured_modality_needs_its_column(spark, make_config):
    cfg = make_config(**{**SMALL, "tokenizer": {"content_experts": {"text": 1, "audio": 1}}})
    with pytest.raises(InputError, match=r"table items has no column 'audio' \(it has item_id, title, text\)"):
        run(spark, cfg, [("a", None, GOOD)], [("u", "a", "1", None, None)])
