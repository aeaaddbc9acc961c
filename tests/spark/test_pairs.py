"""Test co-engaged pairs against brute force, and when the stage writes them."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import numpy as np
import pyarrow.parquet as pq
import pytest

from adasid import tables
from adasid.config import Pairs, QuaSidSettings
from adasid.errors import InputError
from pipelines import stage
from pipelines.engines import tracking
from pipelines.features import pairs
from tests.spark.test_features_run import catalogue, config, prepare, run

SCHEMA = "user_index bigint, item_index bigint, position bigint"


def history(users=40, items=14, seed=2):
    """user, item, position of events, popular items first; some users repeat an item, some have one only."""
    rng = np.random.default_rng(seed)
    return [
        (user, min(int(rng.zipf(1.5)) - 1, items - 1), at)
        for user in range(users)
        for at in range(int(rng.integers(1, 9)))
    ]


def brute(events, settings, chance):
    """(item, partner) -> (score, users); ``chance``: user -> hash."""
    last = defaultdict(dict)
    for user, item, at in events:
        last[user][item] = max(at, last[user].get(item, -1))
    has = {user: set(sorted(items, key=items.get)[-settings.max_user_items :]) for user, items in last.items()}
    has = {user: items for user, items in has.items() if len(items) > 1}
    who = {
        item: sorted((u for u in has if item in has[u]), key=lambda u: (chance[u], u))
        for item in set().union(*has.values())
    }
    if settings.method == "swing":
        who = {item: users[: settings.max_item_users] for item, users in who.items()}
        has = {user: {item for item in items if user in who[item]} for user, items in has.items()}
    found = {}
    for i, j in combinations(sorted(who), 2):
        users = sorted(set(who[i]) & set(who[j]))
        score = (
            sum(1 / (settings.alpha + len(has[u] & has[v])) for u, v in combinations(users, 2))
            if settings.method == "swing"
            else len(users)
        )
        if score and len(users) >= settings.min_users:
            found[i, j] = found[j, i] = (score, len(users))
    best = {}
    for item in who:
        partners = sorted((j for i, j in found if i == item), key=lambda j: (-round(found[item, j][0], 9), j))
        best |= {(item, j): found[item, j] for j in partners[: settings.per_item]}
    return best


def hashes(spark, events):
    frame = spark.createDataFrame([(user,) for user in sorted({user for user, *_ in events})], "user_index bigint")
    return {row["user_index"]: row["h"] for row in frame.selectExpr("*", "xxhash64(user_index) AS h").collect()}


def mined(frame, settings):
    return {
        (row["item_index"], row["partner_index"]): (row["score"], row["users"])
        for row in pairs.mine(frame, settings, lambda text: None).collect()
    }


@pytest.mark.parametrize(
    "settings",
    [
        Pairs(method="cooccurrence", min_users=1),
        Pairs(method="cooccurrence", per_item=2, max_user_items=3, max_item_users=2),
        Pairs(method="swing"),
        Pairs(method="swing", alpha=0.3, per_item=3, max_user_items=4, min_users=3),
        Pairs(method="swing", max_item_users=10),
    ],
    ids=lambda s: f"{s.method}-{s.per_item}-{s.max_item_users}",
)
def test_pairs_against_brute_force(spark, settings):
    events = history()
    frame, expected = spark.createDataFrame(events, SCHEMA), brute(events, settings, hashes(spark, events))
    found = mined(frame, settings)
    assert len(expected) > 10
    assert found == {pair: (pytest.approx(score, abs=1e-12), users) for pair, (score, users) in expected.items()}
    assert found == mined(spark.createDataFrame(events[::-1], SCHEMA).repartition(5, "position"), settings)


def test_swing_by_hand(spark):
    """u and v share three items, w shares two of them with each: 1 / (1 + 3) and twice 1 / (1 + 2)."""
    events = [
        (user, item, at)
        for user, items in ((0, (1, 2, 3)), (1, (1, 2, 3)), (2, (1, 2, 9)))
        for at, item in enumerate(items)
    ]
    found = mined(spark.createDataFrame(events, SCHEMA), Pairs(method="swing"))
    assert found[1, 2] == found[2, 1] == (pytest.approx(1 / 4 + 2 / 3), 3)
    assert found[1, 3] == found[2, 3] == (pytest.approx(1 / 4), 2)
    assert {item for pair in found for item in pair} == {1, 2, 3}


@pytest.mark.parametrize("method", ["swing", "cooccurrence"])
def test_of_equal_partners_the_lowest_index_is_kept(spark, method):
    events = [(user, item, item) for user in (0, 1) for item in range(5)]
    found = mined(spark.createDataFrame(events, SCHEMA), Pairs(method=method, per_item=2))
    assert sorted(found) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]


def test_only_the_latest_items_of_a_history_make_pairs(spark):
    events = [(user, item, at) for user in (0, 1) for at, item in enumerate([5, 1, 2, 3, 5])]
    found = mined(spark.createDataFrame(events, SCHEMA), Pairs(method="cooccurrence", max_user_items=2))
    assert set(found) == {(3, 5), (5, 3)}


def test_swing_says_what_it_will_shuffle_and_stops_before_too_much(spark):
    frame = spark.createDataFrame([(user, item, item) for user in range(5) for item in range(2)], SCHEMA)
    notes = []
    pairs.mine(frame, Pairs(max_item_users=4), notes.append)
    assert notes == [
        "swing forms 12 pairs of users of one item, up to 4.47e-07 GiB to shuffle",
        "swing forms 6 pairs of items of two users, up to 2.24e-07 GiB to shuffle",
    ]
    with pytest.raises(InputError, match=r"more than features.pairs.max_rows 11: lower features.pairs.max_item_users"):
        pairs.mine(frame, Pairs(max_item_users=4, max_rows=11), notes.append)
    long = spark.createDataFrame([(user, item, item) for user in range(2) for item in range(9)], SCHEMA)
    with pytest.raises(InputError, match=r"form 36 pairs of items of two users, .* 35: lower features.pairs.max_user"):
        pairs.mine(long, Pairs(max_rows=35), notes.append)


def table(lake):
    return {
        (row["item_index"], row["partner_index"]): (row["score"], row["users"])
        for row in lake.read("item_pairs").to_pylist()
    }


def with_pairs(cfg, **settings):
    features = cfg.features.model_copy(update={"pairs": Pairs(**settings)})
    return cfg.model_copy(update={"features": features, "tokenizer": QuaSidSettings()})


def test_the_stage_writes_pairs_of_training_events_when_asked_and_again_when_something_changed(spark, tmp_path):
    cfg = config(tmp_path)
    lake = prepare(spark, cfg, *catalogue())
    first = run(cfg, "events")
    assert not lake.exists("item_pairs") and "pairs" not in first.facts
    counting = with_pairs(cfg, method="cooccurrence")
    second, third = run(counting, "events"), run(counting, "events")
    assert [first.status, second.status, third.status] == ["done", "done", "up to date"]
    assert lake.versions("ranking_samples", "item_stats", "catalog_stats", "item_pairs") == {
        "ranking_samples": 0,
        "item_stats": 0,
        "catalog_stats": 0,
        "item_pairs": 0,
    }
    samples = lake.read("ranking_samples").to_pylist()
    training, everything = (
        brute(
            [(row["user_index"], row["item_index"], row["position"]) for row in samples if row["split"] in splits],
            counting.features.pairs,
            chance,
        )
        for splits in (["train"], ["train", "validation", "test"])
        for chance in [defaultdict(int)]
    )
    assert table(lake) == training != everything
    files = [pq.read_table(file).to_pylist() for file in lake.open("item_pairs").file_uris()]
    ranges = sorted([(row["item_index"], -row["score"], row["partner_index"]) for row in file] for file in files)
    places = [place for part in ranges for place in part]
    assert len(places) == len(training) and places == sorted(places), "a file has a range of items, in order"
    assert second.facts["pairs"] == len(training)
    assert second.facts["items with pairs"] == round(
        len({item for item, _ in training}) / lake.read("item_stats").num_rows, 3
    )
    assert second.client.get_run(second.run_id).data.metrics["item_pairs"] == len(training)
    before = table(lake)
    run(with_pairs(counting, method="cooccurrence", per_item=1), "events")
    assert lake.versions("ranking_samples", "item_pairs") == {"ranking_samples": 0, "item_pairs": 1}
    assert set(table(lake)) < set(before)
    assert run(cfg, "events").status == "up to date"
    lake.write("ranking_samples", tables.RANKING_SAMPLES, lake.read("ranking_samples").to_batches(), "other events")
    with pytest.raises(InputError, match="item_pairs does not exist, or was computed from other events"):
        pairs.check(counting, lake)
    with tracking.stage(cfg, "pairs") as context:
        assert stage.run(pairs.ITEM_PAIRS, counting, context)
    pairs.check(counting, lake)
    assert (lake.version("item_pairs"), table(lake)) == (2, before)
