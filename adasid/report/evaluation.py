"""Build the page and the table of an evaluation: the quality of each tokenizer's SIDs under each retriever, with its
uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from adasid import config
from adasid.report import comparison, papers, published
from adasid.report.cells import SHOWN, TESTED, Cells, Row, best_of, chosen, codes_of, of_task, paired, spread
from adasid.report.page import Page, Plot, Section, Table
from adasid.report.words import DASH, count, gained, measure, number, plural, sure
from adasid.tables import STRATA


def build(name: str, rows: Sequence[Row], settings: config.Evaluate, missing: int = 0) -> Page:
    """Build the page. ``rows``: one per cell: ``task``, ``tokenizer``, ``codes`` (slots × codes per slot), ``model``,
    ``seed`` and the result of its training; ``missing``: number of cells without a result."""
    everything = {task: of_task(rows, task) for task in SHOWN}
    apart = set(settings.labels) - set(settings.tokenizers)
    cells = {
        task: {key: group for key, group in own.items() if key[0] not in apart} for task, own in everything.items()
    }
    seeds = sorted({len(group) for own in cells.values() for group in own.values()})
    span = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    said = [
        f"{plural(sum(map(len, cells.values())), 'combination')} of items and model, {span} "
        f"{'seed' if seeds == [1] else 'seeds'} each; "
        "a figure after ± is the standard deviation over seeds.",
    ]
    if missing:
        said.append(f"{plural(missing, 'cell')} of the config still to be evaluated.")
    sections = []
    for task, section in (("retrieval", _retrieval), ("ranking", _ranking)):
        if cells[task]:
            sections += section(cells[task], settings)
            said += _verdicts(cells[task], task, settings)
    if settings.published == "beauty":
        sections.append(papers.section(cells, everything, settings))
        sections.append(
            Section(
                "head_tail",
                "Head and tail, as claimed",
                lead=" ".join(papers.compared(claim, everything) for claim in published.HEAD_TAIL),
            )
        )
    claims = published.CLAIMS if settings.published == "beauty" else ()
    sections += [
        _study(number_, title, labels, everything, claims)
        for number_, (title, labels) in enumerate(settings.studies.items(), 1)
    ]
    sections.append(Section("cost", "Time and size", tables=[_cost(own) for own in everything.values() if own]))
    return Page(f"Semantic IDs in retrieval and ranking: {name}", said, [], [], sections, f"Evaluation of run {name}.")


def _retrieval(cells: Cells, settings: config.Evaluate) -> list[Section]:
    return [
        Section(
            "retrieval",
            "Retrieval",
            lead="The held-out event of each user, ranked among all "
            f"items{'' if settings.repeatable else ' but those of the history'}; one list, cut at "
            "several depths. Items that share a SID are in the order of their training counts; corrected: what a "
            "random order of them gives on "
            "average. Epochs are chosen on validation, figures are of the test.",
            plots=[
                Plot(
                    "recall",
                    _bars("Recall@10 on the test users", cells, "recall@10"),
                    "Bars of Recall@10.",
                    "Whiskers are the range over seeds.",
                ),
                Plot(
                    "strata",
                    _strata("Recall@50 by popularity of the target", cells, "retrieval", "recall@50"),
                    "Bars of Recall@50 by stratum.",
                    "Head and tail: the most and least popular items by training count. Each tokenizer with the "
                    "retriever that is best for it on validation.",
                ),
            ],
            tables=[
                _table("Test metrics", cells, "retrieval"),
                _strata_table("Recall@50 by popularity of the target", cells, "recall@50"),
            ],
        ),
        _differences(cells, "retrieval", settings),
    ]


def _ranking(cells: Cells, settings: config.Evaluate) -> list[Section]:
    values = sorted(
        {row[key] for key in ("split", "labels") for group in cells.values() for row in group if key in row}
    )
    result = {
        "sampled": "Labels are sampled: each event against items drawn for it by popularity (seeded, in the test the "
        "same for all).",
        "ratings": "Labels are the users' ratings.",
        "leave_one_out": "The test is each user's last event.",
        "global_time": "The test is all that happened after one moment.",
    }
    return [
        Section(
            "ranking",
            "Ranking",
            lead=" ".join(result[value] for value in values)
            + " GAUC is the mean of the users' AUCs weighted by their samples, over the users that have both classes.",
            plots=[
                Plot(
                    "auc_strata",
                    _strata("AUC by popularity of the item", cells, "ranking", "auc", low=0.45),
                    "Bars of AUC by stratum.",
                    "Samples whose item is of the stratum. The axis starts at 0.45.",
                )
            ],
            tables=[
                _table("Test metrics", cells, "ranking"),
                _strata_table("AUC by popularity of the item", cells, "auc"),
            ],
        ),
        _differences(cells, "ranking", settings),
    ]


def text(rows: Sequence[Row]) -> str:
    """Return the tables for a terminal: one line per combination."""
    lines, width = [], 2 + max(len(f"{row['tokenizer']} / {row['model']}") for row in rows)
    for task, keys in SHOWN.items():
        cells = of_task(rows, task)
        if cells:
            lines += ["", f"{task:<{width}}" + "".join(f"{key.replace('corrected_', 'corr. '):>18}" for key in keys)]
        for (tokenizer, model), group in cells.items():
            lines.append(f"{tokenizer + ' / ' + model:<{width}}" + "".join(f"{spread(group, key):>18}" for key in keys))
    return "\n".join([*lines, ""])


def _table(title: str, cells: Cells, task: str) -> Table:
    rows = [
        (tokenizer, codes_of(group), model, *(spread(group, key) for key in SHOWN[task]))
        for (tokenizer, model), group in cells.items()
    ]
    return Table(title, ("Items as", "Codes", "Model", *map(measure, SHOWN[task])), rows, words=3)


def _strata_table(title: str, cells: Cells, key: str) -> Table:
    rows = [(tokenizer, model, *(spread(group, key, s) for s in STRATA)) for (tokenizer, model), group in cells.items()]
    return Table(title, ("Items as", "Model", *(s.capitalize() for s in STRATA)), rows, words=2)


def _differences(cells: Cells, task: str, settings: config.Evaluate) -> Section:
    rows = []
    for (tokenizer, model), group in cells.items():
        reference_group = cells.get((settings.reference, model))
        if reference_group is None or tokenizer == settings.reference:
            continue
        gains = [paired(reference_group, group, key) for key in TESTED[task]]
        if gains[0]:
            rows.append((tokenizer, model, str(gains[0][3]), *(gained(gain) for gain in gains)))
    lead = (
        f"Relative gain of {settings.reference} over each other tokenizer under the same model and the same seeds, "
        "with the 95 % interval of the "
        "paired t distribution over seeds. A plus sign says that it is ahead; an interval that includes 0 says that "
        "nothing is shown."
    )
    tables = (
        [Table("Relative gain", ("Over", "Model", "Seeds", *map(measure, TESTED[task])), rows, words=2)] if rows else []
    )
    title = f"{task.capitalize()} against {settings.reference}"
    return Section(
        f"{task}_differences",
        title,
        lead=lead,
        tables=tables,
        missing="" if rows else "No other tokenizer shares a model and a seed with it.",
    )


def _verdicts(cells: Cells, task: str, settings: config.Evaluate) -> list[str]:
    """Compare, for each model, the reference with the best of the others, selected on validation; tokenizers of other
    lengths or codebook sizes are compared separately."""
    said, key = [], TESTED[task][0]
    for model in dict.fromkeys(key[1] for key in cells):
        reference_group = cells.get((settings.reference, model), [])
        named = {
            label: group
            for (label, its), group in cells.items()
            if its == model and label != settings.reference and label in settings.tokenizers
        }
        others = {label: group for label, group in named.items() if paired(reference_group, group, key)}
        for alike in (True, False):
            rivals = [
                label for label, group in others.items() if (codes_of(group) == codes_of(reference_group)) == alike
            ]
            best = max(rivals, key=lambda label: chosen(others[label], task), default=None)
            if best and (result := paired(reference_group, others[best], key)):
                gain = result[0]
                among = "the best other tokenizer"
                if len(rivals) < len(others):
                    size = f"{codes_of(others[best])}" + ("" if alike else f", not {codes_of(reference_group)}")
                    among = f"the best other of {'the same' if alike else 'another'} size ({size})"
                said.append(
                    f"With the model {model}, {settings.reference} is {abs(gain):.1%} "
                    f"{'ahead of' if gain > 0 else 'behind'} {among}, "
                    f"{best}, in {measure(key)} ({sure(result)})."
                )
    return said


def _study(
    place: int, title: str, labels: Sequence[str], everything: Mapping[str, Cells], claims: Sequence[published.Claim]
) -> Section:
    """Compare tokenizers with the first of them under the same model, beside the ``claims`` about two of them and their
    base."""
    tables, plots = list[Table](), list[Plot]()
    for task, cells in everything.items():
        models = [
            model
            for label, model in cells
            if label == labels[0] and any((other, model) in cells for other in labels[1:])
        ]
        for model in dict.fromkeys(models):
            own = {label: cells[label, model] for label in labels if (label, model) in cells}
            rows = []
            for label, group in own.items():
                gains = [
                    DASH if label == labels[0] else gained(paired(group, own[labels[0]], key)) for key in TESTED[task]
                ]
                rows.append(
                    (label, *(cell for key, gain in zip(TESTED[task], gains) for cell in (spread(group, key), gain)))
                )
            heads = (head for key in TESTED[task] for head in (measure(key), "change"))
            tables.append(Table(f"{task.capitalize()}, {model}", ("Tokenizer", *heads), rows))
            key = TESTED[task][0]
            if seeds := set.intersection(*({row["seed"] for row in group} for group in own.values())):
                groups = {
                    label: [row["strata"]["all"] for row in group if row["seed"] in seeds]
                    for label, group in own.items()
                }
                low = 0.9 * min(row[key] for group in groups.values() for row in group)
                name = f"{measure(key)}, {model}"
                figure = comparison.bars(name, groups, [(key, measure(key))], low)
                plots.append(
                    Plot(
                        f"study{place}_{len(plots)}",
                        figure,
                        name,
                        "The seeds that all have. The axis does not start at 0.",
                    )
                )
    lead = (
        f"The change is against {labels[0]}, over the seeds that both have, with the 95 % interval of the paired t "
        "distribution where there are several."
    )
    for claim in claims:
        order = {label: figures for label, figures in claim.order.items() if label in labels}
        if claim.base in order and len(order) > 2:
            lead += " " + papers.compared(claim._replace(order=order), everything)
    return Section(
        f"study{place}", title, lead=lead, plots=plots, tables=tables, missing="" if tables else "Not evaluated."
    )


def _cost(cells: Cells) -> Table:
    rows = []
    for (tokenizer, model), group in cells.items():
        if "epoch_seconds" not in group[0]:
            continue
        parts = [
            [row["epoch_seconds"], *(row["parts"][part] for part in ("data", "forward", "backward"))] for row in group
        ]
        epochs = number(float(np.mean([row["epochs"] for row in group])), 0)
        speed = [row["test_users_per_second"] for row in group if "test_users_per_second" in row]
        figures = (number(float(value), 1) for value in np.mean(parts, axis=0))
        rows.append(
            (
                tokenizer,
                model,
                count(group[0]["parameters"]),
                epochs,
                *figures,
                count(round(float(np.mean(speed)))) if speed else DASH,
                count(group[0]["test_users"]) if "test_users" in group[0] else DASH,
            )
        )
    heads = (
        "Items as",
        "Model",
        "Parameters",
        "Epochs",
        "Epoch, s",
        "Data, s",
        "Forward, s",
        "Backward, s",
        "Test users/s",
        "Test users",
    )
    return Table("Cost", heads, rows, words=2)


def _bars(title: str, cells: Cells, key: str) -> Figure:
    """Draw horizontal bars: a group per tokenizer, a bar per model."""
    tokenizers, models = (list(dict.fromkeys(k[i] for k in cells)) for i in (0, 1))
    rows = [{"label": t, m: row["strata"]["all"].get(key)} for (t, m), group in cells.items() for row in group]
    groups = {t: [row for row in rows if row["label"] == t] for t in tokenizers}
    return comparison.bars(title, groups, [(m, m) for m in models])


def _strata(title: str, cells: Cells, task: str, key: str, low: float = 0.0) -> Figure:
    """Draw bars by stratum, each tokenizer with its best model."""
    best = best_of(cells, task)
    strata = [s for s in STRATA if any(key in row["strata"].get(s, {}) for group in best.values() for row in group)]
    groups = {
        label: [{s: row["strata"][s][key] for s in strata if key in row["strata"].get(s, {})} for row in group]
        for label, group in best.items()
    }
    return comparison.bars(title, groups, [(s, s.capitalize()) for s in strata], low)
