"""Read exported files as their consumers do, for a catalogue whose ids are hostile to text files."""

import json

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adasid import tables
from adasid.errors import InputError
from adasid.sid import Slot
from pipelines.publish import exports, generations
from pipelines.publish.generations import Generation
from pipelines.run import Run

IDS = [
    *("plain", "00001", "1", "1e5", "NULL", "nan", "true", "None", "#comment", " leading", "trailing ", "a b", "a\tb"),
    *("a,b", "a;b", "a|b", '"quoted"', '"', "''", "\\", "\\n", "a\\", "%25", "<b>&amp;</b>", "{0}", "[1]"),
    *("é", "e\u0301", "🛒", "\u200b", "\ufeffbom", "x" * 5000),
]
LINE_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
SLOTS = [Slot("s0", "shared", 8), Slot("t0", "text", 8)]


def publish(lake, ids, number=1, live=True):
    """A generation of ``ids`` as publication leaves it; returns it. The first and the last item share a SID."""
    codes = [[i // 8 % 8, i % 8] for i in range(len(ids) - 1)] + [[0, 0]]
    order = np.random.default_rng(number).permutation(len(ids))
    rows = {"item_id": ids, "item_index": range(len(ids)), "codes": codes, "collision_rank": [*[0] * (len(ids) - 1), 1]}
    rows["tokens"] = [[f"<s0_{a}>", f"<t0_{b}>"] for a, b in codes]
    kinds = {**{field.name: field.type for field in tables.SIDS}, "item_index": pa.int64()}
    table = pa.table({name: pa.array(values, kinds[name]) for name, values in rows.items()})
    index = table.take(pa.array(order)).select(["item_id", "item_index"])
    features = lake.write("item_features", index.schema, index.to_batches(), "f")
    sids = table.drop_columns(["item_index"])
    version = lake.write("sids", sids.schema, sids.to_batches(), "s")
    generation = Generation(
        generation=number,
        policy="full",
        run_date=None,
        inputs={"item_features": features},
        tokenizer="d",
        artifact="a",
        items=len(ids),
        metrics={},
        gates=(),
        churn={},
        drift={},
        parent=None,
        sids_version=version,
        run="t",
    )
    known = lake.read("generations").to_pylist() if lake.exists("generations") else []
    written = pa.Table.from_pylist([*known, generation.row()], schema=tables.GENERATIONS)
    lake.write("generations", written.schema, written.to_batches(), "g")
    if live:
        move(lake, number, version)
    return generation


def move(lake, number, version):
    there = pa.Table.from_pylist([{"generation": number, "sids_version": version}], schema=tables.LIVE)
    lake.write("live", there.schema, there.to_batches(), "l")


def pointed(cfg, lake):
    exports.point(cfg, lake)
    return json.loads((Run(cfg).exports / "live.json").read_text(encoding="utf-8"))


def test_every_reader_finds_the_codes_of_each_item(spark, lake, make_config):
    cfg, generation = make_config(), publish(lake, IDS)
    exports.check(cfg, lake, generation.inputs["item_features"])
    exports.write(cfg, lake, SLOTS, generation)
    folder = Run(cfg).exports / pointed(cfg, lake)["folder"]
    right = {r["item_id"]: tuple(r["codes"]) for r in lake.read("sids").to_pylist()}
    assert len(right) == len(IDS)

    codes, text = np.load(folder / "codes.npy"), (folder / "item_ids.txt").read_text(encoding="utf-8")
    with (folder / "item_ids.txt").open(encoding="utf-8") as file:
        lines = [line.removesuffix("\n") for line in file]
    assert lines == text.splitlines() == text.split("\n")[:-1] and len(lines) == len(codes) == len(IDS)
    assert {item: tuple(row) for item, row in zip(lines, codes.tolist())} == right

    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    tokens = {item: [f"<s0_{a}>", f"<t0_{b}>"] for item, (a, b) in right.items()}
    assert {lines[int(place)]: found for place, found in index.items()} == tokens

    arrow = ds.dataset(folder / "sids").to_table().to_pylist()
    assert [r["item_id"] for r in arrow] == lines and {r["item_id"]: tuple(r["codes"]) for r in arrow} == right
    found = duckdb.sql(f"SELECT item_id, codes FROM read_parquet('{folder}/sids/*.parquet')").fetchall()
    assert {item: tuple(row) for item, row in found} == right and len(found) == len(IDS)
    groups = duckdb.sql(f"SELECT codes, unnest(items) FROM read_parquet('{folder}/items/*.parquet')").fetchall()
    assert {item: tuple(row) for row, item in groups} == right and ([0, 0], IDS[0]) in groups


def test_the_pointer_follows_the_live_generation(spark, lake, make_config):
    cfg, off = make_config(retokenize={"exports": ["array"]}), make_config(retokenize={"exports": []})
    first = publish(lake, IDS[:9])
    exports.write(cfg, lake, SLOTS, first)
    facts = {"generation": 1, "folder": "1", "sids_version": 0, "tokenizer": "d"}
    assert pointed(cfg, lake) == facts
    second = publish(lake, IDS[:12], number=2, live=False)
    exports.write(cfg, lake, SLOTS, second)
    assert pointed(cfg, lake) == facts, "a generation that was never live"
    move(lake, 2, second.sids_version)
    assert pointed(cfg, lake) == {**facts, "generation": 2, "folder": "2", "sids_version": 1}
    move(lake, 1, 0)
    (Run(cfg).exports / "1" / "manifest.json").unlink()
    assert pointed(cfg, lake) == {**facts, "folder": None}, "a roll-back to exports that were removed"
    third = publish(lake, IDS[:12], number=3)
    exports.write(off, lake, SLOTS, third)
    assert pointed(off, lake) == {**facts, "generation": 3, "folder": None, "sids_version": 2}


def test_a_folder_of_an_earlier_lake_is_not_taken_for_the_generation(spark, lake, make_config):
    cfg = make_config(retokenize={"exports": ["array"]})
    generation = publish(lake, IDS[:9])
    other = generation.model_copy(update={"tokenizer": "of the lake that was removed"})
    exports.write(cfg, lake, SLOTS, other)
    assert pointed(cfg, lake)["folder"] is None
    exports.write(cfg, lake, SLOTS, generation)
    assert pointed(cfg, lake)["folder"] == "1"


def test_rows_that_item_features_lacks_are_not_lost(spark, lake, make_config):
    generation = publish(lake, IDS[:9])
    rest = lake.read("item_features").slice(1)
    inputs = {"item_features": lake.write("item_features", rest.schema, rest.to_batches(), "less")}
    generation = generation.model_copy(update={"inputs": inputs})
    with pytest.raises(InputError, match="generation has 9 items but 8 of them are in item_features"):
        exports.write(make_config(), lake, SLOTS, generation)
    assert not (Run(make_config()).exports / "1").exists()


def test_ids_that_break_lines_are_refused(lake, make_config):
    for place, character in enumerate(LINE_BREAKS):
        rows = pa.table({"item_id": ["a", f"b{character}c"]})
        version = lake.write("item_features", rows.schema, rows.to_batches(), str(place))
        with pytest.raises(InputError) as error:
            exports.check(make_config(), lake, version)
        message = str(error.value)
        assert repr(f"b{character}c") in message and len(message.splitlines()) == 1
        assert "item_ids.txt" in message and "leave 'array' out of retokenize.exports" in message
        exports.check(make_config(retokenize={"exports": ["parquet", "index", "changes"]}), lake, version)


@settings(deadline=None)  # a busy machine
@given(st.text(min_size=1))
def test_exactly_the_ids_that_splitlines_splits_are_refused(text):
    found = pc.match_substring_regex(pa.array([text]), exports._LINE_BREAKS)[0].as_py()
    assert found == (text.splitlines() != [text])


def test_nothing_is_published_without_a_pointer(lake, make_config):
    exports.point(make_config(), lake)
    assert generations.pointer(lake) is None and not Run(make_config()).exports.exists()
