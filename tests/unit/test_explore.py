"""Test what the page of items and codes says: the sample, typical words, transitions, the map, and that the
payload survives the page."""

from __future__ import annotations

import base64
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from scipy.sparse import csr_matrix

from adasid.report import explore
from adasid.report.explore import Items, Next, Words
from adasid.sid import Slot
from adasid.tables import PAD, STRATA

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script> \u2028 & Décor"
SLOTS = [Slot("s0", "shared", 8), Slot("t0", "text", 8), Slot("b0", "behavior", 8)]


def unpacked(part):
    return np.frombuffer(base64.b64decode(part["data"]), part["type"].removesuffix("Array").lower())


def made(items=60, **facts):
    """A payload of planted items: the code of slot s0 is the item's topic, which its title, its text and the next
    event's topic name."""
    random = np.random.default_rng(3)
    topics = np.arange(items) % 4
    codes = np.stack([topics, random.integers(0, 8, items), topics + 4], 1).astype(np.int32)
    codes[5, 1] = PAD
    active = np.ones(codes.shape, bool)
    active[:, 2] = np.arange(items) % 3 > 0
    centres = random.standard_normal((4, 6)).astype(np.float32)
    text = centres[topics] + 0.1 * random.standard_normal((items, 6)).astype(np.float32)
    text[5] = 0
    words = ("café table", "red shoes", "blue lamp", "green tea")
    titles = [HOSTILE if item == 2 else f"{words[topic]} {item}" for item, topic in enumerate(topics)]
    strata = np.repeat(np.arange(4, dtype=np.int8), items // 4)
    shown = Items(
        [f"i{item}" if item else "a=&#<b>" for item in range(items)],
        titles,
        np.arange(items, 0, -1),
        strata,
        codes,
        np.where(active, np.float32([1, 1, 0.25]), 0).astype(np.float32),
        active,
        {"text": text, "behavior": np.ones((items, 2), np.float32)},
    )
    first = np.arange(items - 1)
    counts = [explore.sizes(codes[:, place], strata, slot) for place, slot in enumerate(SLOTS)]
    following = [explore.transitions(codes[first, place], codes[first + 1, place], 8) for place in range(3)]
    changes = {
        "reasons": {"warm": 700, "new": 1},
        "rows": [
            {
                "id": "i3",
                "title": titles[3],
                "why": "warm",
                "old": [3, int(codes[3, 1] + 1) % 8, 7],
                "new": codes[3].tolist(),
            },
            {"id": "gone", "title": HOSTILE, "why": "removed", "old": [0, -1, 2], "new": None},
            {"id": "i4", "title": None, "why": "new", "old": None, "new": codes[4].tolist()},
        ],
    }
    facts = {"run": HOSTILE, "generation": 2, "tokenizer": "adc-sid", "digest": "0123", "created": "now"} | facts
    facts["catalogue"] = np.bincount(strata, minlength=4).tolist()
    picture = explore.thumbnail(Image.new("RGB", (300, 200), "red"), 96)
    return explore.payload(shown, SLOTS, counts, following, text, changes, {"i3": picture}, facts)


def test_each_stratum_has_an_equal_share_of_the_sample_or_all_its_items():
    strata = np.repeat(np.arange(4, dtype=np.int8), [1000, 4000, 50, 7])
    chosen = explore.choose(strata, 400)
    assert np.bincount(strata[chosen]).tolist() == [171, 172, 50, 7]
    assert (np.diff(chosen) > 0).all()
    assert (chosen == explore.choose(strata, 400)).all()
    assert chosen[0] == 0 and np.diff(chosen[:171]).max() <= 6  # evenly spaced
    assert explore.choose(strata, 10**6).tolist() == list(range(len(strata)))
    assert explore.choose(np.zeros(9, np.int8), 4).tolist() == [0, 3, 5, 8]
    popular = explore.choose(strata, 8, popular=True)
    assert popular.tolist() == [0, 1, 1000, 1001, 5000, 5001, 5050, 5051]


def test_items_are_counted_by_code_and_stratum():
    codes, strata = np.array([0, 2, 2, PAD, 2]), np.array([0, 0, 3, 1, 3], np.int8)
    assert explore.sizes(codes, strata, Slot("s0", "shared", 3)).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 2]]


def test_log_odds_equal_those_computed_by_hand():
    counts = csr_matrix(np.array([[3, 1, 0], [1, 3, 2]]))
    prior = [2 * share for share in (4 / 10, 4 / 10, 2 / 10)]  # 2 words, spread as all 10 are
    here = math.log((3 + prior[0]) / (4 + 2 - 3 - prior[0]))
    there = math.log((1 + prior[0]) / (6 + 2 - 1 - prior[0]))
    z = (here - there) / math.sqrt(1 / (3 + prior[0]) + 1 / (1 + prior[0]))
    found = explore.log_odds(counts, 2)
    assert found[0, 0] == pytest.approx(z) == pytest.approx(1.9709, abs=1e-4)
    assert found[0, 2] == 0 and found.nnz == 5
    assert found[1, 1] > 0 > found[0, 1]


