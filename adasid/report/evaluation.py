"""The page and the table of an evaluation: what each tokenizer's SIDs are worth under each retriever, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from adasid import config
from adasid.report import comparison, published, style
from adasid.report.page import Page, Plot, Section, Table
from adasid.report.words import DASH, count, number, plural
from adasid.tables import STRATA

Row = dict[str, Any]
Cells = dict[tuple[str, str], list[Row]]

_SHOWN = ("recall@5", "recall@10", "recall@50", "recall@100", "ndcg@10", "ndcg@50", "corrected_recall@10")
_TESTED = ("recall@50", "ndcg@50", "recall@10")


def build(name: str, rows: Sequence[Row], settings: config.Evaluate) -> Page:
    """The page. ``rows``: one a cell: ``tokenizer``, ``retriever``, ``head``, ``seed`` and the result of its training."""
    cells = grouped(rows)
    seeds = sorted({len(group) for group in cells.values()})
    sections = [
        Section(
            "retrieval",
            "Retrieval",
            lead="The held-out last event of every user, ranked among all items; one list, cut at several depths. Corrected: a hit on one of n items "
            "that share a SID counts 1 / n. Epochs are chosen on validation, figures are of the test.",
            plots=[
                Plot("recall", _bars("Recall@10 on the test users", cells, "recall@10"), "Bars of Recall@10.", "Whiskers are the range over seeds."),
                Plot(
                    "strata", _strata(cells), "Recall@50 by popularity of the target.", "Head: the most popular quarter of items by training count."
                ),
            ],
            tables=[_table(cells), _strata_table(cells)],
        ),
        Section("differences", f"Against {settings.reference}", lead=_lead(settings), tables=[_differences(cells, settings.reference)]),
    ]
    if settings.published == "beauty":
        sections.append(_published(cells, settings.reference))
    sections.append(Section("cost", "What it took", tables=[_cost(cells)]))
    span = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    said = [
        f"{plural(len(cells), 'combination')} of tokenizer and retriever, {span} {'seed' if seeds == [1] else 'seeds'} each; "
        "a figure after ± is the standard deviation over seeds.",
        *_verdicts(cells, settings),
    ]
    return Page(f"Semantic IDs put to use: {name}", said, [], [], sections, f"Evaluation of run {name}.")


def grouped(rows: Sequence[Row]) -> Cells:
    """Cells by (tokenizer, retriever), in the order of the rows."""
    found: Cells = {}
    for row in rows:
        found.setdefault((row["tokenizer"], row["retriever"]), []).append(row)
    return found


def flat(row: Row) -> Row:
    """A cell as one line of a CSV file."""
    plain = {
        key: row.get(key) for key in ("tokenizer", "retriever", "head", "seed", "best_epoch", "epochs", "parameters", "epoch_seconds", "mlflow_run")
    }
    plain |= {f"validation_{key}": value for key, value in row.get("validation", {}).items()}
    return plain | {f"{s}_{key}": value for s, found in row["strata"].items() for key, value in found.items() if key != "intervals"}


def text(rows: Sequence[Row]) -> str:
    """The table for a terminal: one line a combination."""
    cells = grouped(rows)
    lines = ["", f"{'':<44}" + "".join(f"{key.replace('corrected_', 'corr. '):>18}" for key in _SHOWN)]
    for (tokenizer, retriever), group in cells.items():
        lines.append(f"{tokenizer + ' / ' + retriever:<44}" + "".join(f"{_spread(group, key):>18}" for key in _SHOWN))
    return "\n".join([*lines, ""])


def paired(one: Sequence[Row], other: Sequence[Row], key: str) -> tuple[float, float, float, int] | None:
    """Relative gain of ``one`` over ``other`` in ``key``, the half width of its 95 % interval, the p value of the paired t test, and the
    number of seeds that both have. None without any; infinite width and p = 1 for one seed."""
    mine, theirs = ({row["seed"]: row["strata"]["all"][key] for row in group} for group in (one, other))
    both = sorted(set(mine) & set(theirs))
    if not both:
        return None
    gains = np.array([mine[seed] / max(theirs[seed], 1e-12) - 1 for seed in both])
    if len(both) == 1:
        return float(gains[0]), float("inf"), 1.0, 1
    half = stats.t.ppf(0.975, len(both) - 1) * gains.std(ddof=1) / np.sqrt(len(both))
    p = stats.ttest_1samp(gains, 0.0).pvalue if gains.std() > 0 else 1.0
    return float(gains.mean()), float(half), float(p), len(both)


def _mean(group: Sequence[Row], key: str) -> float:
    return float(np.mean([row["strata"]["all"][key] for row in group]))


def _spread(group: Sequence[Row], key: str, stratum: str = "all") -> str:
    values = [row["strata"][stratum][key] for row in group if stratum in row["strata"]]
    if not values:
        return DASH
    return number(float(np.mean(values)), 4) + (f" ± {number(float(np.std(values, ddof=1)), 4)}" if len(values) > 1 else "")


def _title(key: str) -> str:
    return key.replace("corrected_", "Corrected ").replace("recall@", "R@").replace("ndcg@", "N@")


def _table(cells: Cells) -> Table:
    rows = [(tokenizer, retriever, *(_spread(group, key) for key in _SHOWN)) for (tokenizer, retriever), group in cells.items()]
    return Table("Test metrics", ("Items as", "Retriever", *map(_title, _SHOWN)), rows, words=2)


def _strata_table(cells: Cells) -> Table:
    rows = [(tokenizer, retriever, *(_spread(group, "recall@50", s) for s in STRATA)) for (tokenizer, retriever), group in cells.items()]
    return Table("Recall@50 by popularity of the target", ("Items as", "Retriever", *(s.capitalize() for s in STRATA)), rows, words=2)


def _lead(settings: config.Evaluate) -> str:
    return (
        f"Relative gain of {settings.reference} over each other tokenizer under the same retriever and the same seeds, with the 95 % interval of the "
        "paired t distribution over seeds. A plus sign says that it is ahead; an interval that holds 0 says that nothing is shown."
    )


def _differences(cells: Cells, reference: str) -> Table:
    rows = []
    for (tokenizer, retriever), group in cells.items():
        own = cells.get((reference, retriever))
        if own is None or tokenizer == reference or group[0]["head"] == "none":
            continue
        found = [paired(own, group, key) for key in _TESTED]
        if found[0]:
            rows.append((tokenizer, retriever, str(found[0][3]), *(_gain(gain) for gain in found)))
    return Table("Relative gain", ("Over", "Retriever", "Seeds", *map(_title, _TESTED)), rows, words=2)


def _gain(found: tuple[float, float, float, int] | None) -> str:
    if found is None:
        return DASH
    gain, half, p, seeds = found
    return f"{gain:+.1%}" + (f" ± {half:.1%} (p {p:.2g})" if seeds > 1 else "")


def _verdicts(cells: Cells, settings: config.Evaluate) -> list[str]:
    """One sentence a retriever: where the reference stands against the best of the others, chosen on validation."""
    said = []
    for retriever in dict.fromkeys(key[1] for key in cells):
        own = cells.get((settings.reference, retriever))
        others = {k[0]: g for k, g in cells.items() if k[1] == retriever and k[0] != settings.reference and k[0] in settings.tokenizers}
        if not own or not others:
            continue
        best = max(others, key=lambda label: float(np.mean([row["validation"]["ndcg@10"] for row in others[label]])))
        found = paired(own, others[best], "recall@50")
        if found:
            gain, half, _, seeds = found
            sure = "nothing is shown with one seed" if seeds == 1 else ("beyond chance" if abs(gain) > half else "within chance")
            said.append(
                f"With the {retriever} retriever {settings.reference} is {abs(gain):.1%} {'ahead of' if gain > 0 else 'behind'} the best other "
                f"tokenizer, {best}, in Recall@50 ({sure})."
            )
    return said


def _published(cells: Cells, reference: str) -> Section:
    """Ours beside theirs, and a sentence where the order contradicts the paper's."""
    best: dict[str, list[Row]] = {}
    for (tokenizer, _), group in cells.items():
        if tokenizer not in best or _mean(group, "recall@50") > _mean(best[tokenizer], "recall@50"):
            best[tokenizer] = group
    keys = ("recall@50", "recall@100", "ndcg@50", "ndcg@100")
    rows = [
        (label, *(text for key in keys for text in (number(theirs[key], 4), _spread(best[label], key) if label in best else DASH)))
        for label, theirs in published.ADC_SID.items()
    ]
    columns = ("Tokenizer", *(head for key in keys for head in (f"{_title(key)}, paper", "ours")))
    fair = [
        (label, *(number(v.get(k, float("nan")), 4) for k in ("recall@5", "ndcg@5", "recall@10", "ndcg@10")))
        for label, v in published.LEAVE_ONE_OUT.items()
    ]
    ours = [label for label in published.ADC_SID if label in best]
    ahead = [
        label for label in ours if label != reference and reference in best and _mean(best[label], "recall@50") >= _mean(best[reference], "recall@50")
    ]
    lead = "The paper had images, another encoder and an NDCG that no single-target protocol gives (its slopes are too steep): compare the order, not the figures."
    if ahead:
        lead += f" The paper has {reference} ahead of all; here {', '.join(ahead)} {'is' if len(ahead) == 1 else 'are'} level with it or ahead: a contradiction."
    return Section(
        "published",
        "Beside published results",
        lead=lead,
        tables=[
            Table("ADC-SID, table 2, Amazon Beauty; ours with each tokenizer's best retriever", columns, rows),
            Table("Published results under this protocol", ("System", "R@5", "N@5", "R@10", "N@10"), fair),
        ],
    )


