"""Test the evaluation: its cells, and its page with hand-computed paired gains."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from adasid import config
from adasid.errors import ConfigError
from adasid.report import cells, comparison, evaluation, published, words
from pipelines import evaluate as pipeline

BEAUTY = Path(__file__).parents[2] / "conf" / "beauty.yaml"


def cell(tokenizer, seed, recall, task="retrieval", model="item"):
    keys = (
        "recall@5",
        "recall@10",
        "recall@50",
        "recall@100",
        "ndcg@5",
        "ndcg@10",
        "ndcg@50",
        "ndcg@100",
        "corrected_recall@10",
        "auc",
        "gauc",
    )
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
    gain, half, p, seeds = cells.paired(mine, theirs, "recall@50")
    gains = np.array(MINE) / np.array(THEIRS) - 1
    low, high = stats.t.interval(0.95, 2, gains.mean(), stats.sem(gains))
    assert (gain, seeds) == (pytest.approx(gains.mean()), 3)
    assert (gain - half, gain + half) == (pytest.approx(low), pytest.approx(high))
    assert p == pytest.approx(stats.ttest_1samp(gains, 0).pvalue)
    assert cells.paired(mine, theirs[:1], "recall@50")[2:] == (1.0, 1)
    assert cells.paired(mine[:1], theirs[1:], "recall@50") is None
    thirds, fifths = ([cell("x", seed, value) for seed in (0, 1)] for value in (0.3, 0.2))
    equal = cells.paired(thirds, fifths, "recall@50")
    assert equal == (pytest.approx(0.5), float("inf"), 1.0, 2) and words.gained(equal) == "+50.0%"


def test_the_page_says_who_is_ahead_and_how_sure_that_is():
    settings = config.Evaluate(tokenizers=("ours", "theirs", "worse"), reference="ours")
    page = evaluation.build("test", rows(), settings)
    assert "ours is 8.3% ahead of the best other tokenizer, theirs, in R@50 (beyond chance)." in page.summary[
        1
    ].replace("With the model item, ", "")
    table = next(section for section in page.sections if section.key == "retrieval_differences").tables[0]
    assert [row[:3] for row in table.rows] == [("theirs", "item", "3"), ("worse", "item", "1")]
    assert "theirs / item" in evaluation.text(rows())
    assert page.summary[0].startswith("3 combinations of items and model, 1 to 3 seeds each")


def test_the_page_states_labels_and_split_of_ranking():
    found = [
        {**cell("ours", 0, 0.6, "ranking", "ppnet"), **told}
        for told in ({}, {"labels": "ratings", "split": "global_time"})
    ]
    (section,) = (
        s for s in evaluation.build("test", found, config.Evaluate(reference="ours")).sections if s.key == "ranking"
    )
    assert section.lead.startswith(
        "The test is all that happened after one moment. Labels are the users' ratings. Labels are sampled: "
    )
    assert cells.flat(found[1])["split"] == "global_time"


def test_sids_of_another_size_are_compared_apart():
    sizes = {"ours": "6×100", "theirs": "32×256", "worse": "6×100"}
    found = [{**row, "codes": sizes[row["tokenizer"]]} for row in rows()]
    settings = config.Evaluate(tokenizers=("ours", "theirs", "worse"), reference="ours")
    page = evaluation.build("test", found, settings)
    assert "the best other of the same size (6×100), worse, in R@50" in page.summary[1]
    assert "the best other of another size (32×256, not 6×100), theirs, in R@50" in page.summary[2]
    (table,) = next(section for section in page.sections if section.key == "retrieval").tables[:1]
    assert [row[1] for row in table.rows] == list(sizes.values()) and table.columns[1] == "Codes"
    assert cells.flat(found[0])["codes"] == "6×100"


def beside(found, **settings):
    """The sections beside published results, by key."""
    page = evaluation.build("test", found, config.Evaluate(published="beauty", tokenizers=("adc-sid",), **settings))
    return {section.key: section for section in page.sections}


def seeds(tokenizer, value, steps=(0.0, 0.001, -0.001), **kind):
    return [cell(tokenizer, seed, value + step, **kind) for seed, step in enumerate(steps)]


def test_a_contradiction_with_the_paper_is_stated_where_it_is_beyond_chance():
    found = [
        *seeds("adc-sid", 0.1),
        *seeds("quasid", 0.2),
        *seeds("opq", 0.05),
        cell("das", 0, 0.15),
        *seeds("rq-vae", 0.101, (-0.01, 0.01, 0.0)),
    ]
    found = [{**row, "codes": "6×100"} for row in found] + [
        {**row, "codes": "32×256"} for row in seeds("opq, long", 0.3)
    ]
    lead = beside(found, studies={"Others": ("adc-sid", "quasid", "opq", "das", "rq-vae", "opq, long")})[
        "published"
    ].lead
    mine, _, others = lead.partition("claims that adc-sid is ahead of all others, here those of its size, 6×100;")[
        2
    ].partition("Table 2 of")
    assert "agrees in opq (R@50 -50.0% ±" in mine
    assert "; contradicts it in quasid (R@50 +100.0% ±" in mine and "N@50 +100.0%" in mine
    assert (
        "one seed: not told from chance in 2 comparisons, of which against the paper: das (R@50 +50.0%, N@50 +50.0%)"
        in mine
    )
    assert "within chance in 2 comparisons, of which against the paper: rq-vae (R@50" in mine
    assert "opq, long" not in mine
    assert (
        "here those of another size, which the paper lacks, or of none;" in others
        and "contradicts it in opq, long (R@50 +200.0%" in others
    )
    page = evaluation.build("test", found, config.Evaluate(tokenizers=("adc-sid", "das"), published="beauty"))
    assert any("das" in line and "(one seed: not told from chance)" in line for line in page.summary)


def test_the_claim_holds_for_ranking_too():
    found = [
        *seeds("adc-sid", 0.6, task="ranking", model="ppnet"),
        *seeds("quasid", 0.7, task="ranking", model="ppnet"),
    ]
    lead = beside(found, studies={"Others": ("adc-sid", "quasid")})["published"].lead
    assert "contradicts it in quasid (AUC +16.7% ±" in lead and "GAUC +16.7% ±" in lead


def test_table_2_has_item_ids_and_both_gains_under_the_model_that_both_have():
    found = [
        cell("adc-sid", 1, 0.2),
        cell("adc-sid", 1, 0.4, model="wide"),
        cell("opq", 1, 0.1),
        cell("adc-sid", 1, 0.66, "ranking", "ppnet"),
    ]
    found += [cell("item id", 1, 0.6, "ranking", "item ids")]
    retrieval, gains, ranking, ranking_gains, _ = beside(found, studies={"Others": ("adc-sid", "opq")})[
        "published"
    ].tables
    assert (retrieval.columns[:4], gains.columns[0]) == (("Tokenizer", "Model", "R@50, paper", "ours"), "Over")
    assert {row[0]: row[1:4] for row in retrieval.rows}["opq"] == ("item", "0.1117", "0.1000")
    assert {row[0]: row[1:4] for row in retrieval.rows}["adc-sid"] == ("wide", "0.1855", "0.4000")
    assert {row[0]: row[1:4] for row in gains.rows}["opq"] == (
        "item",
        f"{0.1855 / 0.1117 - 1:+.2%}",
        "+100.00%",
    )  # 0.2, not the wide 0.4
    assert {row[0]: row[1:] for row in ranking.rows}["item id"] == (
        "item ids / ppnet",
        "0.6455",
        "0.6000",
        "0.5897",
        "0.6000",
    )
    assert ranking_gains.rows[0] == (
        "item id",
        "item ids / ppnet",
        f"{0.6480 / 0.6455 - 1:+.2%}",
        "+10.00%",
        f"{0.6125 / 0.5897 - 1:+.2%}",
        "+10.00%",
    )
    assert "item id" not in {row[0] for row in retrieval.rows} and "adc-sid" not in {row[0] for row in gains.rows}


@pytest.mark.parametrize(
    ("title", "values", "said"),
    [
        (
            "Without a part (table 3)",
            {"adc-sid": 0.2, "adc-sid, no controller": 0.1, "adc-sid, no alignment": 0.3},
            (
                "Table 3 of",
                "against adc-sid: agrees in adc-sid, no controller (R@50 -50.0%",
                "contradicts it in adc-sid, no alignment (R@50 +50.0%",
            ),
        ),
        (
            "Alpha and beta of the controller (table 4)",
            {"adc-sid": 0.9, "adc-sid, (10, 9)": 0.2, "adc-sid, (20, 7)": 0.1, "adc-sid, (20, 9)": 0.3},
            (
                "Table 4 of",
                "against adc-sid, (10, 9): agrees in adc-sid, (20, 7) (R@50 -50.0%",
                "contradicts it in adc-sid, (20, 9) (R@50 +50.0%",
            ),
        ),
        (
            "Behaviour experts",
            {"adc-sid": 0.2, "adc-sid, 1 behaviour expert": 0.1, "adc-sid, 5 behaviour experts": 0.1},
            (
                "Figure 5 of",
                "agrees in adc-sid, 1 behaviour expert (R@50 -50.0%",
                "contradicts it in adc-sid, 5 behaviour experts (R@50 -50.0%",
            ),
        ),
        (
            "Further baselines of table 2, and random SIDs",
            {"adc-sid": 0.2, "opq": 0.1, "letter": 0.3, "random": 0.9},
            ("Table 2 of", "agrees in opq (R@50 -50.0%", "contradicts it in letter (R@50 +50.0%"),
        ),
    ],
)
def test_a_study_says_what_the_paper_claims_and_what_ours_says_to_it(title, values, said):
    study = {title: config.load(BEAUTY).evaluate.studies[title]}
    lead = beside([row for label, value in values.items() for row in seeds(label, value)], studies=study)["study1"].lead
    assert lead.count("claims that") == bool(said) and "random (" not in lead
    assert all(words in lead for words in said), lead
    once = beside([cell(label, 1, value) for label, value in values.items()], studies=study)["study1"].lead
    assert (": one seed: not told from chance in 4 comparisons, of which against the paper: " in once) == bool(said)


def test_a_tie_in_the_paper_claims_nothing():
    found = [
        row
        for label, value in {"adc-sid": 0.2, "adc-sid, no alignment": 0.1}.items()
        for row in seeds(label, value, task="ranking")
    ]
    study = {"x": ("adc-sid", "adc-sid, no alignment", "adc-sid, no controller")}
    lead = beside(found, studies=study)["study1"].lead
    assert "agrees in adc-sid, no alignment (AUC -50.0%" in lead and "GAUC -50.0%" not in lead


def test_head_and_tail_stand_against_the_claims():
    found = [
        row
        for label, value in {"adc-sid": 0.6, "rq-vae": 0.5}.items()
        for row in seeds(label, value, task="ranking", model="ppnet")
    ]
    found += seeds("item id", 0.4, task="ranking", model="item ids")
    for row in found:
        row["strata"]["tail"] = {"auc": 1 - row["strata"]["all"]["auc"]}
    lead = beside(found)["head_tail"].lead
    head, tail, ids_head, ids_tail = lead.split(". ")
    assert "on head items; ours, as changes against adc-sid: agrees in rq-vae (AUC -16.7%" in head
    assert "on tail items; ours, as changes against adc-sid: contradicts it in rq-vae (AUC +25.0%" in tail
    assert "on head items; ours, as changes against item id: contradicts it in rq-vae (AUC +25.0%" in ids_head
    assert (
        "on tail items; ours, as changes against item id: contradicts it in rq-vae (AUC -16.7%" in ids_tail
        and "adc-sid (AUC -33.3%" in ids_tail
    )


def test_the_config_of_beauty_evaluates_all_that_the_paper_compares():
    settings = config.load(BEAUTY).evaluate
    known = {*settings.labels, *settings.ranking_controls}
    assert all(set(claim.order) <= known for claim in (*published.CLAIMS, *published.HEAD_TAIL)) and "random" in known


def test_lists_without_the_history_stand_beside_published_ones_both_ways():
    group = [
        {**cell("opq", 1, 0.2), "test_repeatable": dict.fromkeys(("recall@5", "ndcg@5", "recall@10", "ndcg@10"), 0.125)}
    ]
    apart = config.Retrieval(repeatable=False)
    page = evaluation.build(
        "test",
        group,
        config.Evaluate(tokenizers=("opq",), reference="opq", published="beauty", retrievers={"item": apart}),
    )
    sections = {section.key: section for section in page.sections}
    assert "ranked among all items but those of the history" in sections["retrieval"].lead
    rows = {row[0]: row for row in sections["published"].tables[-1].rows}
    assert rows["opq (ours, history in the list)"][1] == "0.1250" != rows["opq (ours)"][1]
    with pytest.raises(
        ConfigError, match=r"evaluate\.retrievers\.a\.repeatable is false but retrieval\.repeatable is not"
    ):
        config.build({"name": "t", "evaluate": {"retrievers": {"a": {"repeatable": False}}}})


def test_both_tasks_stand_on_one_page():
    both = [*rows(), cell("ours", 0, 0.7, "ranking", "ppnet"), cell("theirs", 0, 0.6, "ranking", "ppnet")]
    page = evaluation.build("test", both, config.Evaluate(tokenizers=("ours", "theirs", "worse"), reference="ours"))
    assert [section.key for section in page.sections] == [
        "retrieval",
        "retrieval_differences",
        "ranking",
        "ranking_differences",
        "cost",
    ]
    assert "ranking" in evaluation.text(both)
    assert cells.flat(both[-1])["all_auc"] == 0.6


def test_a_study_compares_with_its_first_and_stays_out_of_the_main_tables():
    settings = config.Evaluate(
        tokenizers=("ours", "theirs"), reference="ours", studies={"Without a part": ("ours", "worse")}
    )
    page = evaluation.build("test", rows(), settings)
    sections = {section.key: section for section in page.sections}
    (table,) = sections["study1"].tables
    assert [row[0] for row in table.rows] == ["ours", "worse"] and table.rows[0][2] == "–"
    assert table.rows[1][2] == f"{0.05 / MINE[0] - 1:+.1%}"  # the one seed that both have
    (plot,) = sections["study1"].plots
    assert [bar.get_width() for bar in plot.figure.axes[0].patches] == [MINE[0], 0.05], (
        "bars of the seed that both have"
    )
    assert all("worse" not in row for row in sections["retrieval"].tables[0].rows)
    with pytest.raises(ValueError, match=r"evaluate.studies.x: name at least two"):
        config.Evaluate(studies={"x": ("a", "a")})


def test_bars_stand_at_their_label_where_a_tokenizer_lacks_models():
    groups = {"a": [{"x": 0.1, "y": 0.2}, {"x": 0.3}], "b": [{"y": 0.4}], "c": [{"x": 0.5, "y": None}]}
    axes = comparison.bars("t", groups, [("x", "X"), ("y", "Y")]).axes[0]
    found = sorted((bar.get_y() + bar.get_height() / 2, round(bar.get_width(), 6)) for bar in axes.patches)
    assert found == [(0, 0.2), (1, 0.2), (3, 0.4), (5, 0.5)]
    assert [(tick, label.get_text()) for tick, label in zip(axes.get_yticks(), axes.get_yticklabels())] == [
        (0.5, "a"),
        (3, "b"),
        (5, "c"),
    ]


def test_cells_are_those_of_the_lists_and_seeds_unless_models_names_them():
    labels = ("a", "b", "c", "d", "e")
    evaluate = {
        "tokenizers": ["a", "b"],
        "retrievers": {"r1": {}, "r2": {}},
        "rankers": {"p": {}},
        "controls": {"a": {}},
        "reference": "a",
        "seeds": [1, 2],
        "models": {"a": {"r2": [3, 1], "p": [1]}, "d": {"r2": [1]}},
        "more_seeds": {"b": [3], "e": [2]},
        "studies": {"parts": ["b", "c", "d", "e"]},
    }
    compare = {label: {"name": "random"} for label in labels}
    found = pipeline._cells(config.build({"compare": {"tokenizers": compare}, "evaluate": evaluate}))
    places = {(cell.tokenizer, cell.model, cell.config.seed) for cell in found}
    assert places == {
        *{("a", "r2", 3), ("a", "r2", 1), ("a", "p", 1), ("d", "r2", 1)},
        *{("b", model, seed) for model in ("r1", "r2", "p") for seed in (1, 2, 3)},
        *{(label, model, seed) for label in "ce" for model in ("r1", "p") for seed in (1, 2)},
        *{("a", "item ids", seed) for seed in (1, 2)},
    }
    assert len(found) == len(places)


def test_the_best_rival_is_one_that_shares_a_seed():
    found = [cell("ours", 1, 0.2), cell("near", 1, 0.1), cell("apart", 2, 0.9)]
    settings = config.Evaluate(tokenizers=("ours", "near", "apart"), reference="ours")
    page = evaluation.build("test", found, settings)
    assert any(
        "ours is 100.0% ahead of the best other tokenizer" in said and "near" in said for said in page.summary
    ), page.summary
    alone = evaluation.build("test", [found[0], found[2]], settings)
    assert (
        "shares a model and a seed"
        in next(section for section in alone.sections if section.key == "retrieval_differences").missing
    )


def test_equal_gains_are_no_evidence_whatever_their_rounding():
    for wins in range(2, 40):
        mine, theirs = ([cell(name, seed, k / 40) for seed in (1, 2, 3)] for name, k in (("a", wins), ("b", 23)))
        gain, half, p, seeds = cells.paired(mine, theirs, "recall@50")
        assert (half, p, seeds) == (0.0 if wins == 23 else float("inf"), 1.0, 3), wins
        assert gain == pytest.approx(wins / 23 - 1)


def test_a_gain_over_nothing_is_no_gain_and_chooses_nothing():
    mine, theirs = [cell("a", seed, 0.2) for seed in (1, 2)], [cell("b", 1, 0.0), cell("b", 2, 0.1)]
    assert cells.paired(mine, theirs, "recall@50") == (pytest.approx(1.0), float("inf"), 1.0, 1)
    assert cells.paired(mine[:1], theirs[:1], "recall@50") is None
    none, some = {"validation": {}}, {"validation": {"ndcg@10": 0.3}}
    assert cells.chosen([none, some], "retrieval") == pytest.approx(0.3)
    assert cells.chosen([none], "retrieval") == -np.inf
