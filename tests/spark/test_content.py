"""The stage ``content`` on tables with raw fields: what is encoded, what is not encoded again, bad content, another
encoder, an interrupted run."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adasid.errors import ConfigError, GateError, InputError
from pipelines import content, features, ingest
from pipelines.content import pool
from pipelines.engines import tracking
from tests import models

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")

ITEMS = 24
WORDS = ["rose", "soap", "oil", "cream", "lotion", "brush", "hair", "skin", "nail", "polish", "shampoo", "balm"]


def picture(seed: int, kind: str = "JPEG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def catalogue() -> dict[str, list]:
    """Titles, nested categories and pictures: bytes, files and bad ones."""
    columns = {
        "item_id": [f"i{i:02}" for i in range(ITEMS)],
        "title": [f"{WORDS[i % 12]} {WORDS[(5 * i + 1) % 12]} {i}" for i in range(ITEMS)],
        "brand": [None if i % 3 else f"brand {i % 4}" for i in range(ITEMS)],
        "categories": [["Beauty", WORDS[i % 4]] for i in range(ITEMS)],
        "image": [{"bytes": picture(i), "path": None} for i in range(ITEMS)],
    }
    bad = (None, b"", b"<html>404</html>", picture(9)[:200])
    for row, data in enumerate(bad):
        columns["image"][row] = data if data is None else {"bytes": data, "path": None}
    columns["image"][4] = {"bytes": None, "path": "pictures/4.png"}
    columns["image"][5] = {"bytes": None, "path": "pictures/missing.png"}
    columns["image"][6] = {"bytes": None, "path": "https://pictures.example/6.jpg"}
    for name in ("title", "brand", "categories"):
        columns[name][7] = None
    columns["title"][8], columns["brand"][8], columns["categories"][8] = "<p></p>", None, None
    return columns


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.siglip(tmp_path_factory.mktemp("models") / "siglip")


@pytest.fixture
def shop(tmp_path):
    """The folder of the source; call it to write the items."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "4.png").write_bytes(picture(4, "PNG"))
    rng = np.random.default_rng(2)
    users, items = rng.integers(0, 20, 300), rng.integers(0, ITEMS, 300)
    events = {"user_id": users, "item_id": [f"i{i:02}" for i in items], "timestamp": 1_500_000_000 + np.arange(300)}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")

    def write(columns: dict[str, list]) -> Path:
        pq.write_table(pa.table(columns), tmp_path / "items.parquet")
        return tmp_path

    return write


@pytest.fixture
def make(make_config, model, tmp_path):
    def config(name: str = "t", text: dict | None = None, **settings):
        paths = {"items": str(tmp_path / "items.parquet"), "interactions": str(tmp_path / "events.parquet")}
        text = {"fields": ["title", "brand", "categories"], "width": 8, **(text or {})}
        visual = {"model": str(model), "field": "image", "batch": 4}
        return make_config(
            name=name,
            source={"kind": "tables", "tables": paths},
            content={"encoders": {"text": text, "visual": visual}, "part_items": 5, **settings},
            features={"max_rejected": 0.5},
            ray={"workers": 0},
        )

    return config


def ran(cfg, function=content.run):
    with tracking.stage(cfg, function.__module__.rpartition(".")[2], journal=True) as context:
        function(cfg, context)
    return context


def vectors(lake) -> dict[tuple[str, str], tuple]:
    """(modality, fingerprint) -> vector and reason."""
    rows = lake.read("content_embeddings").to_pylist()
    assert len({(row["modality"], row["encoder"], row["fingerprint"]) for row in rows}) == len(rows)
    return {(row["modality"], row["fingerprint"]): (row["vector"], row["reason"]) for row in rows}


@pytest.mark.usefixtures("spark")
def test_raw_fields_become_vectors_and_bad_content_a_reason(make, shop):
    shop(catalogue())
    cfg = make()
    ran(cfg, ingest.run)
    context = ran(cfg)
    found = vectors(context.lake)
    texts = [vector for (modality, _), (vector, _) in found.items() if modality == "text"]
    assert sum(vector is not None for vector in texts) == ITEMS - 2  # one without text, one of mark-up only
    assert all(np.isclose(np.linalg.norm(vector), 1) for vector in texts if vector)
    rejected = {
        (json.loads(row["row"])["item_id"], row["reason"])
        for row in context.lake.read("rejected_rows").to_pylist()
        if row["reason"].startswith("content_")
    }
    assert rejected == {
        ("i01", "content_empty_file"),
        ("i02", "content_not_a_picture"),
        ("i03", "content_truncated"),
        ("i05", "content_missing_file"),
        ("i06", "content_web_not_allowed"),
        ("i08", "content_empty_text"),
    }
    assert ran(cfg).status == "up to date"
    lake = ran(cfg, features.run).lake
    (stats,) = lake.read("catalog_stats").to_pylist()
    assert stats["items"] == ITEMS and dict(stats["missing"]) == {"text": 2, "visual": 6}
    assert not dict(stats["rejected"])


