import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from adasid import config
from adasid.metrics.codes import code_use, group_metrics
from adasid.metrics.longtail import spearman
from adasid.metrics.retrieval import (
    averages,
    gains,
    intervals,
    rank_histogram,
    recall_ndcg,
    shared_gains,
    target_ranks,
    tie_order,
)
from adasid.metrics.tally import Tally
from adasid.sid import Slot
from pipelines.publish.gates import check_gates, failures


def test_ranks_and_metrics_match_a_library():
    torch.manual_seed(0)
    scores, targets = torch.randn(40, 60), torch.randint(60, (40,))
    ranks = target_ranks(scores, targets)
    order = scores.argsort(1, descending=True)
    assert all(int(order[i, r - 1]) == int(targets[i]) for i, r in enumerate(ranks))
    found = recall_ndcg(ranks, [10])
    truth = torch.nn.functional.one_hot(targets, 60).numpy()
    assert found["ndcg@10"] == pytest.approx(ndcg_score(truth, scores.numpy(), k=10), abs=1e-9)
    assert found["recall@10"] == pytest.approx(float((ranks <= 10).float().mean()))


def test_equal_scores_are_worth_what_chance_is():
    ranks = target_ranks(torch.ones(200, 200), torch.arange(200))  # every item is a target once
    assert sorted(ranks.tolist()) == list(range(1, 201))
    assert [recall_ndcg(ranks)[f"recall@{k}"] for k in (5, 10, 20, 50, 100)] == [k / 200 for k in (5, 10, 20, 50, 100)]
    head = ranks[:20].double().mean()  # the index follows popularity, the order of equals does not
    assert abs(float(head) - 100.5) < 3 * 57.7 / 20**0.5


