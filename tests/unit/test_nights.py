"""Test the page of the nightly job."""

import math

import pytest

from adasid.config import build
from adasid.report import nights, page
from pipelines.nightly import verdict


def generation(number, **changes):
    churn = {
        "new": 10,
        "changed": 4,
        "removed": 2,
        "churn": 0.02,
        "weighted": 0.01,
        "by_stratum": {"head": 0.01, "tail": 0.03},
    }
    drift = {
        "error_ratio": {"text": {"all": 1.02, "tail": 1.1}},
        "norms": {"text": 0.04},
        "usage": {"t0": 0.001, "b0": 0.004},
        "cold": 0.05,
        "spearman": 0.6,
    }
    gates = [{"gate": "churn", "value": 0.02, "threshold": 0.1, "passed": True}]
    row = {
        "generation": number,
        "items": 1000 + number,
        "policy": "frozen",
        "run_date": f"2026-01-{number:02d}",
        "live": False,
    }
    metrics = {"collision_items": 0.02, "collision_tail": 0.04}
    return {**row, "metrics": metrics, "churn": churn, "drift": drift, "gates": gates, **changes}


def test_the_page_shows_the_nightly_runs_and_the_refused_one():
    rows = [
        generation(1, churn={}, drift={"baseline": {}}, policy="full", run_date=None),
        generation(2),
        generation(3, live=True),
    ]
    refused = {
        "run_date": "2026-01-04",
        "gates": [{"gate": "churn", "value": 0.9, "threshold": 0.1, "passed": False}],
        "worst": {"most moved, by events": ["<b>1</b>", "i2"], "of the largest groups": []},
    }
    content = nights.build("shop", rows, refused)
    html, pictures = page.render(content)
    assert set(pictures) == {"churn.png", "shared.png", "error.png", "usage.png", "gates.png"}
    assert (
        "The nightly run of 2026-01-04 was refused: churn is 0.900, allowed 0.100. Generation 3 stays live."
        in content.warnings[0]
    )
    assert "&lt;b&gt;1&lt;/b&gt;" in html and "<b>1</b>" not in html
    table = next(t for s in content.sections for t in s.tables if t.title == "Generations")
    assert table.rows[0][:6] == ("3 (live)", "2026-01-03", "frozen", "1,003", "10", "4") and table.rows[2][4] == "–"
    assert [row[-1] for s in content.sections for t in s.tables if t.title == "Gates" for row in t.rows] == [
        "passed",
        "FAILED",
    ]


@pytest.mark.parametrize(
    ("value", "threshold", "passed", "used"),
    [
        (0.02, 0.1, True, 0.2),
        (0.9, 0.1, False, 1.25),
        (0.101, 0.1, False, 1.01),
        (0.8, 0.5, True, 0.625),  # at least .5 is asked for
        (0.4, 0.5, False, 1.25),
        (0.0, 0.5, False, 1.01),
        (1.0, 1.0, True, 0.0),
        (0.99, 1.0, False, 1.0101),
        (0.0, 0.0, True, 0.0),
        (3.0, 0.0, False, 1.25),
    ],
)
def test_what_is_used_of_a_gate(value, threshold, passed, used):
    found = nights.allowance({"gate": "g", "value": value, "threshold": threshold, "passed": passed})
    assert found == pytest.approx(used, rel=1e-4)
    assert (found > 1) != passed


def test_a_gate_that_was_not_measured_has_no_share():
    assert math.isnan(nights.allowance({"gate": "g", "value": None, "threshold": 0.1, "passed": True}))


@pytest.mark.parametrize(
    ("error", "norms", "chosen"),
    [
        (1.0, 0.2, "frozen"),
        (1.09, 0.0, "frozen"),
        (1.1, 0.0, "warm"),
        (1.0, 0.25, "warm"),
        (1.29, 9.0, "warm"),
        (1.3, 0.0, "refit"),
    ],
)
def test_auto_takes_the_first_policy_that_the_drift_reaches(error, norms, chosen):
    drifted = {
        "error_ratio": {"text": {"all": error, "tail": 9.0}, "behavior": {"all": 1.0}},
        "norms": {"text": norms, "behavior": 0.0},
    }
    assert verdict.policy(build({"retokenize": {"policy": "auto"}}), drifted) == chosen
    assert verdict.policy(build({"retokenize": {"policy": "warm"}}), drifted) == "warm"
    assert verdict.policy(build({"retokenize": {"policy": "auto"}}), {"error_ratio": {}, "norms": {}}) == "frozen"


def test_before_the_first_nightly_run():
    first = nights.build("shop", [generation(1, churn={}, drift={"baseline": {}}, live=True)], None)
    assert [plot.name for plot in first.plots()] == ["gates"] and not first.warnings
    assert "Nothing is published yet." in page.render(nights.build("shop", [], None))[0]