def test_typical_words_are_those_of_the_planted_topic():
    titles = ["Red Shoes", "red SHOES", "red boots", "blue lamp", "blue shade", "red lamp", None, "tea"] * 30
    codes = np.array([1, 1, 1, 0, 0, 0, 1, PAD] * 30)
    words = Words(titles).typical(codes, 3)
    assert {code: [word for word, _ in found] for code, found in words.items()} == {
        0: ["blue", "lamp", "shade"],
        1: ["shoes", "red", "boots"],  # red is in a title of code 0 too
    }
    assert all(z >= explore.CERTAIN for found in words.values() for _, z in found)
    assert Words([None, ""]).typical(np.array([0, 1]), 2) == {}


def test_words_of_any_script_are_whole():
    titles = ["Don't 'quote' L’Oréal", "हिन्दी किताब", "石鹸です", "می\u200cخواهم"]
    assert Words(titles).names == ["don't", "quote", "l’oréal", "हिन्दी", "किताब", *"石鹸です", "میخواهم"]


def test_transitions_count_what_follows_and_compare_with_popularity():
    first, then = np.array([0, 0, 0, 1, 1, PAD, 0]), np.array([1, 1, 0, 1, 0, 1, PAD])
    found = explore.transitions(first, then, 3)
    assert found == {
        0: [Next(1, 2, round(2 * 5 / (3 * 3), 2)), Next(0, 1, round(1 * 5 / (3 * 2), 2))],
        1: [Next(0, 1, round(1 * 5 / (2 * 2), 2)), Next(1, 1, round(1 * 5 / (2 * 3), 2))],
    }
    many = explore.transitions(np.zeros(12, int), np.array([7, 7, 6, 6, 6, 5, 4, 3, 2, 1, 0, 0]), 8)
    assert [n.code for n in many[0]] == [6, 0, 7, 1, 2]
    assert explore.transitions(np.zeros(0, int), np.zeros(0, int), 8) == {}


def test_the_map_shows_the_directions_of_largest_spread():
    random = np.random.default_rng(1)
    flat = random.standard_normal((300, 2)) * [9, 3]
    turned, _ = np.linalg.qr(random.standard_normal((8, 8)))
    found = explore.project((np.pad(flat, ((0, 0), (0, 6))) @ turned + 5).astype(np.float32))
    assert found.dtype == np.int16 and np.abs(found).max() == 32_000
    for axis in (0, 1):
        assert abs(np.corrcoef(found[:, axis], flat[:, axis])[0, 1]) > 0.99
    assert (found == explore.project((np.pad(flat, ((0, 0), (0, 6))) @ turned + 5).astype(np.float32))).all()
    assert (explore.project(np.ones((4, 3), np.float32)) == 0).all()


def test_a_thumbnail_is_a_small_jpeg_with_the_shape_of_the_picture():
    image = Image.open(io.BytesIO(explore.thumbnail(Image.new("RGBA", (400, 200), "blue"), 96)))
    assert (image.format, image.size) == ("JPEG", (96, 48))
    assert image.getpixel((5, 5))[2] > 240


def test_the_payload_survives_the_page_and_hostile_titles_stay_text():
    data = made()
    html = explore.render(data)
    inside = re.search(r'<script type="application/json" id="payload">(.*?)</script>', html, re.S)[1]
    assert not re.search("[<>&\u2028\u2029]", inside)
    assert "<img src" not in html and "alert(2)</script>" not in html
    read = json.loads(inside)
    assert read == json.loads(json.dumps(data))
    assert read["titles"][2] == " ".join(HOSTILE.split())
    codes = unpacked(read["codes"]).reshape(-1, 3)
    assert codes[5].tolist() == [1, PAD, 5] and codes[6, 0] == 2
    assert unpacked(read["weights"]).reshape(-1, 3)[1].tolist() == [100, 100, 25]
    assert unpacked(read["interactions"])[:3].tolist() == [60, 59, 58]
    assert read["slots"][0]["words"]["3"][0][0] in ("green", "tea")
    assert read["slots"][0]["next"]["0"] == [[1, 15, 3.93]]
    assert set(read["near"]) == {"text", "behavior"}
    assert len(STRATA) == len(read["facts"]["catalogue"])


def test_nothing_is_loaded_from_elsewhere():
    html = explore.render(made())
    assert not re.findall(r"""(?:src|href)=["'](?!\.\./index\.html|#)[^"'$]""", html.split("<script")[0])
    assert "http" not in re.sub(r"http-equiv", "", html)


def test_twenty_thousand_items_take_less_than_twelve_megabytes():
    items, random = 20_000, np.random.default_rng(2)
    slots = [Slot(f"s{place}", "shared", 300) for place in range(7)]
    codes = random.integers(0, 300, (items, 7))
    counts = [explore.sizes(codes[:, place], np.zeros(items, np.int8), slot) for place, slot in enumerate(slots)]
    shown = Items(
        [f"item-{item:08}" for item in range(items)],
        ["".join(chr(97 + letter) for letter in row) for row in random.integers(0, 26, (items, 200))],
        np.arange(items),
        np.zeros(items, np.int8),
        codes,
        np.ones(codes.shape, np.float32),
        np.ones(codes.shape, bool),
        {"text": random.standard_normal((items, 2)).astype(np.float32)},
    )
    data = explore.payload(shown, slots, counts, [{}] * 7, facts={"catalogue": [items, 0, 0, 0]})
    one = len(json.dumps(data["near"]["text"]))
    assert len(explore.render(data)) + 2 * one < 12_000_000
