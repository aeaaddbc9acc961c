"""Test the synthetic catalogue: it is the same whatever the chunks, and has the structure that its settings promise."""

from __future__ import annotations

import resource
import time

import numpy as np
import pyarrow as pa
import pytest

from adasid import tables
from adasid.config import Features, Synthetic
from adasid.datasets import synthetic

PARAMS = Synthetic(items=3_000, users=5_000, interactions=100_000, topics=20, behavior_width=16)
SEED = 7
MODALITIES = ("text", "visual", "behavior")


def table(batches) -> pa.Table:
    return pa.Table.from_batches(list(batches))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Rows of vectors that are present, (n, width)."""
    return np.array(column.drop_null().to_pylist(), np.float32)


@pytest.fixture(scope="module")
def items() -> pa.Table:
    return table(synthetic.items(PARAMS, SEED, MODALITIES, 0, PARAMS.items))


@pytest.fixture(scope="module")
def truth() -> pa.Table:
    return table(synthetic.truth(PARAMS, SEED, 0, PARAMS.items))


@pytest.fixture(scope="module")
def events() -> pa.Table:
    return table(synthetic.interactions(PARAMS, SEED, 0, PARAMS.users))


@pytest.fixture(scope="module")
def counts(events) -> np.ndarray:
    item = np.array([int(name[1:]) for name in events["item_id"].to_pylist()])
    return np.bincount(item, minlength=PARAMS.items)


def test_schemas_ids_and_titles(items, truth, events):
    assert (
        items.schema == tables.items(MODALITIES)
        and truth.schema == tables.TRUTH
        and events.schema == tables.INTERACTIONS
    )
    assert items["item_id"][123].as_py() == "i0000123" and events["user_id"][0].as_py() == "u0000000"
    assert items["title"][123].as_py() == f"topic {truth['topic'][123].as_py()} item 123"
    assert items["item_id"].to_pylist() == truth["item_id"].to_pylist() == sorted(set(items["item_id"].to_pylist()))


@pytest.mark.parametrize("chunk", [1, 700, 1024, 2_500])
def test_any_chunking_gives_the_same_rows(items, truth, events, chunk):
    starts = range(2_000, 2_010, chunk) if chunk == 1 else range(0, PARAMS.items, chunk)
    stop = 2_010 if chunk == 1 else PARAMS.items
    for whole, make in (
        (items, lambda a, b: synthetic.items(PARAMS, SEED, MODALITIES, a, b)),
        (truth, lambda a, b: synthetic.truth(PARAMS, SEED, a, b)),
    ):
        parts = [batch for start in starts for batch in make(start, min(start + chunk, stop))]
        assert table(parts).combine_chunks().equals(whole.slice(starts[0], stop - starts[0]).combine_chunks())
    users = [
        batch
        for start in reversed(range(0, PARAMS.users, 1_700))
        for batch in synthetic.interactions(PARAMS, SEED, start, min(start + 1_700, PARAMS.users))
    ]
    assert (
        table(users)
        .sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
        .combine_chunks()
        .equals(events.combine_chunks())
    )


def test_seed_decides_and_a_modality_does_not_depend_on_the_others(items):
    again = synthetic.Catalog(PARAMS, SEED)
    assert np.array_equal(again.rank, synthetic.catalog(PARAMS, SEED).rank) and not np.array_equal(
        again.rank, synthetic.Catalog(PARAMS, SEED + 1).rank
    )
    alone = table(synthetic.items(PARAMS, SEED, ("visual",), 0, PARAMS.items))
    assert alone["visual"].equals(items["visual"])
    assert not table(synthetic.items(PARAMS, SEED + 1, ("visual",), 0, PARAMS.items))["visual"].equals(items["visual"])


def test_popularity_is_zipf(truth):
    expected = np.sort(truth["expected_count"].to_numpy())[::-1]
    slope = np.polyfit(np.log(np.arange(1, len(expected) + 1)), np.log(expected), 1)[0]
    assert slope == pytest.approx(-PARAMS.popularity_exponent, abs=1e-9)
    assert expected.sum() == pytest.approx(PARAMS.interactions)


def test_realised_counts_match_the_expected_ones(truth, counts):
    expected = truth["expected_count"].to_numpy()
    assert counts.sum() == pytest.approx(PARAMS.interactions, rel=0.03)
    order = np.argsort(-expected)
    for part in np.split(order, [1, 10, 100, 500, 1_500]):
        assert counts[part].sum() == pytest.approx(expected[part].sum(), rel=0.1)
    # Single items meet the closed form too, averaged over catalogues.
    small = PARAMS.model_copy(update={"items": 50, "users": 1_000, "interactions": 20_000, "topics": 5})
    ratios = []
    for seed in range(20):
        drawn = table(synthetic.interactions(small, seed, 0, small.users))["item_id"]
        seen = np.bincount([int(name[1:]) for name in drawn.to_pylist()], minlength=50)
        ratios.append(seen / synthetic.catalog(small, seed).expected_count(0, 50))
    ratio = np.array(ratios)
    assert ratio.mean() == pytest.approx(1, abs=0.02) and np.abs(ratio.mean(1) - 1).max() < 0.15


def test_users_are_long_tailed_and_move_forward_in_time(events):
    user = np.array([int(name[1:]) for name in events["user_id"].to_pylist()])
    seconds = events["timestamp"].cast(pa.int64()).to_numpy()
    lengths = np.bincount(user, minlength=PARAMS.users)
    assert lengths.min() == synthetic.MIN_LENGTH and np.percentile(lengths, 99) > 4 * np.median(lengths)
    same = user[1:] == user[:-1]
    assert (np.diff(user) >= 0).all() and (np.diff(seconds)[same] > 0).all()
    assert seconds.min() >= synthetic.BASE_TIME and seconds.max() < time.time()
    assert events["pos"].null_count == events["rating"].null_count == len(events)


def test_the_next_topic_is_mostly_the_last_one(truth, events):
    topic = truth["topic"].to_numpy()[[int(name[1:]) for name in events["item_id"].to_pylist()]]
    user = np.array(events["user_id"].to_pylist())
    same = user[1:] == user[:-1]
    stays = (topic[1:] == topic[:-1])[same].mean()
    shuffled = (topic == np.random.default_rng(0).permutation(topic)).mean()
    assert 0.5 < stays < 0.9 and stays > 3 * shuffled


def test_content_names_the_topic_and_carries_the_set_noise(items, truth):
    topic = truth["topic"].to_numpy()
    plan = synthetic.catalog(PARAMS, SEED)
    for modality in ("text", "visual"):
        present = items[modality].is_valid().to_numpy()
        values, centres = matrix(items[modality]), plan.topic_vectors(modality)
        assert np.allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5)
        assert ((values @ centres.T).argmax(1) == topic[present]).mean() > 0.99
        noise = np.linalg.norm(values - centres[topic[present]], axis=1)
        assert np.sqrt((noise**2).mean()) == pytest.approx(PARAMS.content_noise, rel=0.02)
    assert items["text"].null_count == 0 and items["visual"].null_count / PARAMS.items == pytest.approx(
        PARAMS.missing_visual, abs=0.015
    )


def test_planted_behaviour_gets_longer_and_cleaner_with_the_count(items, truth):
    count, noise, topic = (truth[name].to_numpy() for name in ("expected_count", "behavior_noise", "topic"))
    values = matrix(items["behavior"])
    order = np.argsort(count, kind="stable")
    norm = np.linalg.norm(values, axis=1)
    spearman = np.corrcoef(np.argsort(np.argsort(norm)), np.argsort(order))[0, 1]
    assert spearman > Features().proxy_min_spearman
    deciles = np.array_split(order, 10)
    assert (np.diff([norm[part].mean() for part in deciles]) > 0).all()
    assert (np.diff(noise[order]) <= 0).all() and noise == pytest.approx(
        PARAMS.behavior_noise / np.sqrt(1 + count), rel=1e-5
    )
    planted = synthetic.catalog(PARAMS, SEED).topic_vectors("behavior")[topic]
    assert np.linalg.norm(values / np.log1p(count)[:, None] - planted, axis=1) == pytest.approx(noise, rel=1e-2)
    # Noise in a random direction is nearly orthogonal to the topic, so that cos = 1 / sqrt(1 + noise^2) on average.
    cosine = (values * planted).sum(1) / norm
    for part in deciles:
        assert cosine[part].mean() == pytest.approx((1 / np.sqrt(1 + noise[part] ** 2)).mean(), abs=0.03)


def test_nothing_planted_is_said_so():
    quiet = PARAMS.model_copy(update={"behavior_width": 0})
    assert not table(synthetic.truth(quiet, SEED, 0, 10))["behavior_noise"].to_numpy().any()


def test_more_topics_than_items_and_the_shortest_histories_work():
    odd = Synthetic(items=10, users=100, interactions=500, topics=50)
    assert len(table(synthetic.interactions(odd, SEED, 0, 100))) == 500
    assert len(table(synthetic.items(odd, SEED, ("text",), 0, 10))) == 10


def test_a_million_interactions_take_seconds_and_little_memory():
    params = Synthetic(items=100_000, users=50_000, interactions=1_000_000)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    rows = sum(len(batch) for batch in synthetic.interactions(params, SEED, 0, params.users))
    assert rows == pytest.approx(params.interactions, rel=0.02)
    assert time.monotonic() - start < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200, (
        "MiB beyond what the process held"
    )


def test_near_copies_are_of_one_topic_and_close():
    params = PARAMS.model_copy(update={"near_duplicates": 0.1})
    plan = synthetic.catalog(params, SEED)
    twins = np.flatnonzero(plan.twin)
    assert (twins % 2 == 1).all() and 0.08 < len(twins) / params.items < 0.12
    assert (plan.topic[twins] == plan.topic[twins - 1]).all()
    table = pa.Table.from_batches(synthetic.items(params, SEED, ("text",), 0, params.items))
    text = matrix(table["text"])
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    assert ((text[twins] * text[twins - 1]).sum(1) > 0.97).all()
    others = np.setdiff1d(np.arange(1, params.items, 2), twins)
    assert ((text[others] * text[others - 1]).sum(1) < 0.9).all()
    assert synthetic.catalog(PARAMS, SEED).twin.sum() == 0
