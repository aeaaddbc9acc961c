"""The page of the nightly job."""

from adasid.report import nights, page


def generation(number, **changes):
    churn = {"new": 10, "changed": 4, "removed": 2, "churn": 0.02, "weighted": 0.01, "by_stratum": {"head": 0.01, "tail": 0.03}}
    drift = {
        "error_ratio": {"text": {"all": 1.02, "tail": 1.1}},
        "norms": {"text": 0.04},
        "usage": {"t0": 0.001, "b0": 0.004},
        "cold": 0.05,
        "spearman": 0.6,
    }
    gates = [{"gate": "churn", "value": 0.02, "threshold": 0.1, "passed": True}]
    row = {"generation": number, "items": 1000 + number, "policy": "frozen", "run_date": f"2026-01-{number:02d}", "live": False}
    metrics = {"collision_items": 0.02, "collision_tail": 0.04}
    return {**row, "metrics": metrics, "churn": churn, "drift": drift, "gates": gates, **changes}


def test_the_page_shows_the_nights_and_the_refused_one():
    rows = [generation(1, churn={}, drift={"baseline": {}}, policy="full", run_date=None), generation(2), generation(3, live=True)]
    refused = {
        "run_date": "2026-01-04",
        "gates": [{"gate": "churn", "value": 0.9, "threshold": 0.1, "passed": False}],
        "worst": {"most moved, by events": ["<b>1</b>", "i2"], "of the largest groups": []},
    }
    content = nights.build("shop", rows, refused)
    html, pictures = page.render(content)
    assert set(pictures) == {"churn.png", "shared.png", "error.png", "usage.png"}
    assert "The night of 2026-01-04 was refused: churn is 0.900, allowed 0.100. Generation 3 stays live." in content.warnings[0]
    assert "&lt;b&gt;1&lt;/b&gt;" in html and "<b>1</b>" not in html
    table = next(t for s in content.sections for t in s.tables if t.title == "Generations")
    assert table.rows[0][:6] == ("3 (live)", "2026-01-03", "frozen", "1,003", "10", "4") and table.rows[2][4] == "–"
    assert [row[-1] for s in content.sections for t in s.tables if t.title == "Gates" for row in t.rows] == ["passed", "FAILED"]


def test_before_the_first_night():
    first = nights.build("shop", [generation(1, churn={}, drift={"baseline": {}}, live=True)], None)
    assert not list(first.plots()) and not first.warnings
    assert "Nothing is published yet." in page.render(nights.build("shop", [], None))[0]