def _cost(cells: Cells) -> Table:
    rows = []
    for (tokenizer, retriever), group in cells.items():
        first = group[0]
        if "epoch_seconds" not in first:
            continue
        middle: Mapping[str, float] = {k: float(np.mean([row[k] for row in group])) for k in ("epochs", "epoch_seconds", "test_users_per_second")}
        parts = [float(np.mean([row["parts"][part] for row in group])) for part in ("data", "forward", "backward")]
        figures = (number(value, 1) for value in (middle["epoch_seconds"], *parts))
        speed = count(round(middle["test_users_per_second"]))
        rows.append((tokenizer, retriever, count(first["parameters"]), number(middle["epochs"], 0), *figures, speed))
    heads = ("Items as", "Retriever", "Parameters", "Epochs", "Epoch, s", "Data, s", "Forward, s", "Backward, s", "Test users/s")
    return Table("Cost", heads, rows, words=2)


@style.styled
def _bars(title: str, cells: Cells, key: str) -> Figure:
    """Horizontal bars: a group a tokenizer, a bar a retriever."""
    tokenizers, retrievers = (list(dict.fromkeys(k[i] for k in cells)) for i in (0, 1))
    rows = [{"label": t, **{r: row["strata"]["all"][key]}} for (t, r), group in cells.items() for row in group]
    groups = {t: [row for row in rows if row["label"] == t] for t in tokenizers}
    return comparison.bars(title, groups, [(r, r) for r in retrievers])


@style.styled
def _strata(cells: Cells) -> Figure:
    """Recall@50 by stratum of the target, each tokenizer with the retriever that is best for it on all users."""
    best: dict[str, list[Row]] = {}
    for (tokenizer, _), group in cells.items():
        if tokenizer not in best or _mean(group, "recall@50") > _mean(best[tokenizer], "recall@50"):
            best[tokenizer] = group
    there = [s for s in ("head", "mid", "tail") if any(s in row["strata"] for group in best.values() for row in group)]
    groups = {label: [{s: row["strata"][s]["recall@50"] for s in there if s in row["strata"]} for row in group] for label, group in best.items()}
    return comparison.bars("Recall@50 by popularity of the target", groups, [(s, s.capitalize()) for s in there])
