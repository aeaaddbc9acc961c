"""The source ``folder``: a CSV or Parquet table of items beside a folder of pictures."""

from __future__ import annotations

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adasid.errors import InputError
from pipelines import content, ingest
from tests import models
from tests.spark.test_content import picture, ran

pytest.importorskip("transformers")

ITEMS = 'item_id,title,price\n00a,"Rose, ""soft"" soap",6\n00b,"two\nlines",\n00c,Brush,7\n'
EVENTS = "user_id,item_id,timestamp,rating\nu1,00a,1500000000,5\nu1,00b,1500000001,\nu2,00c,1500000002,3.5\n"


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("00a.jpg", "00b.jpg"):
        (tmp_path / "pictures" / name).write_bytes(picture(1))
    (tmp_path / "items.csv").write_text(ITEMS, encoding="utf-8-sig")  # as Excel writes it
    (tmp_path / "interactions.csv").write_text(EVENTS)
    return tmp_path


@pytest.fixture
def make(make_config, shop):
    def config(pictures=True, **source):
        encoders = {"text": {"fields": ["title", "price"], "width": 8}}
        if pictures:
            encoders["visual"] = {"model": str(models.siglip(shop / "siglip")), "field": "image"}
        return make_config(
            source={"kind": "folder", "folder": {"folder": str(shop), **source}},
            content={"encoders": encoders},
            features={"content": list(encoders)},
            ray={"workers": 0},
        )

    return config


def test_csv_and_pictures_named_by_item(make):
    cfg = make(suffix=".jpg")
    lake = ran(cfg, ingest.run).lake
    items = sorted(lake.read("items").to_pylist(), key=lambda row: row["item_id"])
    assert [(row["item_id"], row["title"], row["price"], row["image"]["path"]) for row in items] == [
        ("00a", 'Rose, "soft" soap', "6", "00a.jpg"),
        ("00b", "two\nlines", None, "00b.jpg"),
        ("00c", "Brush", "7", "00c.jpg"),
    ]
    events = sorted(lake.read("interactions").to_pylist(), key=lambda row: row["timestamp"])
    assert [(row["item_id"], row["timestamp"], row["rating"], row["pos"]) for row in events] == [
        ("00a", "1500000000", 5.0, None),
        ("00b", "1500000001", None, None),
        ("00c", "1500000002", 3.5, None),
    ]
    context = ran(cfg, content.run)
    assert context.facts == {"refused contents": 1, "encoded": 6}
    (row,) = context.lake.read("rejected_rows").to_pylist()
    assert row["reason"] == "content_missing_file" and '"00c.jpg"' in row["row"]


def test_texts_need_no_folder_of_pictures(make, shop):
    shutil.rmtree(shop / "pictures")
    cfg = make(pictures=False)
    ran(cfg, ingest.run)
    assert ran(cfg, content.run).facts == {"encoded": 3}


def test_parquet_with_paths(make, shop):
    table = {"item_id": ["a", "b"], "title": ["x", "y"], "price": [1, None], "image": ["00a.jpg", None]}
    pq.write_table(pa.table(table), shop / "items.parquet")
    cfg = make(items="items.parquet")
    ran(cfg, ingest.run)
    assert ran(cfg, content.run).facts == {"encoded": 3}


def test_the_files_of_a_folder_have_the_same_columns(make, shop):
    parts = shop / "events.csv"
    parts.mkdir()
    first, *rows = EVENTS.splitlines()
    (parts / "part-0.csv").write_text("\n".join([first, *rows[:2]]))
    (parts / "part-1 é.csv").write_text("\n".join([first, *rows[2:]]))
    (parts / "part-2.csv").write_text("")
    cfg = make(pictures=False, interactions="events.csv")
    events = ran(cfg, ingest.run).lake.read("interactions")
    assert sorted(events["item_id"].to_pylist()) == ["00a", "00b", "00c"]
    swapped = ",".join(["item_id", "user_id", "timestamp", "rating"])
    (parts / "part-2.csv").write_text("\n".join([swapped, "00a,u3,1500000003,1"]))
    with pytest.raises(InputError, match=r"part-\d.* does not have the columns of the files beside it: write all"):
        ran(cfg, ingest.run)


def test_mistakes_are_named(make, shop):
    with pytest.raises(InputError, match=r"source.folder.items .*items.csv: column 'image' is missing"):
        ran(make(), ingest.run)
    (shop / "interactions.csv").write_text(EVENTS.replace("3.5", "good"))
    with pytest.raises(InputError, match=r"column 'rating' has a text that is no number: good"):
        ran(make(suffix=".jpg"), ingest.run)
    for broken in ("x\n", 'x,"an open quote,3\n', "x,title,1,2,3\n"):
        (shop / "interactions.csv").write_text(EVENTS)
        (shop / "items.csv").write_text(ITEMS + broken)
        with pytest.raises(InputError, match=r"source.folder could not be copied into the lake \(.*items.csv"):
            ran(make(suffix=".jpg"), ingest.run)
    for name, text in {"items.csv": ITEMS, "interactions.csv": EVENTS}.items():
        (shop / "items.csv").write_text(ITEMS)
        (shop / name).write_bytes(text.replace("00c", "00\xe9").encode("latin-1"))
        with pytest.raises(InputError, match=r"column 'item_id' has an id that is not UTF-8 .*: 00\ufffd; write"):
            ran(make(suffix=".jpg"), ingest.run)
    with pytest.raises(InputError, match=r"source.folder.items .*none.csv: does not exist"):
        ran(make(suffix=".jpg", items="none.csv"), ingest.run)
