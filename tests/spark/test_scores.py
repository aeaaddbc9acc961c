"""Test Spark's AUC and GAUC against those of one machine and scikit-learn's: ties, users of one class, users with more
weight than others."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from adasid.metrics.ranking import ranking_metrics
from pipelines import scores

SCHEMA = "user bigint, stratum string, label int, score double"


def samples(clicked, n=4000, users=300, seed=3):
    """Users with a few to dozens of samples, of which a third of the users click three times as many as the share
    ``clicked`` of the others; scores in 40 steps, so that most are tied, also across users and labels."""
    rng = np.random.default_rng(seed)
    user = (users * rng.random(n) ** 1.5).astype(np.int64)
    label = (rng.random(n) < clicked * (1 + 2 * (user % 3 == 0))).astype(np.int64)
    score = np.round(label * 0.4 + 0.3 * (user % 5) + rng.normal(0, 1, n), 1) / 3
    stratum = np.array(["head", "mid", "tail", "cold"])[np.minimum(rng.zipf(1.5, n) - 1, 3)]
    label[stratum == "cold"] = 1
    return user, stratum, label, score


@pytest.fixture
def ranges(spark):
    """As with many scores, which are cut into ranges; a few would be merged into one."""
    settings = {"spark.sql.adaptive.coalescePartitions.enabled": "false", "spark.sql.shuffle.partitions": "6"}
    before = {key: spark.conf.get(key) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    yield
    for key, value in before.items():
        spark.conf.set(key, value)


@pytest.mark.parametrize("clicked", [0.2, 0.05])
def test_figures_are_those_of_one_machine_and_of_scikit_learn(spark, ranges, clicked):
    user, stratum, label, score = samples(clicked)
    frame = spark.createDataFrame(list(zip(*(column.tolist() for column in (user, stratum, label, score)))), SCHEMA)
    found = scores.ranking_metrics(frame.repartition(3))
    assert found == scores.ranking_metrics(frame.orderBy("score").repartition(5)), (
        "neither partitions nor order change a bit"
    )
    assert set(found) == {"all", "head", "mid", "tail", "cold"}
    for part, figures in found.items():
        own = np.full(len(user), True) if part == "all" else stratum == part
        expected = ranking_metrics(user[own], score[own], label[own], 2000)
        assert figures.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("_interval"):
                wide = value[1] - value[0]
                np.testing.assert_allclose(figures[name], value, atol=0.12 * wide, err_msg=f"{part} {name}")
            else:
                assert figures[name] == pytest.approx(value, rel=1e-12), (part, name)
        if part == "cold":
            assert set(figures) == {"gauc_users", "samples"}
            continue
        both = {
            u: own & (user == u)
            for u in np.unique(user[own])
            if 0 < label[own & (user == u)].sum() < (own & (user == u)).sum()
        }
        assert figures["auc"] == pytest.approx(roc_auc_score(label[own], score[own]))
        assert figures["gauc_users"] == len(both) < len(np.unique(user[own]))
        aucs = [roc_auc_score(label[rows], score[rows]) for rows in both.values()]
        assert figures["gauc"] == pytest.approx(np.average(aucs, weights=[rows.sum() for rows in both.values()]))


def test_users_of_one_class_have_an_auc_together_and_no_gauc(spark):
    frame = spark.createDataFrame([(0, "head", 1, 0.5), (1, "head", 0, 0.5), (2, "head", 0, 0.1)], SCHEMA)
    found = scores.ranking_metrics(frame)
    assert found["all"] == found["head"]
    assert (found["all"]["auc"], found["all"]["gauc_users"]) == (0.75, 0.0)
    assert "gauc" not in found["all"]
    assert scores.ranking_metrics(frame.filter("label = 1"))["all"] == {"gauc_users": 0.0, "samples": 1.0}
