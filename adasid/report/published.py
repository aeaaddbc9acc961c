"""This module defines published results and claims, shown beside ours, never mixed with them.

``ADC_SID``: arXiv 2510.25622 v3, table 2, Amazon Beauty with images, as printed; the row of item ids is from v1's table
2, because v3 has none. Its growth of NDCG with the cut-off is not that of single-target evaluation (methods 8.7), so
only the order of the methods can be compared. ``LEAVE_ONE_OUT``: last item = test, full ranking over the items, as
here. ``CLAIMS`` and ``HEAD_TAIL``: the same paper's claims on the order, all but table 2 on its industrial data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from adasid.report.words import BEYOND, Gain, gained, listed, measure, plural, sure

Figures = dict[str, dict[str, float]]

OURS = "adc-sid"
TESTED = ("recall@50", "ndcg@50", "auc", "gauc")

ADC_SID: Figures = {
    "item id": {"auc": 0.6455, "gauc": 0.5897},
    "rq-vae": {
        "recall@50": 0.1213,
        "recall@100": 0.2398,
        "ndcg@50": 0.0803,
        "ndcg@100": 0.1304,
        "auc": 0.6446,
        "gauc": 0.5852,
    },
    "opq": {
        "recall@50": 0.1117,
        "recall@100": 0.2189,
        "ndcg@50": 0.0802,
        "ndcg@100": 0.1302,
        "auc": 0.6449,
        "gauc": 0.5898,
    },
    "rq-kmeans, aligned": {
        "recall@50": 0.1283,
        "recall@100": 0.2285,
        "ndcg@50": 0.0840,
        "ndcg@100": 0.1347,
        "auc": 0.6452,
        "gauc": 0.5909,
    },
    "letter": {
        "recall@50": 0.1513,
        "recall@100": 0.2492,
        "ndcg@50": 0.0937,
        "ndcg@100": 0.1453,
        "auc": 0.6444,
        "gauc": 0.5973,
    },
    "das": {
        "recall@50": 0.1503,
        "recall@100": 0.2403,
        "ndcg@50": 0.0933,
        "ndcg@100": 0.1445,
        "auc": 0.6466,
        "gauc": 0.5933,
    },
    "mm-rq-vae": {
        "recall@50": 0.1673,
        "recall@100": 0.2598,
        "ndcg@50": 0.0945,
        "ndcg@100": 0.1461,
        "auc": 0.6453,
        "gauc": 0.5991,
    },
    "adc-sid": {
        "recall@50": 0.1855,
        "recall@100": 0.2885,
        "ndcg@50": 0.0996,
        "ndcg@100": 0.1568,
        "auc": 0.6480,
        "gauc": 0.6125,
    },
}

LEAVE_ONE_OUT: Figures = {
    "TIGER (paper)": {"recall@5": 0.0454, "ndcg@5": 0.0321, "recall@10": 0.0648, "ndcg@10": 0.0384},
    "LETTER (paper)": {"recall@5": 0.0431, "ndcg@5": 0.0286, "recall@10": 0.0672, "ndcg@10": 0.0364},
    "RPG (paper)": {"recall@5": 0.0550, "ndcg@5": 0.0381, "recall@10": 0.0809, "ndcg@10": 0.0464},
    "DiffGRM (paper, scored on SIDs)": {"recall@5": 0.0603, "ndcg@5": 0.0414, "recall@10": 0.0876, "ndcg@10": 0.0502},
    "SASRec, tuned (Cornac)": {"recall@5": 0.0508, "ndcg@5": 0.0348, "recall@10": 0.0740, "ndcg@10": 0.0423},
}


class Claim(NamedTuple):
    """A claim is a statement of ``source`` about tokenizers relative to ``base``. ``order``: their figures as printed
    or, if only the order is stated, ranks."""

    source: str
    says: str
    base: str
    order: Figures
    stratum: str = "all"

    def beside(self, changes: Sequence[tuple[str, str, Gain]]) -> str:
        """Return one sentence: the claim, and whether our ``changes`` (tokenizer, measure, gain over the base) support
        it."""
        outcomes: dict[str, list[tuple[str, str]]] = {"agrees": [], "contradicts it": []}
        counts = Counter[str]()
        for label, key, found in changes:
            if direction := self.order[label][key] - self.order[self.base][key]:
                alike, outcome = found[0] * direction > 0, sure(found)
                if outcome == BEYOND:
                    outcomes["agrees" if alike else "contradicts it"].append((label, f"{measure(key)} {gained(found)}"))
                else:
                    counts[outcome] += 1
                    outcomes.setdefault(outcome, []).extend(
                        [] if alike else [(label, f"{measure(key)} {found[0]:+.1%}")]
                    )
        parts = []
        for outcome, entries in outcomes.items():
            named = listed(
                [f"{label} ({', '.join(t for own, t in entries if own == label)})" for label in dict(entries)]
            )
            if outcome in counts:
                total = f"{outcome} in {plural(counts[outcome], 'comparison')}"
                parts.append(
                    total
                    + (f", of which against the paper: {named}" if named else ", all of them as the paper has them")
                )
            elif named:
                parts.append(f"{outcome} in {named}")
        return (
            f"{self.source} claims that {self.says}; ours, as changes against {self.base}: "
            f"{'; '.join(parts) or 'not evaluated yet'}."
        )


def ranks(keys: Sequence[str], places: dict[str, float]) -> Figures:
    """Return figures that express an order only: a higher rank is better, in all of ``keys``."""
    return {label: dict.fromkeys(keys, place) for label, place in places.items()}


TABLE_2 = Claim("Table 2 of ADC-SID (Beauty)", "adc-sid is ahead of all others", OURS, ADC_SID)
TABLE_3 = Claim(
    "Table 3 of ADC-SID (industrial data)",
    "without a part R@50 and N@50 fall, AUC falls (without the controller it rises) and GAUC stays or falls by .0001",
    OURS,
    {
        OURS: {"recall@50": 0.2774, "ndcg@50": 0.1688, "auc": 0.7101, "gauc": 0.5846},
        "adc-sid, no controller": {"recall@50": 0.2701, "ndcg@50": 0.1618, "auc": 0.7104, "gauc": 0.5845},
        "adc-sid, no alignment": {"recall@50": 0.2733, "ndcg@50": 0.1653, "auc": 0.7097, "gauc": 0.5846},
        "adc-sid, equal gate": {"recall@50": 0.2705, "ndcg@50": 0.1616, "auc": 0.7098, "gauc": 0.5845},
        "adc-sid, no sparsity": {"recall@50": 0.2757, "ndcg@50": 0.1675, "auc": 0.7097, "gauc": 0.5846},
    },
)
TABLE_4 = Claim(
    "Table 4 of ADC-SID (industrial data)",
    "alpha 10 and beta 9 are best in R@50, N@50 and GAUC and last in AUC",
    "adc-sid, (10, 9)",
    {
        "adc-sid, (10, 9)": {"recall@50": 0.2774, "ndcg@50": 0.1688, "auc": 0.7101, "gauc": 0.5846},
        "adc-sid, (20, 7)": {"recall@50": 0.2749, "ndcg@50": 0.1664, "auc": 0.7106, "gauc": 0.5840},
        "adc-sid, (20, 9)": {"recall@50": 0.2750, "ndcg@50": 0.1677, "auc": 0.7105, "gauc": 0.5842},
        "adc-sid, (20, 14)": {"recall@50": 0.2760, "ndcg@50": 0.1686, "auc": 0.7105, "gauc": 0.5839},
    },
)
EXPERTS = Claim(
    "Figure 5 of ADC-SID (industrial data)",
    "more behaviour experts are better in both tasks",
    OURS,
    ranks(
        TESTED,
        {
            "adc-sid, 1 behaviour expert": 1,
            OURS: 2,
            "adc-sid, 3 behaviour experts": 3,
            "adc-sid, 5 behaviour experts": 5,
        },
    ),
)
CLAIMS = (TABLE_2, TABLE_3, TABLE_4, EXPERTS)

_SIDS = [label for label in ADC_SID if label != "item id"]
_BEST = ranks(["auc"], {label: float(label == OURS) for label in _SIDS})
HEAD_TAIL = (
    Claim("Section 4.5 of ADC-SID (industrial data)", "adc-sid has the best AUC on head items", OURS, _BEST, "head"),
    Claim("The same section", "adc-sid has the best AUC on tail items", OURS, _BEST, "tail"),
    Claim(
        "Its v1",
        "SIDs of content alone fall short of item ids in AUC on head items",
        "item id",
        ranks(["auc"], {"item id": 1, "rq-vae": 0, "opq": 0}),
        "head",
    ),
    Claim(
        "Its v1 also",
        "all SIDs are ahead of item ids in AUC on tail items",
        "item id",
        ranks(["auc"], {"item id": 0, **dict.fromkeys(_SIDS, 1.0)}),
        "tail",
    ),
)