@pytest.mark.usefixtures("spark")
def test_only_what_changed_is_encoded_and_another_encoder_is_a_deliberate_act(make, shop):
    columns = catalogue()
    shop(columns)
    cfg = make()
    ran(cfg, ingest.run)
    first = ran(cfg)
    before = vectors(first.lake)
    for name in ("title", "brand", "categories", "image"):
        columns[name].append(columns[name][13])
    columns["item_id"].append("new")
    columns["title"][10], columns["title"][11] = "another title", columns["title"][12]
    columns["image"][14] = {"bytes": picture(99), "path": None}
    shop(columns)
    ran(cfg, ingest.run)
    with pytest.raises(InputError, match=r"content_embeddings lags behind items .*: run jobs/encode_content.py"):
        ran(cfg, features.run)
    context = ran(cfg)
    assert context.facts["encoded"] == 3 + 2  # two texts that no item had, one picture, and two that could not be read
    after = vectors(context.lake)
    assert {key: after[key] for key in before} == before and len(after) == len(before) + 3
    shop(catalogue())  # as at first: nothing is lost that was there
    ran(cfg, ingest.run)
    assert ran(cfg).facts["encoded"] == 2
    (stats,) = ran(cfg, features.run).lake.read("catalog_stats").to_pylist()
    assert dict(stats["missing"]) == {"text": 2, "visual": 6} and vectors(first.lake) == after
    other = make(text={"width": 12})
    for changed, said in (
        (other, "width 8 -> 12"),
        (make(text={"fields": ["title"]}), r"fields \['title', 'brand', 'categories'\] -> \['title'\]"),
        (make(text={"model": "some/model"}), "model 'tf-idf' -> 'some/model'"),
        (make(text={"width": None}), "width 8 -> 256"),
    ):
        with pytest.raises(InputError, match=f"content.encoders.text is another encoder .*{said}.*encode_content.py"):
            ran(changed, features.run)
    with pytest.raises(
        GateError, match=r"content.encoders.text is another encoder .*width 8 -> 12.*content.replace=true"
    ):
        ran(other)
    assert vectors(first.lake) == after
    replaced = vectors(ran(make(text={"width": 12}, replace=True)).lake)
    assert {len(v) for (modality, _), (v, _) in replaced.items() if modality == "text" and v} == {12}
    pictures = [{key: rows[key] for key in rows if key[0] == "visual"} for rows in (replaced, after)]
    assert pictures[0] == pictures[1]


@pytest.mark.usefixtures("spark")
def test_an_interrupted_run_keeps_what_is_done_whatever_changed_since(make, shop, monkeypatch):
    columns = catalogue()
    shop(columns)
    cfg = make()
    ran(cfg, ingest.run)
    encode, parts = pool.EncodePart.__call__, []

    def interrupted(worker, row):
        if len(parts) == 3:
            raise KeyboardInterrupt
        parts.append(encode(worker, row)["items"])
        return {"part": row["part"], "items": parts[-1], "busy": 1.0, "model": 1.0}

    monkeypatch.setattr(pool.EncodePart, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ran(cfg)
    with pytest.raises(InputError, match=r"content_embeddings does not exist|content_embeddings is not complete"):
        ran(cfg, features.run)
    monkeypatch.setattr(pool.EncodePart, "__call__", encode)
    columns["title"][20] = "changed meanwhile"
    shop(columns)
    ran(cfg, ingest.run)
    context = ran(cfg)
    texts, pictures = ITEMS - 1, ITEMS - 1
    assert context.facts["encoded"] in {texts + pictures - sum(parts), texts + pictures - sum(parts) + 1}
    found = vectors(context.lake)
    modalities = [modality for modality, _ in found]
    assert modalities.count("text") - texts in {0, 1} and modalities.count("visual") == pictures
    assert ran(cfg, features.run).lake.read("catalog_stats").to_pylist()[0]["items"] == ITEMS


@pytest.mark.usefixtures("spark")
def test_a_catalogue_without_any_text_has_no_words_to_count(make, shop):
    columns = catalogue()
    for name in ("title", "brand", "categories"):
        columns[name] = [None] * ITEMS
    shop(columns)
    cfg = make()
    ran(cfg, ingest.run)
    with pytest.raises(InputError, match=r"no item has a text in title, brand, categories, .*: name other fields"):
        ran(cfg)


def test_a_part_with_large_pictures_is_read_a_few_at_a_time(tmp_path, monkeypatch):
    raw = [b"x" * 1000 * (1 + i // 20) for i in range(40)]
    rows = pa.table({"fingerprint": [str(i) for i in range(40)], "raw": raw})
    pq.write_table(rows, tmp_path / "part.parquet", row_group_size=20, use_dictionary=False)
    monkeypatch.setattr(pool, "_BYTES", 10_000)
    with pq.ParquetFile(tmp_path / "part.parquet") as file:
        found = list(pool._batches(file, 16))
        assert [len(batch) for batch in found] == [8, 8, 4, *[4] * 5]
        assert pa.Table.from_batches(found).equals(rows)
        assert [len(batch) for batch in pool._batches(file, 3)] == [3] * 6 + [2] + [3] * 6 + [2]


def test_mistakes_in_the_config_are_named(make_config):
    for content_, problem in (
        ({"encoders": {"text": {"fields": ["title"], "field": "image"}}}, "content.encoders.text must read text or a"),
        ({"encoders": {"visual": {"field": "image"}}}, "content.encoders.visual.model is 'tf-idf'"),
        ({"encoders": {"sound": {"fields": ["title"]}}}, r"content.encoders.sound: features.content is \['text'"),
        ({"encoders": {"text": {"fields": ["item_id"]}}}, "content.encoders.text reads 'item_id'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            make_config(content=content_)
