"""Test every reason to reject a row, what is recorded of the row, and when the stage stops."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest

from adasid import tables
from adasid.config import build
from adasid.errors import ConfigError, InputError
from pipelines.engines.lake import Lake
from pipelines.engines.spark import struct, write
from pipelines.features import check, validate

NAN, INF = float("nan"), float("inf")
NOTES: list[str] = []
GOOD = [1.0, 2.0, 3.0]


def items_frame(spark, rows):
    return spark.createDataFrame(rows, struct(tables.items(["text"])))


def events_frame(spark, rows):
    return spark.createDataFrame(rows, struct(tables.INTERACTIONS))


def config(**settings):
    return build({"features": {"content": ["text"], **settings}})


def reason_of(spark, rows):
    frame = items_frame(spark, rows)
    judged = validate.judge_items(frame, validate.widths(frame, ["text"]))
    return sorted(((row["item_id"] or "", row["title"], row["reason"]) for row in judged.collect()), key=str)


def test_every_reason_for_an_item(spark):
    rows = [
        (None, "a", GOOD),
        ("  ", "b", GOOD),
        ("wide", "c", [1.0, 2.0]),
        ("nan", "d", [1.0, NAN, 0.0]),
        ("inf", "e", [INF, 1.0, 1.0]),
        ("minus", "f", [-INF, 1.0, 1.0]),
        ("hole", "g", [1.0, None, 1.0]),
        ("zero", "h", [0.0, -0.0, 0.0]),
        ("none", "i", None),
        ("fine", "j", [0.0, 0.0, 1e-9]),
        ("holes", "k", [None, None, None]),
        ("empty", "l", []),
        ("half zero", "m", [0.0, None, 0.0]),
        ("huge\u0085", "n", GOOD),
        ("\u00a0 ", "o", GOOD),
    ]
    assert reason_of(spark, rows) == sorted(
        [
            ("", "a", "null_item_id"),
            ("  ", "b", "empty_item_id"),
            ("wide", "c", "wrong_dimension"),
            ("nan", "d", "non_finite"),
            ("inf", "e", "non_finite"),
            ("minus", "f", "non_finite"),
            ("hole", "g", "non_finite"),
            ("zero", "h", None),
            ("empty", "l", None),
            ("half zero", "m", "non_finite"),
            ("huge\u0085", "n", "control_character_item_id"),
            ("\u00a0 ", "o", "empty_item_id"),
            ("none", "i", None),
            ("fine", "j", None),
            ("holes", "k", "non_finite"),
        ],
        key=str,
    )


def test_of_duplicates_a_faultless_one_is_kept_whatever_the_order(spark):
    rows = [
        ("x", "bad", [INF] * 3),
        ("x", "first", GOOD),
        ("x", "second", GOOD),
        ("same", "s", GOOD),
        ("same", "s", GOOD),
        ("worse", "w", [NAN] * 3),
        ("worse", "w", [NAN] * 3),
    ]
    found = reason_of(spark, rows)
    assert found == reason_of(spark, rows[::-1])
    kept = [title for _, title, reason in found if reason is None]
    assert sorted(kept) in (["first", "s"], ["s", "second"])
    assert ("x", "bad", "duplicate_item") in found and ("same", "s", validate.COPY) in found
    assert [reason for item, _, reason in found if item == "worse"] == [
        "non_finite",
        "non_finite",
    ]  # identical rows share one reason: row_hash stays a key


def test_every_reason_for_an_interaction(spark):
    now = datetime(2020, 1, 1, tzinfo=timezone.utc)
    cases = {
        "null_user_id": (None, "x", "1", None),
        "empty_user_id": (" ", "x", "1", None),
        "null_item_id": ("u", None, "1", None),
        "empty_item_id": ("u", "", "1", None),
        "unknown_item": ("u", "y", "1", None),
        "no_order": ("u", "x", " ", None),
        "unparsable_timestamp": ("u", "x", "yesterday", 1),
        "future_timestamp": ("u", "x", "2020-01-02", 1),
        "implausible_timestamp": ("u", "x", "20190913", 1),
        "control_character_user_id": ("u\n", "x", None, 1),
        "control_character_item_id": ("u", "x\u2028y", None, 1),
        "invalid_label": ("u", "x", None, 1, None, 2.0),
        "invalid_rating": ("u", "x", None, 2, INF),
    }
    padded = [(*row, None, None)[:6] for row in cases.values()]
    good = [("u", "x", None, 3, None, 1.0), ("u", "x", "2020-01-01T00:00:00", None, 5.0, None)]
    known = spark.createDataFrame([("x",)], "item_id string")
    judged = validate.judge_events(events_frame(spark, padded + good), known, now, 1990)
    found = [(tuple(row)[:4], row["reason"]) for row in judged.collect()]
    good = [(("u", "x", None, 3), None), (("u", "x", "2020-01-01T00:00:00", None), None)]
    assert sorted(found, key=str) == sorted([*((row[:4], reason) for reason, row in cases.items()), *good], key=str)


def test_timestamps_are_seconds_milliseconds_or_iso(spark):
    texts = {
        "0": 0,
        "100000000000": 10**11,
        "100000000001": 100_000_000.001,
        "100000000000000": 10**11,
        "100000000000001": 100_000_000.000001,
        "100000000000000000": 10**11,
        "100000000000000001": 10**8,
        "-62135596800": -62_135_596_800,
        "-62135596801": None,
        "1600000000.5": 1_600_000_000.5,
        "1.6e9": 1_600_000_000,
        "1.6e+18": 1_600_000_000,
        "1600000000000": 1_600_000_000,
        "1600000000000005": 1_600_000_000.000005,
        "1600000000000005999": 1_600_000_000.000005,
        "-1600000000000000": -1_600_000_000,
        "2020-09-13T12:26:40.123456789Z": 1_600_000_000.123456,
        "-86400": -86400,
        "1970-01-02": 86400,
        "1970-01-01T01:00:00+01:00": 0,
        "1970-01-01 00:00:01.5": 1.5,
        "1.5": 1.5,
        "12:30": None,
        "9" * 30: None,
        "9" * 19: None,
        "1e99": None,
        "1e9999": None,
        "1_000": None,
        "0x10": None,
        "١٢٣": None,
        "2020-13-01": None,
        "soon": None,
    }
    frame = spark.createDataFrame([(text,) for text in texts], "text string")
    rows = {
        row["text"]: row["seconds"]
        for row in frame.select("text", validate.parse_time(frame["text"]).cast("double").alias("seconds")).collect()
    }
    assert rows == pytest.approx(texts)
    seen = events_frame(spark, [("u", "x", text, 1, None, None) for text in texts])
    known = spark.createDataFrame([("x",)], "item_id string")
    judged = validate.judge_events(seen, known, datetime(2030, 1, 1, tzinfo=timezone.utc), 1990)
    rows = judged.selectExpr("timestamp", "cast(time AS double) AS seconds").collect()
    assert {row["timestamp"]: row["seconds"] for row in rows} == pytest.approx(texts)


def test_the_clock_can_be_set():
    assert (
        validate.clock("2020-01-01T00:00:00Z")
        == validate.clock("2020-01-01")
        == datetime(2020, 1, 1, tzinfo=timezone.utc)
    )
    assert abs(validate.clock(None) - datetime.now(timezone.utc)) < timedelta(minutes=1)
    with pytest.raises(ConfigError, match=r"features.now is 'soon'"):
        validate.clock("soon")


@pytest.fixture(scope="module")
def lake(spark, tmp_path_factory):
    """A lake of which half of the items and a third of the interactions are to be refused."""
    lake = Lake(str(tmp_path_factory.mktemp("validate")), {})
    items = [("a", "t", GOOD), ("b", None, GOOD), ("z", None, [0.0, NAN, 0.0]), ("z", None, [0.0, NAN, 0.0])]
    seen = [
        ("u", "a", "1000000000", None, None, None),
        ("u", "b", "1000000002", None, 4.0, None),
        ("u", "b", "1000000002", None, 4.0, None),
        ("u", "b", "1000000003", None, None, None),
        ("v", "q", "3", 7, None, None),
        ("v", "q", "3", 7, None, None),
    ]
    write(items_frame(spark, items), lake, "items", tables.items(["text"]), "i")
    write(events_frame(spark, seen), lake, "interactions", tables.INTERACTIONS, "e")
    return lake


def test_refused_rows_are_kept_whole_once_a_run(spark, lake):
    for _ in range(2):
        checked = check.check(spark, config(max_rejected=0.5), lake, "one", NOTES.append)
    assert (checked.accepted["rows"], checked.rejected) == (4, {"non_finite": 2, "unknown_item": 2})
    rows = {(row["table"], row["reason"]): row for row in lake.read("rejected_rows").to_pylist()}
    assert {key: (row["input_hash"], row["copies"]) for key, row in rows.items()} == {
        ("items", "non_finite"): ("one", 2),
        ("interactions", "unknown_item"): ("one", 2),
    }
    assert lake.read("rejected_rows").num_rows == 2
    assert json.loads(rows["items", "non_finite"]["row"]) == {"item_id": "z", "title": None, "text": [0.0, "NaN", 0.0]}
    assert json.loads(rows["interactions", "unknown_item"]["row"]) == {
        "user_id": "v",
        "item_id": "q",
        "timestamp": "3",
        "pos": 7,
        "rating": None,
        "label": None,
    }


def test_too_many_refused_rows_stop_the_stage_after_they_were_written(spark, lake):
    with pytest.raises(
        InputError,
        match=(
            r"table items: 2 of 4 rows rejected, more than features.max_rejected 0.05 "
            r"\(non_finite: 2\); look at them in table rejected_rows"
        ),
    ):
        check.check(spark, config(), lake, "two", NOTES.append)
    assert [row["table"] for row in lake.read("rejected_rows").to_pylist() if row["input_hash"] == "two"] == ["items"]


def test_two_widths_are_named_with_their_counts(spark):
    frame = items_frame(spark, [("a", None, GOOD), ("b", None, GOOD), ("c", None, GOOD[:2]), ("d", None, None)])
    widths = validate.widths(frame, ["text"])
    assert widths == {"text": [(3, 2), (2, 1)]}
    with pytest.raises(
        InputError,
        match=(
            r"table items: 1 of 4 rows rejected.*'text' has vectors of width 3 \(2 rows\) and "
            r"2 \(1 rows\): embed all items with one model"
        ),
    ):
        validate.insist("items", {None: 3, "wrong_dimension": 1}, 0.05, widths)


def test_many_widths_of_one_modality_do_not_hide_another(spark):
    schema = struct(tables.items(["text", "visual"]))
    rows = [(f"i{n}", None, [1.0] * (n + 1), [2.0, 3.0] if n == 29 else None) for n in range(30)]
    widths = validate.widths(spark.createDataFrame(rows, schema), ["text", "visual"])
    assert widths["visual"] == [(2, 1)] and widths["text"] == [(n + 1, 1) for n in range(10)]


def test_a_configured_modality_needs_its_column(spark):
    with pytest.raises(InputError, match=r"table items has no column 'audio' \(it has item_id, title, text\)"):
        validate.widths(items_frame(spark, [("a", None, GOOD)]), ["text", "audio"])


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        ({}, "table items has no rows"),
        ({"empty_item_id": 4}, r"table items: none of its 4 rows was accepted \(empty_item_id: 4\)"),
    ],
)
def test_nothing_to_work_on(counted, message):
    with pytest.raises(InputError, match=message):
        validate.insist("items", counted, 1.0)
