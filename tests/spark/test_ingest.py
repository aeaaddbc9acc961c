"""Test ingest, reader by reader, on real Spark and Delta: which rows arrive, what is rejected and with which
message."""

from __future__ import annotations

import gzip
import json
import os
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from adasid import tables
from adasid.config.content import AMAZON_TEXTS, Content, Encoder
from adasid.datasets import synthetic
from adasid.errors import InputError
from pipelines import ingest
from pipelines.engines import tracking

pytestmark = pytest.mark.usefixtures("spark")
TEXT = {"content": ["text"]}


def ingested(cfg):
    """Run the stage; the closed track."""
    with tracking.stage(cfg, "ingest") as context:
        ingest.run(cfg, context)
    return context


def rows(context, table: str, *order: str) -> list[dict]:
    return context.lake.read(table).sort_by([(name, "ascending") for name in order]).to_pylist()


def parquet(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


EVENTS = {"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [1, 2]}


# --- synthetic -------------------------------------------------------------------------------------------------------


def test_synthetic_is_the_catalogue_and_a_second_run_changes_nothing(make_config):
    cfg = make_config(
        source={"synthetic": {"items": 11_000, "users": 2_000, "interactions": 20_000, "chunk_users": 700}}
    )
    first = ingested(cfg)
    assert (
        first.status == "done"
        and first.facts["items"] == 11_000
        and first.facts["interactions"] == first.lake.read("interactions").num_rows
    )
    assert first.lake.open("items").to_pyarrow_dataset().schema.names == ["item_id", "title", "text", "visual"]
    params = cfg.source.synthetic
    for name, made, key in (
        ("items", synthetic.items(params, cfg.seed, ("text", "visual"), 0, params.items), ["item_id"]),
        ("truth", synthetic.truth(params, cfg.seed, 0, params.items), ["item_id"]),
        ("interactions", synthetic.interactions(params, cfg.seed, 0, params.users), ["user_id", "timestamp"]),
    ):
        order = [(column, "ascending") for column in key]
        found, expected = first.lake.read(name).sort_by(order), pa.Table.from_batches(list(made)).sort_by(order)
        for column in expected.column_names:
            assert found[column].to_pylist() == expected[column].to_pylist(), (name, column)
    second = ingested(cfg)
    assert second.status == "up to date" and second.lake.versions("items", "interactions", "truth") == {
        "items": 0,
        "interactions": 0,
        "truth": 0,
    }
    other = ingested(cfg.model_copy(update={"seed": 18}))
    assert other.status == "done" and other.lake.version("items") == 1


def test_synthetic_brings_the_planted_behaviour_column(make_config):
    cfg = make_config(
        source={"synthetic": {"items": 50, "users": 20, "interactions": 200, "behavior_width": 8}},
        behavior={"source": "column"},
        features=TEXT,
    )
    table = ingested(cfg).lake.read("items")
    assert table.column_names == ["item_id", "title", "text", "behavior"] and len(table["behavior"][0]) == 8


def test_synthetic_does_not_know_other_modalities(make_config):
    with pytest.raises(InputError, match=r"'synthetic' has no modality 'audio' .*remove it from features.content"):
        ingested(make_config(features={"content": ["audio"]}))


# --- tables ----------------------------------------------------------------------------------------------------------


def tables_config(make_config, items: str, interactions: str, form: str = "parquet", **sections):
    return make_config(
        source={"kind": "tables", "tables": {"items": items, "interactions": interactions, "format": form}},
        features=TEXT,
        **sections,
    )


def test_parquet_tables_keep_raw_values(make_config, tmp_path):
    items = parquet(
        tmp_path / "i.parquet",
        item_id=["x", None, "x"],
        text=[[1.0, 2.0], None, [float("nan"), 3.0]],
        title=["X", None, "Y"],
        extra=[1, 2, 3],
    )
    events = parquet(
        tmp_path / "e.parquet", user_id=[1, None], item_id=["x", "zz"], timestamp=[-5, None], rating=[4.5, None]
    )
    context = ingested(tables_config(make_config, items, events))
    assert context.lake.read("interactions").to_pylist() == [
        {"user_id": "1", "item_id": "x", "timestamp": "-5", "pos": None, "rating": 4.5, "label": None},
        {"user_id": None, "item_id": "zz", "timestamp": None, "pos": None, "rating": None, "label": None},
    ]
    found = context.lake.read("items")
    assert (
        found.column_names == ["item_id", "title", "text"]
        and found["text"].null_count == 1
        and found["item_id"].null_count == 1
    )
    assert context.facts == {"items": 3, "interactions": 2}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1_300_000_000_123, None]), ["1300000000123", None]),
        (pa.array([1.3e9, 1_300_000_000.25]), ["1300000000", "1300000000.25"]),
        (pa.array([1.0e10, float("nan")]), ["1e+10", None]),
        (pa.array([1_600_000_000_123_456_789, None], pa.timestamp("ns")), ["2020-09-13T12:26:40.123456Z", None]),
        (pa.array([18_518, None], pa.date32()), ["2020-09-13T00:00:00.000000Z", None]),
        (pa.array([Decimal("1600000000.50"), None]), ["1600000000.50", None]),
        (pa.array(["yesterday", "2020-01-01"]), ["yesterday", "2020-01-01"]),
        (
            pa.array([datetime(2020, 1, 2, 3, 4, 5, 600), None], pa.timestamp("us")),
            ["2020-01-02T03:04:05.000600Z", None],
        ),
        (
            pa.array([datetime(2020, 1, 2, 3, tzinfo=timezone.utc)] * 2, pa.timestamp("us", tz="UTC")),
            ["2020-01-02T03:00:00.000000Z"] * 2,
        ),
    ],
    ids=["ms", "seconds", "nan", "nanoseconds", "date", "decimal", "text", "naive", "utc"],
)
def test_timestamps_become_text(make_config, tmp_path, values, expected):
    items = parquet(tmp_path / "i.parquet", item_id=["x"], text=[[1.0]])
    events = parquet(tmp_path / "e.parquet", user_id=["a", "b"], item_id=["x", "x"], timestamp=values)
    assert [
        row["timestamp"] for row in rows(ingested(tables_config(make_config, items, events)), "interactions", "user_id")
    ] == expected


