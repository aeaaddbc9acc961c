"""Aggregate the cells of an evaluation: results of one task by tokenizer and model, a row per seed; their means, gains
and choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from adasid.report.words import DASH, Gain, number

Row = dict[str, Any]
Cells = dict[tuple[str, str], list[Row]]

SHOWN = {
    "retrieval": ("recall@10", "recall@50", "ndcg@10", "ndcg@50", "corrected_recall@10"),
    "ranking": ("auc", "gauc", "gauc_users"),
}
"""Metrics of the tables, by task."""
TESTED = {"retrieval": ("recall@50", "ndcg@50", "recall@10"), "ranking": ("auc", "gauc")}
"""Metrics whose gains are tested, by task; the first decides."""
_ROUNDING = 1e-12
"""Relative spread of gains that are equal but for rounding, at most."""
_CHOOSES = {"retrieval": "ndcg@10", "ranking": "auc"}


def grouped(rows: Sequence[Row]) -> Cells:
    """Group cells of one task by (tokenizer, model), in the order of the rows."""
    cells: Cells = {}
    for row in rows:
        cells.setdefault((row["tokenizer"], row["model"]), []).append(row)
    return cells


def of_task(rows: Sequence[Row], task: str) -> Cells:
    """Group the cells of one task by :func:`grouped`."""
    return grouped([row for row in rows if row["task"] == task])


def flat(row: Row) -> Row:
    """Flatten a cell to one line of a CSV file."""
    cell = ("task", "tokenizer", "codes", "model", "seed", "labels", "split", "repeats")
    training = ("best_epoch", "epochs", "parameters", "epoch_seconds", "mlflow_run")
    plain = {key: row.get(key) for key in (*cell, *training)}
    plain |= {
        f"{part}_{key}": value for part in ("validation", "test_repeatable") for key, value in row.get(part, {}).items()
    }
    return plain | {
        f"{s}_{key}": v
        for s, found in row["strata"].items()
        for key, v in found.items()
        if not isinstance(v, dict | list)
    }


def paired(one: Sequence[Row], other: Sequence[Row], key: str, stratum: str = "all") -> Gain | None:
    """Compute the relative gain of ``one`` over ``other`` in ``key``, the half width of its 95 % interval, the p value
    of the paired t test, and the number of seeds that both have and where ``other`` is above 0. None without such
    seeds; infinite width and p = 1 for one seed, and for equal gains, from which no spread can be estimated."""
    mine, theirs = (
        {row["seed"]: row["strata"][stratum][key] for row in group if key in row["strata"].get(stratum, {})}
        for group in (one, other)
    )
    both = sorted(seed for seed in set(mine) & set(theirs) if theirs[seed] > 0)
    if not both:
        return None
    gains = np.array([mine[seed] / theirs[seed] - 1 for seed in both])
    if len(both) == 1 or np.ptp(gains) <= _ROUNDING * max(1.0, np.abs(gains).max()):
        return float(gains[0]), 0.0 if len(both) > 1 and not gains.any() else float("inf"), 1.0, len(both)
    half = stats.t.ppf(0.975, len(both) - 1) * gains.std(ddof=1) / np.sqrt(len(both))
    p = stats.ttest_1samp(gains, 0.0).pvalue
    return float(gains.mean()), float(half), float(p), len(both)


def chosen(group: Sequence[Row], task: str) -> float:
    """Return the validation figure by which models are selected; lowest if there is none (a control that is not
    trained)."""
    values = [row["validation"][_CHOOSES[task]] for row in group if _CHOOSES[task] in row.get("validation", {})]
    return float(np.mean(values)) if values else -np.inf


def spread(group: Sequence[Row], key: str, stratum: str = "all") -> str:
    """Return mean ± standard deviation over seeds of ``key``, or a dash if there is none."""
    values = [row["strata"][stratum][key] for row in group if key in row["strata"].get(stratum, {})]
    digits = 0 if key == "gauc_users" else 4
    if not values:
        return DASH
    return number(float(np.mean(values)), digits) + (
        f" ± {number(float(np.std(values, ddof=1)), digits)}" if len(values) > 1 else ""
    )


def codes_of(group: Sequence[Row]) -> str:
    """Return the size of the SIDs: slots x codes."""
    return str(group[0].get("codes") or DASH)


def both(cells: Cells, task: str, label: str, other: str) -> tuple[list[Row], list[Row]]:
    """Return the cells of ``label`` and of ``other``, each with its best model among those that both have, or among all
    if they share none."""
    models = [{model for name, model in cells if name == one} for one in (label, other)]
    shared = models[0] & models[1] or models[0] | models[1]
    best = best_of({key: group for key, group in cells.items() if key[0] in (label, other) and key[1] in shared}, task)
    return best.get(label, []), best.get(other, [])


def best_of(cells: Cells, task: str) -> dict[str, list[Row]]:
    """Return each tokenizer's cells with the model that is best for it on validation."""
    best: dict[str, list[Row]] = {}
    for (tokenizer, _), group in cells.items():
        if tokenizer not in best or chosen(group, task) > chosen(best[tokenizer], task):
            best[tokenizer] = group
    return best
