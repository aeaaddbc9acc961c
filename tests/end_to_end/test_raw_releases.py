"""Run the chain from raw lines and pictures of the public Amazon files to the explorer, for each release. It runs with
`make drills` (``ADASID_DRILLS``)."""

from __future__ import annotations

import gzip
import json
import os
import re
from io import BytesIO

import numpy as np
import pytest

from adasid.config import build
from pipelines import chain
from tests import models
from tests.conftest import give_store
from tests.end_to_end.running import SMALL, lake_of, sids

pytestmark = pytest.mark.skipif(not os.environ.get("ADASID_DRILLS"), reason="runs with make drills")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")

ITEMS, USERS, EVENTS, TOPICS = 240, 150, 10, 6
WORDS = ["soap", "lotion", "shampoo", "brush", "nail polish", "perfume"]


def address(item: int) -> str:
    return f"https://pictures.example/I/{item:03}._SL300_.jpg"


def product(year: int, item: int) -> dict:
    """A line of the metadata; every tenth product has no picture, every fiftieth nothing but an id."""
    key = "parent_asin" if year == 2023 else "asin"
    if item % 50 == 49:
        return {key: f"B{item:03}"}
    word = WORDS[item % TOPICS]
    lists = ["Beauty", word.title()]
    row = {key: f"B{item:03}", "title": f"Acme {word}, kid's {item}"}
    row |= {2014: {"brand": "Acme", "categories": [lists]}, 2018: {"brand": "Acme", "category": lists}}.get(
        year, {"store": "Acme", "categories": lists}
    )
    row["description"] = f"A soft {word}." if year == 2014 else [f"A soft {word}."]
    if item % 10:
        large = {"large": address(item), "thumb": address(item), "hi_res": None}
        row |= {2014: {"imUrl": address(item)}, 2018: {"imageURLHighRes": [address(item)]}}.get(
            year, {"images": [large]}
        )
    return row


def review(year: int, user: int, item: int, time: int) -> dict:
    if year == 2023:
        return {"user_id": f"A{user}", "parent_asin": f"B{item:03}", "rating": 5.0, "timestamp": 1000 * time}
    return {"reviewerID": f"A{user}", "asin": f"B{item:03}", "overall": 5.0, "unixReviewTime": time}


def write(folder, year: int) -> dict[str, str]:
    """Write the release's files and pictures; return the paths."""
    rng = np.random.default_rng(year)
    topic = rng.integers(0, TOPICS, (USERS, 1))
    chosen = (topic + TOPICS * rng.integers(0, ITEMS // TOPICS, (USERS, EVENTS))) % ITEMS
    reviews = [
        review(year, user, int(item), 1_400_000_000 + 1000 * k + user)
        for user, items in enumerate(chosen)
        for k, item in enumerate(items)
    ]
    lines = {"reviews": reviews, "metadata": [product(year, item) for item in range(ITEMS)]}
    (folder / "pictures").mkdir()
    paths = {"pictures": str(folder / "pictures")}
    for name, rows in lines.items():
        literal = year == 2014 and name == "metadata"  # that file has Python literals
        text = "\n".join(str(row) if literal else json.dumps(row) for row in rows)
        paths[name] = str(folder / f"{name}.json.gz")
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
    for item in range(ITEMS):
        colour = np.full((40, 40, 3), 40 * (item % TOPICS), np.uint8) + rng.integers(0, 30, (40, 40, 3), np.uint8)
        file = BytesIO()
        Image.fromarray(colour).save(file, "JPEG")
        data = file.getvalue()[: 200 if item % 60 == 1 else None]  # some are cut off
        (folder / "pictures" / address(item).rpartition("/")[2]).write_bytes(data)
    return paths


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_raw_lines_and_pictures_become_codes_that_one_can_look_at(year, tmp_path, spark):
    encoders = {
        "text": {"fields": ["title", "brand", "categories", "description"], "width": 16},
        "visual": {"model": str(models.siglip(tmp_path / "siglip")), "field": "image"},
    }
    give_store(tmp_path / "runs" / "raw")
    source = {"kind": "amazon", "amazon": write(tmp_path, year)}
    cfg = build(
        {
            **SMALL,
            "name": "raw",
            "runs_dir": str(tmp_path / "runs"),
            "source": source,
            "content": {"encoders": encoders},
            "ray": {**SMALL["ray"], "workers": 0},
        }
    )
    chain.run(cfg)
    lake = lake_of(tmp_path, "raw")
    assert sids(lake)["item_id"].to_pylist() == [f"B{item:03}" for item in range(ITEMS)]
    reasons = [row["reason"] for row in lake.read("rejected_rows").to_pylist()]
    assert reasons == ["content_truncated"] * sum(item % 60 == 1 for item in range(ITEMS))
    (stats,) = lake.read("catalog_stats").to_pylist()
    bare, bad = sum(item % 50 == 49 for item in range(ITEMS)), len(reasons)
    assert dict(stats["missing"]) == {"text": bare, "visual": bare + ITEMS // 10 + bad}
    quality = {row["modality"]: row for row in lake.read("content_quality").to_pylist()}
    assert quality["text"]["agreement"] > 3 * quality["text"]["chance"]
    page = (cfg.run_dir / "report" / "explore" / "index.html").read_text(encoding="utf-8")
    (payload,) = re.findall(r'<script[^>]*id="payload"[^>]*>(.*?)</script>', page, re.DOTALL)
    shown = json.loads(payload)
    assert f"Acme nail polish, kid's {TOPICS - 2}" in shown["titles"]
    assert len(shown["pictures"]) == ITEMS - dict(stats["missing"])["visual"]