def test_items_of_a_sid_stand_together_by_index_and_sids_in_a_fixed_random_order():
    group = torch.tensor([2, 0, 1, 2, 0, 1, 2, 3])
    places = tie_order(group)
    assert torch.equal(places, tie_order(group)) and sorted(places.tolist()) == list(range(8))
    for sid in range(4):
        own = places[group == sid]
        assert (own.diff() == 1).all()
    ranks = target_ranks(torch.zeros(8, 8), torch.arange(8), places)
    assert torch.equal(ranks, places + 1)
    assert tie_order(torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_single_target_slope_lies_in_the_possible_band():
    ranks = torch.arange(1, 2001)
    m = recall_ndcg(ranks, [50, 100])
    slope = (m["ndcg@100"] - m["ndcg@50"]) / (m["recall@100"] - m["recall@50"])
    assert 0.150 <= slope <= 0.175
    assert m["recall@50"] <= m["recall@100"]
    assert m["ndcg@50"] <= m["recall@50"]


def test_spearman_matches_scipy_with_ties():
    rng = np.random.default_rng(0)
    x = rng.integers(5, size=200).astype(float)
    y = x + rng.normal(size=200)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(spearman(np.ones(9), np.arange(9.0))) and np.isnan(spearman(np.ones(1), np.ones(1)))


def test_code_use_closed_forms():
    flat = code_use(np.full(100, 7))
    assert flat.entropy == pytest.approx(math.log(100))
    assert flat.perplexity == pytest.approx(100)
    assert flat.utilisation == 1.0
    counts = np.array([5, 0, 3, 2])
    use = code_use(counts)
    assert use.entropy == pytest.approx(scipy_entropy(counts))
    assert use.utilisation == 0.75
    assert use.top1 == 0.5
    assert use.perplexity <= 4 * use.utilisation + 1e-9
    assert code_use(np.zeros(4, int)) == (None, 0.0, None, None)


def test_group_metrics_count_both_collision_rates():
    m = group_metrics(np.array([1, 2, 4]), np.array([5, 2, 1]))  # 5 alone, 2 pairs, 1 group of four: 13 items, 8 SIDs
    assert m["items"] == 13
    assert m["collision_distinct"] == pytest.approx(5 / 13)
    assert m["collision_items"] == pytest.approx(8 / 13)
    assert m["largest_group"] == 4
    assert m["sid_entropy"] == pytest.approx(scipy_entropy([1] * 5 + [2] * 2 + [4]))


def test_histograms_give_the_metrics_of_ranks_and_add_up():
    rng = np.random.default_rng(0)
    ranks, kinds = torch.from_numpy(rng.integers(1, 300, 500)), torch.from_numpy(rng.integers(0, 3, 500))
    whole = rank_histogram(ranks, kinds, 3)
    parts = rank_histogram(ranks[:200], kinds[:200], 3) + rank_histogram(ranks[200:], kinds[200:], 3)
    assert torch.equal(whole, parts)
    assert averages(whole.numpy(), gains()) == pytest.approx(recall_ndcg(ranks))
    assert averages(whole[1].numpy(), gains()) == pytest.approx(recall_ndcg(ranks[kinds == 1]))


def test_metrics_of_nothing_are_absent():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert recall_ndcg(nothing) == {} == intervals(rank_histogram(nothing, nothing, 1)[0].numpy(), gains(), 10, 0)
    none = np.zeros(0, np.int64)
    assert {name for name, value in group_metrics(none, none).items() if value is None} == {
        *("collision_distinct", "collision_items", "sid_entropy"),
    }
    found = Tally.none([Slot("t0", "text", 4)]).metrics([Slot("t0", "text", 4)])
    assert found["collision_tail"] is None and found["entropy"] == [None] and found["utilisation"] == [0.0]
    gates = check_gates(found, config.Gates(min_utilisation=0.0), 0, 0, 0)
    assert [gate.gate for gate in gates if not gate.passed] == ["coverage", "collision rate"]
    assert "collision rate is –, allowed 0.5" in failures([gate for gate in gates if not gate.passed])


def test_bootstrap_intervals_are_those_of_the_normal_law():
    ranks = torch.from_numpy(np.random.default_rng(2).integers(1, 101, 4000))
    counts = rank_histogram(ranks, torch.zeros_like(ranks), 1)[0].numpy()
    one = rank_histogram(ranks[:1], torch.zeros_like(ranks[:1]), 1)[0].numpy()
    assert intervals(one, gains(), 4000, 0) == {}, "one user says nothing of the spread"
    low, high = intervals(counts, gains(), 4000, 0)["recall@20"]
    p = averages(counts, gains())["recall@20"]
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(p * (1 - p) / 4000), rel=0.06)


def test_items_that_share_a_sid_get_the_credit_of_a_random_order():
    rng = np.random.default_rng(1)
    sizes, size, first = np.array([1, 3, 150]), rng.integers(0, 3, 60), rng.integers(1, 130, 60)
    counts = rank_histogram(torch.from_numpy(first), torch.from_numpy(size), 3).numpy()
    found = averages(counts, shared_gains(sizes))
    orders = [
        np.mean([recall_ndcg(torch.tensor([f + place]))["ndcg@20"] for place in range(sizes[s])])
        for f, s in zip(first, size)
    ]
    assert found["corrected_ndcg@20"] == pytest.approx(np.mean(orders))
    credit = np.array([np.clip(20 - f + 1, 0, sizes[s]) / sizes[s] for f, s in zip(first, size)])
    assert found["corrected_recall@20"] == pytest.approx(credit.mean())
    low, high = intervals(counts, shared_gains(sizes), 4000, 0)["corrected_recall@20"]
    assert (high - low) / 2 == pytest.approx(1.96 * credit.std() / np.sqrt(60), rel=0.06)


def test_a_score_that_is_no_number_is_no_hit():
    scores = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 2.0, 1.0]])
    ranks = target_ranks(scores, torch.tensor([1, 1]))
    assert ranks.tolist() == [104, 1] and recall_ndcg(ranks)["recall@100"] == 0.5
