"""The evaluation's page: paired gains by hand, and what it says of them."""

import numpy as np
import pytest
from scipy import stats

from adasid import config
from adasid.errors import ConfigError
from adasid.report import evaluation


def cell(tokenizer, seed, recall, task="retrieval", model="item"):
    keys = ("recall@5", "recall@10", "recall@50", "recall@100", "ndcg@5", "ndcg@10", "ndcg@50", "ndcg@100", "corrected_recall@10", "auc", "gauc")
    figures = {**dict.fromkeys(keys, recall), "gauc_users": 10.0}
    return {
        "task": task,
        "tokenizer": tokenizer,
        "model": model,
        "seed": seed,
        "labels": "sampled",
        "validation": {"ndcg@10": recall, "auc": recall},
        "strata": {"all": figures, "head": figures, "tail": figures},
    }


MINE, THEIRS = (0.110, 0.121, 0.105), (0.100, 0.110, 0.100)


def rows():
    pairs = [("ours", MINE), ("theirs", THEIRS), ("worse", (0.05,))]
    return [cell(name, seed, value) for name, values in pairs for seed, value in enumerate(values)]


def test_the_gain_is_paired_by_seed():
    mine, theirs = ([cell("x", seed, value) for seed, value in enumerate(values)] for values in (MINE, THEIRS))
    gain, half, p, seeds = evaluation.paired(mine, theirs, "recall@50")
    gains = np.array(MINE) / np.array(THEIRS) - 1
    low, high = stats.t.interval(0.95, 2, gains.mean(), stats.sem(gains))
    assert (gain, seeds) == (pytest.approx(gains.mean()), 3)
    assert (gain - half, gain + half) == (pytest.approx(low), pytest.approx(high))
    assert p == pytest.approx(stats.ttest_1samp(gains, 0).pvalue)
    assert evaluation.paired(mine, theirs[:1], "recall@50")[2:] == (1.0, 1)
    assert evaluation.paired(mine[:1], theirs[1:], "recall@50") is None


def test_the_page_says_who_is_ahead_and_how_sure_that_is():
    settings = config.Evaluate(tokenizers=("ours", "theirs", "worse"), reference="ours")
    page = evaluation.build("test", rows(), settings)
    assert "ours is 8.3% ahead of the best other tokenizer, theirs, in R@50 (beyond chance)." in page.summary[1].replace("With the model item, ", "")
    table = next(section for section in page.sections if section.key == "retrieval_differences").tables[0]
    assert [row[:3] for row in table.rows] == [("theirs", "item", "3"), ("worse", "item", "1")]
    assert "theirs / item" in evaluation.text(rows())
    assert page.summary[0].startswith("3 combinations of items and model, 1 to 3 seeds each")


def test_the_page_states_labels_and_split_of_ranking():
    found = [{**cell("ours", 0, 0.6, "ranking", "ppnet"), **told} for told in ({}, {"labels": "ratings", "split": "global_time"})]
    (section,) = (s for s in evaluation.build("test", found, config.Evaluate(reference="ours")).sections if s.key == "ranking")
    assert section.lead.startswith("The test is all that happened after one moment. Labels are the users' ratings. Labels are sampled: ")
    assert evaluation.flat(found[1])["split"] == "global_time"


def test_sids_of_another_size_are_compared_apart():
    sizes = {"ours": "6×100", "theirs": "32×256", "worse": "6×100"}
    found = [{**row, "codes": sizes[row["tokenizer"]]} for row in rows()]
    settings = config.Evaluate(tokenizers=("ours", "theirs", "worse"), reference="ours")
    page = evaluation.build("test", found, settings)
    assert "the best other of the same size (6×100), worse, in R@50" in page.summary[1]
    assert "the best other of another size (32×256, not 6×100), theirs, in R@50" in page.summary[2]
    (table,) = next(section for section in page.sections if section.key == "retrieval").tables[:1]
    assert [row[1] for row in table.rows] == list(sizes.values()) and table.columns[1] == "Codes"
    assert evaluation.flat(found[0])["codes"] == "6×100"


def test_a_contradiction_with_the_paper_is_stated():
    found = [cell(name, 1, value) for name, value in (("adc-sid", 0.1), ("rq-vae", 0.2), ("opq", 0.05))]
    page = evaluation.build("test", found, config.Evaluate(tokenizers=("adc-sid", "rq-vae", "opq"), published="beauty"))
    (section,) = (section for section in page.sections if section.key == "published")
    assert "Here rq-vae is 100.0% ahead of it in R@50 (nothing is shown with one seed), which contradicts the paper." in section.lead
    assert "Here opq" not in section.lead
    assert any("rq-vae" in line and "nothing is shown with one seed" in line for line in page.summary)


def test_lists_without_the_history_stand_beside_published_ones_both_ways():
    group = [{**cell("opq", 1, 0.2), "test_repeatable": dict.fromkeys(("recall@5", "ndcg@5", "recall@10", "ndcg@10"), 0.125)}]
    apart = config.Retrieval(repeatable=False)
    page = evaluation.build("test", group, config.Evaluate(tokenizers=("opq",), reference="opq", published="beauty", retrievers={"item": apart}))
    sections = {section.key: section for section in page.sections}
    assert "ranked among all items but those of the history" in sections["retrieval"].lead
    rows = {row[0]: row for row in sections["published"].tables[-1].rows}
    assert rows["opq (ours, history in the list)"][1] == "0.1250" != rows["opq (ours)"][1]
    with pytest.raises(ConfigError, match=r"evaluate\.retrievers\.a\.repeatable is false but retrieval\.repeatable is not"):
        config.build({"name": "t", "evaluate": {"retrievers": {"a": {"repeatable": False}}}})


def test_both_tasks_stand_on_one_page():
    both = [*rows(), cell("ours", 0, 0.7, "ranking", "ppnet"), cell("theirs", 0, 0.6, "ranking", "ppnet")]
    page = evaluation.build("test", both, config.Evaluate(tokenizers=("ours", "theirs", "worse"), reference="ours"))
    assert [section.key for section in page.sections] == ["retrieval", "retrieval_differences", "ranking", "ranking_differences", "cost"]
    assert "ranking" in evaluation.text(both)
    assert evaluation.flat(both[-1])["all_auc"] == 0.6


def test_a_study_compares_with_its_first_and_stays_out_of_the_main_tables():
    settings = config.Evaluate(tokenizers=("ours", "theirs"), reference="ours", studies={"Without a part": ("ours", "worse")})
    page = evaluation.build("test", rows(), settings)
    sections = {section.key: section for section in page.sections}
    (table,) = sections["study1"].tables
    assert [row[0] for row in table.rows] == ["ours", "worse"] and table.rows[0][2] == "–"
    assert table.rows[1][2] == f"{0.05 / MINE[0] - 1:+.1%}"  # the one seed that both have
    assert all("worse" not in row for row in sections["retrieval"].tables[0].rows)
    with pytest.raises(ValueError, match=r"evaluate.studies.x: name at least two"):
        config.Evaluate(studies={"x": ("a", "a")})
