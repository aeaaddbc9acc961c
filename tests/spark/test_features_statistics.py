"""Test ranks, counts, inequality and richness against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import functions as F
from scipy.stats import spearmanr

from adasid.config import Features
from adasid.errors import InputError
from adasid.metrics.richness import fit_scale, vector_norms
from pipelines.features import ranks, richness, statistics
from pipelines.features.items import _length
from pipelines.features.layout import ITEM

COUNTS = [40, 17, 17, 9, 5, 3, 3, 1, 1, 1, 0, 0]


@pytest.fixture(scope="module")
def stats(spark):
    """item_stats of items i00..i11 whose counts are COUNTS, each item with two users where it has two events."""
    events = [(f"u{event % 2}", item, "train") for item, count in enumerate(COUNTS) for event in range(count)]
    events.append(("u0", 0, "test"))
    accepted = spark.createDataFrame(
        [(f"i{item:02d}", item) for item in reversed(range(len(COUNTS)))], f"item_id string, {ITEM} bigint"
    ).repartition(3)
    users = statistics.trained(
        spark.createDataFrame(events, f"user_index string, {ITEM} bigint, split string").withColumn(
            "user_id", F.col("user_index")
        ),
        ("user_index",),
    )
    assert {(row["user_id"], row["interactions"], row["items"]) for row in statistics.user_stats(users).collect()} == {
        ("u0", sum(-(-count // 2) for count in COUNTS), sum(count > 0 for count in COUNTS)),
        ("u1", sum(count // 2 for count in COUNTS), sum(count > 1 for count in COUNTS)),
    }
    return statistics.item_stats(accepted, users, Features())


def test_a_global_rank_is_dense_and_in_order_over_many_partitions(spark):
    values = np.random.default_rng(0).permutation(500) % 83
    frame = spark.createDataFrame([(int(value), i) for i, value in enumerate(values)], "value int, id int").repartition(
        7
    )
    ranked = ranks.rank_by(frame, F.desc("value"), F.asc("id"))
    found = [(row["value"], row["id"]) for row in sorted(ranked.frame.collect(), key=lambda row: row["rank"])]
    assert ranked.size == 500
    assert found == sorted(((int(value), i) for i, value in enumerate(values)), key=lambda pair: (-pair[0], pair[1]))
    assert sorted(row["rank"] for row in ranked.frame.collect()) == list(range(500))
    assert ranks.rank_by(frame.filter("value < 0"), F.asc("id")).size == 0


def test_counts_index_and_strata(stats):
    rows = {row["item_id"]: row for row in stats.frame.collect()}
    assert [rows[f"i{i:02d}"]["interactions"] for i in range(12)] == COUNTS
    assert [rows[f"i{i:02d}"]["item_index"] for i in range(12)] == list(range(12))  # ties by id
    assert [rows[f"i{i:02d}"]["users"] for i in range(12)] == [min(count, 2) for count in COUNTS]
    assert [rows[f"i{i:02d}"]["stratum"] for i in range(12)] == ["head"] * 3 + ["mid"] * 6 + ["tail"] + ["cold"] * 2


def test_inequality_against_numpy(stats):
    found = statistics.popularity(stats)
    ascending = np.sort(COUNTS)
    gini = np.abs(np.subtract.outer(ascending, ascending)).sum() / (2 * len(COUNTS) ** 2 * ascending.mean())
    assert found["gini"] == pytest.approx(gini, abs=1e-12)
    assert (found["items"], found["train_interactions"], found["head_interactions"]) == (
        12,
        sum(COUNTS),
        pytest.approx(74 / sum(COUNTS)),
    )
    assert dict(found["strata"]) == {"head": 3, "mid": 6, "tail": 1, "cold": 2}
    reached = np.concatenate([[0], np.cumsum(ascending)]) / ascending.sum()
    assert len(found["lorenz"]) == 101
    for point in found["lorenz"]:
        assert point["y"] == pytest.approx(reached[round(point["x"] * 12)])
    assert [(point["x"], point["y"]) for point in found["popularity"]] == [
        (rank + 1, count) for rank, count in enumerate(COUNTS)
    ]


def measured(spark, norms, counts):
    rows = [(f"i{i:03d}", int(count), float(norm)) for i, (norm, count) in enumerate(zip(norms, counts))]
    return spark.createDataFrame(rows, "item_id string, interactions bigint, norm float").repartition(3)


def ys(points):
    return [point["y"] for point in points]


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(1)
    counts = np.minimum(rng.zipf(1.7, 300), 4000)
    return (np.log1p(counts) + rng.exponential(1, 300)).astype(np.float32), counts


def test_norms_and_richness_against_numpy_and_scipy(spark, sample):
    norms, counts = sample
    frame = measured(spark, norms, counts)
    found = richness.measure(frame, Features())
    fields, low_high = found.fields, np.percentile(norms, [0.5, 99.5])
    expected = np.clip((norms - low_high[0]) / (low_high[1] - low_high[0]), 0, 1)
    assert fields["richness_source"] == "norm"
    assert fields["spearman"] == pytest.approx(spearmanr(norms, counts).statistic, abs=1e-12)
    assert [fields["norm_low"], fields["norm_high"]] == pytest.approx(low_high)
    assert ys(fields["norm_quantiles"]) == pytest.approx(np.percentile(norms, range(101)))
    assert ys(fields["richness_quantiles"]) == pytest.approx(np.percentile(expected, range(101)), abs=1e-6)
    rows = {
        row["item_id"]: row["richness"] for row in frame.select("item_id", found.column.alias("richness")).collect()
    }
    assert [rows[f"i{i:03d}"] for i in range(300)] == pytest.approx(expected, abs=1e-6)
    bins = fields["norm_by_count"]
    assert sum(point["items"] for point in bins) == 300
    assert len(bins) <= 31
    ones = norms[counts == 1]
    assert (bins[0]["x"], bins[0]["items"]) == (1, len(ones))
    assert [bins[0][name] for name in ("p10", "p50", "p90")] == pytest.approx(np.percentile(ones, [10, 50, 90]))
    assert sorted(point["x"] for point in bins) == [point["x"] for point in bins]


def test_where_the_norm_does_not_follow_the_count_richness_rests_on_the_count(spark, sample):
    norms, counts = -sample[0] + 100, sample[1]
    frame = measured(spark, norms, counts)
    found = richness.measure(frame, Features())
    logs = np.log1p(counts)
    expected = (logs - logs.min()) / (logs.max() - logs.min())
    assert found.fields["spearman"] == pytest.approx(spearmanr(norms, counts).statistic, abs=1e-12)
    assert found.fields["richness_source"] == "count"
    assert ys(found.fields["richness_quantiles"]) == pytest.approx(np.percentile(expected, range(101)))
    rows = {
        row["item_id"]: row["richness"] for row in frame.select("item_id", found.column.alias("richness")).collect()
    }
    assert [rows[f"i{i:03d}"] for i in range(300)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("norms", "counts", "floor", "source"),
    [
        ([2.0] * 3, [1, 2, 3], -1.0, "norm"),
        ([0.9998, 1.0, 1.0002], [1, 2, 3], -1.0, "norm"),
        ([1.0, 2.0, 3.0], [4] * 3, 0.2, "count"),
        ([1.0], [0], 0.2, "count"),
    ],
)
def test_without_spread_nothing_is_nan(spark, norms, counts, floor, source):
    frame = measured(spark, norms, counts)
    found = richness.measure(frame, Features(proxy_min_spearman=floor))
    assert (found.fields["richness_source"], found.fields["spearman"]) == (source, 0.0)
    assert {row["r"] for row in frame.select(found.column.alias("r")).collect()} == {0.5}
    assert set(ys(found.fields["richness_quantiles"])) == {0.5}
    scale = fit_scale(np.array(norms, np.float32), np.array(counts), features=Features(proxy_min_spearman=floor))
    assert (scale.source, scale.spearman, scale.mean) == (source, 0.0, 0.5)


def test_behaviour_that_cannot_be_measured_is_refused(spark):
    with pytest.raises(InputError, match="no item has a behaviour vector"):
        richness.measure(measured(spark, [], []), Features())
    with pytest.raises(InputError, match="norm of the behaviour vectors is nan"):
        richness.measure(measured(spark, [1.0, float("nan")], [1, 2]), Features())


@pytest.mark.parametrize("sign", [1, -1])
def test_richness_without_spark_is_the_same_bit_for_bit(spark, sign):
    rng = np.random.default_rng(3)
    counts = rng.geometric(0.02, 700) - 1
    vectors = (rng.normal(size=(700, 5)) * np.log1p(counts + 1)[:, None] ** sign).astype(np.float32)
    vectors[40:240] = vectors[40]
    items = [f"i{n}" for n in rng.permutation(700)]
    norms = vector_norms(vectors)
    rows = [
        (item, int(count), float(norm), row.tolist()) for item, count, norm, row in zip(items, counts, norms, vectors)
    ]
    frame = spark.createDataFrame(rows, "item_id string, interactions bigint, norm float, behavior array<float>")
    assert frame.filter(_length("behavior") != F.col("norm")).count() == 0
    found = richness.measure(frame.select("item_id", "interactions", "norm"), Features())
    scale = fit_scale(norms, counts)
    assert scale.source == found.fields["richness_source"] == ("norm" if sign == 1 else "count")
    assert scale.spearman == found.fields["spearman"]
    if scale.source == "norm":
        assert (scale.low, scale.high) == (found.fields["norm_low"], found.fields["norm_high"])
    column = found.column.cast("float").alias("richness")
    theirs = {row["item_id"]: row["richness"] for row in frame.select("item_id", column).collect()}
    ours = scale.richness(norms if sign == 1 else counts, np.ones(700, bool))
    assert [theirs[item] for item in items] == ours.tolist()
