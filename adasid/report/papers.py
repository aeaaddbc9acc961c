"""Compare an evaluation with the figures and the claims of the papers (:mod:`adasid.report.published`)."""

from __future__ import annotations

from collections.abc import Mapping

from adasid import config
from adasid.report import published
from adasid.report.cells import SHOWN, Cells, best_of, both, codes_of, paired, spread
from adasid.report.page import Section, Table
from adasid.report.words import DASH, gained, measure, number


def section(cells: Mapping[str, Cells], everything: Mapping[str, Cells], settings: config.Evaluate) -> Section:
    """Compare our results with the published ones, and with the paper's claims. ``everything``: ``cells`` and the
    studies' cells."""
    shown = {"retrieval": ("recall@50", "recall@100", "ndcg@50", "ndcg@100"), "ranking": ("auc", "gauc")}

    def beside(task: str) -> list[Table]:
        keys, rows, gains = shown[task], list[tuple[str, ...]](), list[tuple[str, ...]]()
        for label, theirs in ((label, figures) for label, figures in published.ADC_SID.items() if keys[0] in figures):
            group, ours = both(everything[task], task, label, published.OURS)
            model = " / ".join(dict.fromkeys(rows_[0]["model"] for rows_ in (group, ours) if rows_ and group)) or DASH
            rows.append(
                (label, model, *(text for key in keys for text in (number(theirs[key], 4), spread(group, key))))
            )
            pairs = [
                (
                    f"{published.ADC_SID[published.OURS][key] / theirs[key] - 1:+.2%}",
                    gained(paired(ours, group, key), 2),
                )
                for key in keys
            ]
            gains += [(label, model, *(text for pair in pairs for text in pair))] if label != published.OURS else []
        heads = ("Tokenizer", "Model", *(head for key in keys for head in (f"{measure(key)}, paper", "ours")))
        title = f"ADC-SID, table 2, Amazon Beauty: {task}"
        return [
            Table(title, heads, rows, words=2),
            Table(f"{title}, relative gain of adc-sid", ("Over", *heads[1:]), gains, words=2),
        ]

    keys = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
    protocol = [(label, *(number(theirs[key], 4) for key in keys)) for label, theirs in published.LEAVE_ONE_OUT.items()]
    ours = list[tuple[str, ...]]()
    for label, group in best_of(cells["retrieval"], "retrieval").items():
        ours.append((f"{label} (ours)", *(spread(group, key) for key in keys)))
        if not settings.repeatable:
            again = [{**row, "strata": {"all": row["test_repeatable"]}} for row in group]
            ours.append((f"{label} (ours, history in the list)", *(spread(again, key) for key in keys)))
    lead = (
        "The paper had images, another encoder, ratings, and an NDCG that no single-target protocol gives (its slopes "
        "are too steep): compare the "
        "order, not the figures. Ours: each tokenizer's model that is best on validation, of those under which adc-sid "
        "stands too (item ids: their "
        "own); where adc-sid's own best of those is another, it is named second."
    )
    if not settings.repeatable:
        lead += (
            " Our lists leave out the items of the history, which published systems do not all do: below, ours "
            "are given both ways."
        )
    codes = {label: codes_of(group) for groups in everything.values() for (label, _), group in groups.items()}
    rivals = [
        label
        for label in (*settings.labels, *settings.ranking_controls)
        if label in codes and not label.startswith(published.OURS)
    ]
    size = codes.get(published.OURS)
    for alike, those in ((True, f"of its size, {size}"), (False, "of another size, which the paper lacks, or of none")):
        if named := [label for label in rivals if (codes[label] == size) == alike]:
            order = published.ranks(published.TESTED, {published.OURS: 1, **dict.fromkeys(named, 0)})
            lead += " " + compared(
                published.TABLE_2._replace(order=order, says=f"{published.TABLE_2.says}, here those {those}"),
                everything,
            )
    tables = [
        *(table for task in shown for table in beside(task)),
        Table(
            "Results under this protocol (last event of each user, all items ranked)",
            ("System", *map(measure, keys)),
            [*protocol, *ours],
        ),
    ]
    return Section("published", "Beside published results", lead=lead, tables=tables)


def compared(claim: published.Claim, everything: Mapping[str, Cells]) -> str:
    """Return the sentence of ``claim`` with all its evaluated cells."""
    changes = []
    for label, key in (
        (label, key)
        for label in claim.order
        for key in published.TESTED
        if label != claim.base and key in claim.order[label]
    ):
        task = "ranking" if key in SHOWN["ranking"] else "retrieval"
        gain = paired(*both(everything[task], task, label, claim.base), key, claim.stratum)
        changes += [(label, key, gain)] if gain else []
    return claim.beside(changes)