def test_delta_tables_follow_their_version(make_config, tmp_path):
    items, events = str(tmp_path / "i"), str(tmp_path / "e")
    write_deltalake(items, pa.table({"item_id": ["x"], "text": pa.array([[1.0]], tables.VECTOR), "behavior": [[2.0]]}))
    write_deltalake(
        events, pa.table({"user_id": ["a"], "item_id": ["x"], "order": pa.array([3], pa.int32()), "label": [1]})
    )
    cfg = tables_config(make_config, items, events, "delta", behavior={"source": "column"})
    assert rows(ingested(cfg), "interactions", "user_id") == [
        {"user_id": "a", "item_id": "x", "timestamp": None, "pos": 3, "rating": None, "label": 1.0}
    ]
    assert ingested(cfg).status == "up to date"
    write_deltalake(
        events,
        pa.table({"user_id": ["b"], "item_id": ["x"], "order": pa.array([0], pa.int32()), "label": [0]}),
        mode="append",
    )
    assert ingested(cfg).facts["interactions"] == 2


def test_a_changed_file_is_read_again(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parquet(tmp_path / "i.parquet", item_id=["x"], text=[[1.0]])
    parquet(tmp_path / "e.parquet", **EVENTS)
    cfg = tables_config(make_config, "i.parquet", "e.parquet")
    assert [ingested(cfg).status, ingested(cfg).status] == ["done", "up to date"]
    os.utime(tmp_path / "i.parquet", (1, 1))
    assert ingested(cfg).status == "up to date"
    parquet(tmp_path / "i.parquet", item_id=["x", "y"], text=[[1.0], [2.0]])
    assert ingested(cfg).facts["items"] == 2


@pytest.mark.parametrize(
    ("items", "events", "message"),
    [
        (
            {"id": ["x"], "text": [[1.0]]},
            EVENTS,
            r"source.tables.items .*i.parquet: column 'item_id' is missing \(found: id, text\); add",
        ),
        ({"item_id": ["x"]}, EVENTS, r"column 'text' is missing \(found: item_id\); add it as an array of floats"),
        ({"item_id": ["x"], "text": ["1 2"]}, EVENTS, r"column 'text' is string; must be an array of floats"),
        (
            {"item_id": ["x"], "text": [[1.0]]},
            {"user_id": ["a"], "timestamp": [1]},
            r"source.tables.interactions .*column 'item_id' is missing \(found: user_id, timestamp\)",
        ),
        (
            {"item_id": ["x"], "text": [[1.0]]},
            {"user_id": ["a"], "item_id": ["x"]},
            r"columns 'timestamp' and 'pos' are missing",
        ),
        (
            {"item_id": ["x"], "text": [[1.0]]},
            {**EVENTS, "pos": ["1", "2"]},
            r"column 'pos' is string; must be whole numbers",
        ),
        (
            {"item_id": ["x"], "text": [[1.0]]},
            {**EVENTS, "timestamp": [[1], [2]]},
            r"column 'timestamp' is list<.*int64>; must be a number",
        ),
        (
            {"item_id": ["x"], "text": [[1.0]]},
            {**EVENTS, "timestamp": pa.array([1, 2], pa.float32())},
            r"'timestamp' is float, which cannot hold",
        ),
        (
            {"item_id": ["x"], "text": [[1.0]]},
            {**EVENTS, "pos": [0.5, 1.0]},
            r"e.parquet: column 'pos' is double and has a value that is no whole",
        ),
        (
            {"item_id": ["x"], "text": [[1.0]]},
            {**EVENTS, "rating": ["5", "4"]},
            r"column 'rating' is string; must be a number",
        ),
        (
            {"item_id": [1.5], "text": [[1.0]]},
            EVENTS,
            r"column 'item_id' is double; an id must be text or an integer: cast it to integers",
        ),
        (
            {"item_id": [b"x"], "text": [[1.0]]},
            EVENTS,
            r"column 'item_id' is binary; an id must be text or an integer: store it as text",
        ),
        ({"item_id": [True], "text": [[1.0]]}, EVENTS, r"column 'item_id' is bool; an id must be"),
        ({"item_id": [["x"]], "text": [[1.0]]}, EVENTS, r"column 'item_id' is list<.*>; an id must be"),
        (
            {"item_id": ["x"], "text": [[1.0]]},
            {**EVENTS, "user_id": [1.0, 2.0]},
            r"interactions .*column 'user_id' is double; an id must be",
        ),
    ],
    ids=[
        "item_id",
        "modality",
        "not_array",
        "event_item",
        "no_order",
        "pos_text",
        "time_array",
        "time_float",
        "pos_fraction",
        "rating_text",
        "id_float",
        "id_binary",
        "id_bool",
        "id_list",
        "user_float",
    ],
)
def test_table_errors_name_column_and_fix(make_config, tmp_path, items, events, message):
    cfg = tables_config(
        make_config, parquet(tmp_path / "i.parquet", **items), parquet(tmp_path / "e.parquet", **events)
    )
    with pytest.raises(InputError, match=message) as caught:
        ingested(cfg)
    assert "\n" not in str(caught.value)


def test_missing_and_wrong_files_are_named(make_config, tmp_path):
    items = parquet(tmp_path / "i.parquet", item_id=["x"], text=[[1.0]])
    (tmp_path / "junk.parquet").write_text("not parquet at all")
    for events, form, message in (
        (
            str(tmp_path / "none.parquet"),
            "parquet",
            r"source.tables.interactions .*none.parquet: does not exist; give an existing path",
        ),
        (
            str(tmp_path / "junk.parquet"),
            "parquet",
            r"source.tables.interactions .*junk.parquet: not readable as parquet",
        ),
        (items, "delta", r"source.tables.items .*i.parquet: not a Delta table .*format: parquet"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            ingested(tables_config(make_config, items, events, form))
        assert "\n" not in str(caught.value)


def folder_of(path: Path, **files: dict) -> str:
    path.mkdir(parents=True)
    for name, columns in files.items():
        parquet(path / f"{name}.parquet", **columns)
    return str(path)


def test_columns_that_only_some_files_have_are_null_in_the_others(make_config, tmp_path, capsys):
    items = parquet(tmp_path / "i.parquet", item_id=["x", "y"], text=[[1.0], [2.0]])
    events = folder_of(
        tmp_path / "events",
        day1={"user_id": ["a"], "item_id": ["x"], "timestamp": [1]},
        day2={"user_id": ["b"], "item_id": ["x"], "timestamp": ["2020-01-01"], "rating": [4]},
        day3={"user_id": ["c"], "item_id": ["y"], "timestamp": pa.array([5], pa.timestamp("s")), "rating": [4.5]},
    )
    (tmp_path / "events" / "_SUCCESS").touch()
    found = rows(ingested(tables_config(make_config, items, events)), "interactions", "user_id")
    assert [(row["timestamp"], row["rating"]) for row in found] == [
        ("1", None),
        ("2020-01-01", 4.0),
        ("1970-01-01T00:00:05.000000Z", 4.5),
    ]
    assert (
        f"{events}: column 'rating' is missing in 1 of 3 files (first: {events}/day1.parquet): it is null in their rows"
        in capsys.readouterr().err
    )


def test_a_type_that_changes_from_file_to_file(make_config, tmp_path):
    """Integers and text are one id; a file whose ids are floats is named."""
    items = parquet(tmp_path / "i.parquet", item_id=["7", "a"], text=[[1.0], [2.0]])
    files = {"day1": {**EVENTS, "item_id": [7, 7]}, "day2": {**EVENTS, "item_id": ["a", "007"]}}
    found = ingested(tables_config(make_config, items, folder_of(tmp_path / "good", **files))).lake.read("interactions")
    assert sorted(found["item_id"].to_pylist()) == ["007", "7", "7", "a"]
    bad = folder_of(tmp_path / "bad", **files, day3={**EVENTS, "item_id": [7.0, None]})
    with pytest.raises(
        InputError,
        match=r"source.tables.interactions .*bad/day3.parquet: column 'item_id' is double; an id must be text",
    ):
        ingested(tables_config(make_config, items, bad))
    missing = folder_of(tmp_path / "missing", **files, day4={"user_id": ["a"], "timestamp": [1]})
    with pytest.raises(
        InputError, match=r"missing/day4.parquet: column 'item_id' is missing .* which other files have"
    ):
        ingested(tables_config(make_config, items, missing))


def test_hive_partitions_keep_their_text(make_config, tmp_path):
    items = parquet(tmp_path / "i.parquet", item_id=["001", "1"], text=[[1.0], [2.0]])
    for value in ("001", "1", "a%20b", "__HIVE_DEFAULT_PARTITION__"):
        folder = tmp_path / "events" / f"user_id={value}"
        folder.mkdir(parents=True)
        parquet(folder / "part.parquet", item_id=["001"], timestamp=[1])
    found = ingested(tables_config(make_config, items, str(tmp_path / "events"))).lake.read("interactions")
    assert sorted(found["user_id"].to_pylist(), key=str) == ["001", "1", None, "a b"]


@pytest.mark.parametrize(
    "name", ["a b #1", "100%25", "items[v2]{x}", "2026-05-01T00:00:00", "caf\u00e9 \u65e5\u672c", "part=x"]
)
def test_files_may_have_any_name(make_config, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    items = parquet(folder / f"{name}.items.parquet", item_id=["x"], text=[[1.0]])
    parquet(folder / f"{name}.events.parquet", **EVENTS)
    assert ingested(tables_config(make_config, items, str(folder / f"{name}.events.parquet"))).facts == {
        "items": 1,
        "interactions": 2,
    }


@pytest.mark.parametrize(
    "vectors",
    [
        pa.array([[1.0, 2.0], None, []], pa.list_(pa.float16())),
        pa.array([[1.0, 2.0], None, []], pa.large_list(pa.float64())),
        pa.array([[1, 2], None, []], pa.list_(pa.int64())),
        pa.array([[Decimal(1), Decimal(2)], None, []], pa.list_(pa.decimal128(9, 0))),
    ],
    ids=["half", "double", "integer", "decimal"],
)
def test_vectors_of_every_kind_become_float32(make_config, tmp_path, vectors):
    items = parquet(tmp_path / "i.parquet", item_id=["x", "y", "z"], text=vectors)
    found = rows(
        ingested(tables_config(make_config, items, parquet(tmp_path / "e.parquet", **EVENTS))), "items", "item_id"
    )
    assert [row["text"] for row in found] == [[1.0, 2.0], None, []]


def test_lists_of_fixed_size_may_have_null_rows(make_config, tmp_path):
    fixed = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    files = {"a": {"item_id": ["x", "y"], "text": fixed}, "b": {"item_id": ["z"], "text": [[3.0, 4.0]], "title": ["Z"]}}
    for name, columns in files.items():
        folder = tmp_path / "items" / f"day={name}[1]"
        folder.mkdir(parents=True)
        parquet(folder / "part 1.parquet", **columns)
    found = ingested(tables_config(make_config, str(tmp_path / "items"), parquet(tmp_path / "e.parquet", **EVENTS)))
    rest = {"x": ([1.0, 2.0], None), "y": (None, None), "z": ([3.0, 4.0], "Z")}
    assert {row["item_id"]: (row["text"], row["title"]) for row in rows(found, "items", "item_id")} == rest


def test_rows_whose_columns_are_all_in_the_names_of_folders(make_config, tmp_path):
    items = folder_of(tmp_path / "items", a={"item_id": ["x"], "text": [[1.0]]})
    (tmp_path / "items" / "item_id=007").mkdir()
    pq.write_table(pa.table({"other": [1, 2]}), tmp_path / "items" / "item_id=007" / "b.parquet")
    found = ingested(tables_config(make_config, items, parquet(tmp_path / "e.parquet", **EVENTS)))
    assert [(row["item_id"], row["text"]) for row in rows(found, "items", "item_id")] == [
        ("007", None),
        ("007", None),
        ("x", [1.0]),
    ]


def test_labels_and_ratings_are_distinguished(make_config, tmp_path):
    items = parquet(tmp_path / "i.parquet", item_id=["x"], text=[[1.0]])

    def said(**columns):
        table = ingested(
            tables_config(make_config, items, parquet(tmp_path / "e.parquet", **{**EVENTS, **columns}))
        ).lake.read("interactions")
        return list(zip(table["rating"].to_pylist(), table["label"].to_pylist()))

    assert said(label=[1, 0]) == [(None, 1.0), (None, 0.0)]
    assert said(label=[True, None]) == [(None, 1.0), (None, None)]
    assert said(rating=[True, False]) == [(None, 1.0), (None, 0.0)], (
        "booleans are labels, whatever the column is called"
    )
    assert said(rating=[float("nan"), 4.5], label=[2, 1]) == [(None, 2.0), (4.5, 1.0)]


def test_a_title_that_is_no_text_is_left_out(make_config, tmp_path, capsys):
    items = parquet(tmp_path / "i.parquet", item_id=["x"], text=[[1.0]], title=[[1.0, 2.0]])
    found = ingested(tables_config(make_config, items, parquet(tmp_path / "e.parquet", **EVENTS)))
    assert rows(found, "items", "item_id")[0]["title"] is None
    assert "column 'title' is list<element: double>, not text: titles are left out" in capsys.readouterr().err


def test_nothing_is_replaced_unless_every_table_can_be_read(make_config, tmp_path, monkeypatch):
    items, events = (
        parquet(tmp_path / name, **columns)
        for name, columns in (("i.parquet", {"item_id": ["x"], "text": [[1.0]]}), ("e.parquet", EVENTS))
    )
    cfg = tables_config(make_config, items, events)
    context = ingested(cfg)
    before = {name: (context.lake.read(name), context.lake.input_hash(name)) for name in ("items", "interactions")}
    parquet(tmp_path / "i.parquet", item_id=["x", "new"], text=[[1.0], [2.0]])
    parquet(tmp_path / "e.parquet", **{**EVENTS, "pos": [0.5, 1.0]})  # seen only where the rows are read
    with pytest.raises(
        InputError, match=r"^source.tables.interactions .*e.parquet: column 'pos' is double and has a value"
    ):
        ingested(cfg)
    for name, (table, stamp) in before.items():
        assert context.lake.read(name).equals(table) and context.lake.input_hash(name) == stamp
    fresh = cfg.model_copy(update={"name": "first"})
    with pytest.raises(InputError, match="column 'pos'"):
        ingested(fresh)
    lake = tracking.open_lake(fresh)
    assert not lake.exists("items") and not lake.exists("interactions")


# --- arrays ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "items.txt").write_text('0007\nx,"y"\n日本\n', encoding="utf-8")
    parquet(folder / "items.parquet", item_id=[7, 8, 9], title=["a", None, "c"])
    parquet(folder / "interactions.parquet", user_id=["a"], item_id=["7"], pos=[0])
    np.save(folder / "text.npy", np.arange(6, dtype=np.float16).reshape(3, 2))
    np.save(folder / "behavior.npy", np.ones((3, 4)))
    return folder


def arrays_config(make_config, folder, items="items.txt", content=("text",), **sections):
    source = {
        "kind": "arrays",
        "arrays": {
            "folder": str(folder),
            "items": items,
            "embeddings": {"text": "text.npy", "behavior": "behavior.npy"},
        },
    }
    return make_config(source=source, features={"content": list(content)}, **sections)


def test_arrays_beside_a_text_file(make_config, folder):
    context = ingested(arrays_config(make_config, folder))
    assert {row["item_id"]: row["text"] for row in rows(context, "items", "item_id")} == {
        "0007": [0, 1],
        'x,"y"': [2, 3],
        "日本": [4, 5],
    }
    assert rows(context, "interactions", "user_id") == [
        {"user_id": "a", "item_id": "7", "timestamp": None, "pos": 0, "rating": None, "label": None}
    ]


def test_arrays_beside_a_table_in_many_tasks(make_config, folder, monkeypatch):
    monkeypatch.setattr(ingest, "_CHUNK", 2)
    found = rows(
        ingested(arrays_config(make_config, folder, "items.parquet", behavior={"source": "column"})), "items", "item_id"
    )
    assert found == [
        {"item_id": str(7 + i), "title": title, "text": [2.0 * i, 2.0 * i + 1], "behavior": [1.0] * 4}
        for i, title in enumerate(["a", None, "c"])
    ]


def test_array_errors_name_file_and_key(make_config, folder):
    def fails(message: str, **options):
        with pytest.raises(InputError, match=message) as caught:
            ingested(arrays_config(make_config, folder, **options))
        assert "\n" not in str(caught.value)

    fails(
        r"'arrays' has no modality 'visual' \(it has: text, behavior\): .*add it to source.arrays.embeddings",
        content=("text", "visual"),
    )
    fails(r"source.arrays.items .*none.txt: does not exist", items="none.txt")
    fails(
        r"source.arrays.embeddings.text .*text.npy: 3 rows, but .*interactions.parquet has 1 items",
        items="interactions.parquet",
    )
    parquet(folder / "other.parquet", id=[1])
    fails(r"other.parquet: column 'item_id' is missing \(found: id\)", items="other.parquet")
    (folder / "bad.parquet").write_bytes(b"nothing")
    fails(r"source.arrays.items .*bad.parquet: not readable", items="bad.parquet")
    for value, message in (
        (np.ones((4, 2)), r"source.arrays.embeddings.text .*text.npy: 4 rows, but .*items.txt has 3 items"),
        (np.ones(3), r"text.npy: holds float64 of shape \(3,\); must be one float array"),
        (
            np.array([[object()]] * 3),
            r"source.arrays.embeddings.text .*text.npy: not a readable .npy array \(Array can't be memory-mapped",
        ),
    ):
        np.save(folder / "text.npy", value, allow_pickle=True)
        fails(message)
    (folder / "text.npy").unlink()
    fails(r"source.arrays.embeddings.text .*text.npy: does not exist")
    parquet(folder / "floats.parquet", item_id=[1.0, 2.0, 3.0])
    np.save(folder / "text.npy", np.ones((3, 2), np.float16))
    fails(
        r"source.arrays.items .*floats.parquet: column 'item_id' is double; an id must be text or an integer",
        items="floats.parquet",
    )


@pytest.mark.parametrize(
    ("name", "items", "modalities"),
    [("beauty", "items.parquet", {"text": 384}), ("instruments", "items.txt", {"text": 64, "visual": 64})],
)
def test_real_arrays(make_config, real_data, name, items, modalities):
    embeddings = {modality: f"{modality}_embedding.npy" for modality in modalities}
    cfg = make_config(
        source={
            "kind": "arrays",
            "arrays": {"folder": str(real_data / name), "items": items, "embeddings": embeddings},
        },
        features={"content": list(modalities)},
    )
    context = ingested(cfg)
    assert (
        context.facts
        == {
            "beauty": {"items": 12_101, "interactions": 198_502},
            "instruments": {"items": 6_250, "interactions": 136_226},
        }[name]
    )
    path = real_data / name / items
    ids = path.read_text().split() if items.endswith("txt") else pq.read_table(path)["item_id"].to_pylist()
    found = {row["item_id"]: row for row in context.lake.read("items").to_pylist()}
    assert set(found) == set(ids)
    for modality, width in modalities.items():
        array = np.load(real_data / name / embeddings[modality])
        for row in (0, 1, 9_999 % len(ids), len(ids) - 1):
            assert array.shape[1] == width and np.array_equal(
                np.float32(found[ids[row]][modality]), array[row].astype(np.float32)
            )


# --- amazon ----------------------------------------------------------------------------------------------------------

REVIEWS = {
    2014: [
        {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1252800000},
        {"reviewerID": "A2", "asin": "B2", "overall": 3.0, "unixReviewTime": 1252800001},
    ],
    2018: [
        {
            "overall": 4.0,
            "verified": True,
            "reviewerID": "A1",
            "asin": "B1",
            "style": {"Size:": " L"},
            "unixReviewTime": 1514764800,
        }
    ],
    2023: [
        {"rating": 1.0, "asin": "V1", "parent_asin": "B1", "user_id": "AE1", "timestamp": 1588687728923, "images": []}
    ],
}
PRODUCTS = {
    2014: [
        {"asin": "B1", "title": "Rose soap, kid's", "brand": "Acme", "categories": [["Beauty", "Soap"]], "price": 6.5},
        {"asin": "B2", "title": "Rose soap", "categories": [["Beauty", "Soap"], ["Gifts"]], "description": "Soft."},
        {"asin": "B3", "imUrl": "http://pictures.example/b3.jpg"},
    ],
    2018: [
        {"asin": "B1", "title": "Rose soap", "brand": "Acme", "category": ["Beauty", "Soap"], "also_buy": ["B2"]},
        {
            "asin": "B2",
            "title": "Soap rose Acme",
            "category": [],
            "imageURLHighRes": ["http://x/2.jpg", "http://x/3.jpg"],
        },
    ],
    2023: [
        {"parent_asin": "B1", "title": "Rose soap", "store": "Acme", "categories": ["Beauty"], "details": {"a": 1}},
        {
            "parent_asin": "B2",
            "title": "rose",
            "description": ["Soft", "\u00e9 soap"],
            "images": [{"thumb": "http://x/t.jpg", "large": "http://x/l.jpg", "variant": "MAIN", "hi_res": None}, {}],
        },
    ],
}
RAW = {
    2014: [
        ("Acme", "Beauty > Soap", None, None),
        (None, "Beauty > Soap, Gifts", "Soft.", None),
        (None, None, None, "http://pictures.example/b3.jpg"),
    ],
    2018: [("Acme", "Beauty > Soap", None, None), (None, "", None, "http://x/2.jpg")],
    2023: [("Acme", "Beauty", None, None), (None, None, "Soft \u00e9 soap", "http://x/l.jpg")],
}
"""Brand, categories, description and picture of the products."""
BROKEN = '{"asin": "B9", "title": "cut off he'


def amazon_config(make_config, folder: Path, year: int, **options):
    """Files of one release, gzipped except for 2023, each with a broken line; 2014 products are Python literals."""
    paths = {}
    for name, content in (("reviews", REVIEWS[year]), ("metadata", PRODUCTS[year])):
        literal = year == 2014 and name == "metadata"
        lines = [str(row) if literal else json.dumps(row) for row in content]
        text = "\n".join([lines[0], BROKEN, "", *lines[1:]]) + "\n"
        path = folder / f"{name}.json{'' if year == 2023 else '.gz'}"
        path.write_bytes(text.encode() if year == 2023 else gzip.compress(text.encode()))
        paths[name] = str(path)
    return make_config(source={"kind": "amazon", "amazon": paths}, features=TEXT, **options)


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_amazon_releases(make_config, tmp_path, year):
    text = {"fields": list(AMAZON_TEXTS)}
    visual = {"field": "image", "model": "none"}
    cfg = amazon_config(make_config, tmp_path, year)
    assert cfg.content.encoders["text"].fields == AMAZON_TEXTS and cfg.content.encoders["text"].model == "tf-idf"
    cfg = cfg.model_copy(update={"content": Content(encoders={"text": Encoder(**text), "visual": Encoder(**visual)})})
    context = ingested(cfg)
    events, items = rows(context, "interactions", "user_id"), rows(context, "items", "item_id")
    first = {2014: ("A1", "1252800000", 5.0), 2018: ("A1", "1514764800", 4.0), 2023: ("AE1", "1588687728923", 1.0)}[
        year
    ]
    assert events[0] == {
        "user_id": first[0],
        "item_id": "B1",
        "timestamp": first[1],
        "pos": None,
        "rating": first[2],
        "label": None,
    }
    assert [row["item_id"] for row in items] == [row.get("asin", row.get("parent_asin")) for row in PRODUCTS[year]]
    assert items[0]["title"] == PRODUCTS[year][0]["title"]
    raw = [
        (row["brand"], row["categories"], row["description"], row["image"] and row["image"]["path"]) for row in items
    ]
    assert raw == RAW[year]
    assert context.facts == {"items": len(items), "interactions": len(events), "unparsable_lines": 2}
    refused = rows(context, "rejected_rows", "table")
    assert [row["table"] for row in refused] == ["interactions", "items"]
    assert all(
        (row["reason"], row["copies"], json.loads(row["row"])) == ("unparsable_json", 1, {"line": BROKEN})
        for row in refused
    )
    assert ingested(cfg).status == "up to date" and context.lake.version("rejected_rows") == 0
    amazon = cfg.source.amazon.model_copy(update={"pictures": "/pictures"})
    cfg = cfg.model_copy(update={"source": cfg.source.model_copy(update={"amazon": amazon})})
    names = [row["image"] and row["image"]["path"] for row in rows(ingested(cfg), "items", "item_id")]
    assert names == [place and place.rpartition("/")[2] for *_, place in RAW[year]]


def test_amazon_errors(make_config, tmp_path):
    cfg = amazon_config(make_config, tmp_path, 2018)
    with pytest.raises(InputError, match=r"'amazon' has no modality 'visual' \(it has: none\): .*encode it"):
        ingested(make_config(source=cfg.source.model_dump()))
    price = {"encoders": {"text": {"fields": ["title", "price"]}}}
    with pytest.raises(
        InputError, match=r"content.encoders reads 'price', but source.kind 'amazon' has the raw fields"
    ):
        ingested(make_config(source=cfg.source.model_dump(), features=TEXT, content=price))
    swapped = cfg.source.model_dump(exclude_none=True)
    swapped["amazon"] |= {"reviews": cfg.source.amazon.metadata}
    with pytest.raises(InputError, match=r"source.amazon.reviews .*: no line has reviewerID or user_id"):
        ingested(make_config(source=swapped, features=TEXT))
    Path(cfg.source.amazon.reviews).write_bytes(gzip.compress(b"x" * 10_000)[:30])
    with pytest.raises(
        InputError, match=r"source.amazon could not be copied into the lake \(.*reviews.json.gz\S*\); check the files"
    ) as caught:
        ingested(cfg)
    assert "\n" not in str(caught.value)
    Path(cfg.source.amazon.reviews).unlink()
    with pytest.raises(InputError, match=r"source.amazon.reviews .*reviews.json.gz: does not exist"):
        ingested(cfg)


def test_amazon_files_as_they_are(make_config, tmp_path):
    """A byte-order mark, CRLF, gzip members, price and rank of any type, HTML in titles, Python literals beside JSON,
    copies word for word."""
    products = [
        {
            "asin": "B1",
            "title": "<b>Rose</b> soap &amp; oil",
            "price": "$6.50",
            "rank": ">#1 in Beauty",
            "category": ["Beauty"],
        },
        {"asin": "B2", "title": "Rose", "price": 6.5, "rank": [">#2"], "details": {"a": None}},
    ]
    literal = {
        "asin": "B3",
        "title": 'Caf\u00e9 "X" it\'s',
        "price": None,
        "salesRank": {"Beauty": 3},
        "new": True,
        "categories": [["Beauty", "Soap"]],
    }
    lines = [
        "\ufeff" + json.dumps(products[0]),
        json.dumps(products[1]),
        json.dumps(products[1]),
        repr(literal).encode("ascii", "backslashreplace").decode(),
    ]
    lines += [
        "{'asin': 'B4', 'title': __import__('os')}",
        "[1]",
        "{'asin': 'B5'",
        "{'asin': 'B6', 'category': {b'a': 1}}",
    ]
    lines.insert(4, r"{'asin': 'B7', 'title': '\ud800 rose', 'category': ['\ud800'], 'new': True}")
    half = len(lines) // 2
    members = ["\r\n".join(part) + "\r\n" for part in (lines[:half], lines[half:])]
    (tmp_path / "meta.json.gz").write_bytes(b"".join(gzip.compress(part.encode()) for part in members))
    (tmp_path / "reviews.json").write_text("".join(json.dumps(row) + "\n" for row in REVIEWS[2014]))
    paths = {"reviews": str(tmp_path / "reviews.json"), "metadata": str(tmp_path / "meta.json.gz")}
    context = ingested(make_config(source={"kind": "amazon", "amazon": paths}, features=TEXT))
    found = rows(context, "items", "item_id")
    assert [(row["item_id"], row["title"]) for row in found] == [
        ("B1", "<b>Rose</b> soap &amp; oil"),
        ("B2", "Rose"),
        ("B2", "Rose"),
        ("B3", 'Caf\u00e9 "X" it\'s'),
        ("B7", "? rose"),
    ]
    assert found[1] == found[2] and found[3]["categories"] == "Beauty > Soap"
    refused = {json.loads(row["row"])["line"] for row in rows(context, "rejected_rows", "row")}
    assert refused == set(lines[5:]) and context.facts["unparsable_lines"] == 4


def test_an_array_of_json_is_named(make_config, tmp_path):
    cfg = amazon_config(make_config, tmp_path, 2018)
    Path(cfg.source.amazon.metadata).write_bytes(gzip.compress(json.dumps(PRODUCTS[2018], indent=1).encode()))
    with pytest.raises(
        InputError,
        match=r"source.amazon.metadata .*metadata.json.gz: is one JSON array; give one product or review a line",
    ):
        ingested(cfg)
