"""Build the page and the table of a comparison of tokenizers: mean and spread over seeds, every method by the same
measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adasid.report import style
from adasid.report.page import Page, Plot, Section, Table
from adasid.report.words import DASH, count, number, plural, seconds, share
from adasid.tables import BEHAVIOR

Row = dict[str, Any]

_CODES = (
    ("length", "Slots", count),
    ("entropy", "Entropy, nats", lambda v: number(v, 3)),
    ("utilisation", "Codes used", share),
    ("perplexity", "Perplexity", lambda v: number(v, 1)),
    ("collision_items", "Not unique", lambda v: share(v, 2)),
    ("collision_distinct", "(M − distinct)/M", lambda v: share(v, 2)),
    ("largest_group", "Largest group", lambda v: number(v, 0)),
)
_SHARED = (
    ("shared_cosine", "Cosine in a group", lambda v: number(v, 2)),
    ("duplicates_kept", "Near-duplicates together", share),
)
_LONGEST = 1.5
"""Bars are drawn up to here: unexplained variance above 1 says that a probe is worse than the mean."""
_COST = (("seconds", "Training", seconds), ("parameters", "Parameters", count))


def build(name: str, rows: Sequence[Row]) -> Page:
    """Build the page of a comparison. ``rows``: one per cell (tokenizer and seed)."""
    groups, modalities = grouped(rows), _modalities(rows)
    titles = {m: "Behaviour" if m == BEHAVIOR else m.capitalize() for m in modalities}
    readout = [(f"readout_{m}", titles[m], lambda v: number(v, 3)) for m in modalities]
    own = [(f"own_{m}", titles[m], lambda v: number(v, 3)) for m in modalities]
    kinds = [("agreement", "All items", share), ("agreement_tail", "Tail and cold", share)]
    active = [("active_head", "Head items", share), ("active_tail", "Tail items", share)]
    gated = {
        label: group
        for label, group in groups.items()
        if any(row.get(key, 1.0) < 1 for row in group for key, _, _ in active)
    }
    shared = [column for column in _SHARED if any(column[0] in row for row in rows)]
    collided = {
        label: group
        for label, group in groups.items()
        if any("shared_cosine" in row or "duplicates_kept" in row for row in group)
    }
    sections = [
        Section(
            "probes",
            "What the codes say about an item",
            lead="The same linear readout for every method: one vector a code, fitted on four fifths of the items, "
            "measured on the rest. "
            "1 is no better than the mean. Neighbours are the items that share most codes. An inactive slot counts as "
            "empty here; code use and collisions below are of the codes as emitted.",
            plots=[
                Plot(
                    "readout",
                    bars("Unexplained variance, linear readout", groups, [(key, title) for key, title, _ in readout]),
                    "Bars of unexplained variance by method.",
                    "Shorter is better.",
                )
            ]
            + (
                [
                    Plot(
                        "agreement",
                        bars("Share of neighbours of the same category", groups, [(k, t) for k, t, _ in kinds]),
                        "Bars of neighbour agreement by method.",
                        "Longer is better.",
                    )
                ]
                if any("agreement" in row for row in rows)
                else []
            ),
            tables=[
                _table("Unexplained variance, linear readout", groups, readout),
                *(
                    [_table("Neighbours of the same category", groups, kinds)]
                    if any("agreement" in row for row in rows)
                    else []
                ),
                _table("Unexplained variance, the method's own decoder", groups, own),
            ],
        ),
        Section(
            "codes",
            "How the codes use their space",
            lead="The cosine in a group is the mean of the content of items that share a whole SID: low where unlike "
            "items collide. "
            "Near-duplicates are pairs of nearly the same content; together: the share of them with one SID.",
            plots=(
                [
                    Plot(
                        "collisions",
                        bars("Which items share a SID", collided, [(k, t) for k, t, _ in shared]),
                        "Bars of the mean cosine of items that share a SID, and of the share of near-duplicates that "
                        "do, by method.",
                        "Repulsion is meant to part unlike items; AdaSID's spares near-duplicates, QuaSID's parts them "
                        "too.",
                    )
                ]
                if collided
                else []
            )
            + (
                [
                    Plot(
                        "active",
                        bars("Share of behaviour slots that are active", gated, [(k, t) for k, t, _ in active]),
                        "Bars of the share of active behaviour slots, head and tail items, by method.",
                        "Where behaviour is noise, a gate is meant to switch it off: the tail's bar should be the "
                        "shorter one.",
                    )
                ]
                if gated
                else []
            ),
            tables=[
                _table("Codes", groups, _CODES),
                _table("Which items share a SID", groups, shared),
                _table("Active behaviour slots", gated, active),
            ],
        ),
        Section("cost", "Time and size", tables=[_table("Cost", groups, _COST)]),
    ]
    seeds = sorted({len(group) for group in groups.values()})
    said = [
        f"{plural(len(groups), 'tokenizer')} on the same {count(rows[0]['items'])} items; "
        f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} {'seed' if seeds == [1] else 'seeds'} each. "
        "A figure after ± is the standard deviation over seeds."
    ]
    return Page(f"Tokenizers compared: {name}", said, [], [], sections, f"Comparison of run {name}.")


def text(rows: Sequence[Row]) -> str:
    """Return the table for a terminal: one line per method."""
    columns = [
        *[(f"readout_{m}", f"FVU {m}", 3) for m in _modalities(rows)],
        ("entropy", "entropy", 3),
        ("utilisation", "used", 3),
    ]
    columns += [
        ("collision_items", "not unique", 4),
        ("largest_group", "largest", 0),
        ("agreement", "agreement", 3),
        ("agreement_tail", "tail", 3),
    ]
    columns += [("seconds", "seconds", 0)]
    width = 2 + max(len(row["label"]) for row in rows)
    lines = ["", " " * width + "".join(f"{title:>16}" for _, title, _ in columns)]
    for label, group in grouped(rows).items():
        lines.append(
            f"{label:<{width}}"
            + "".join(f"{_spread(group, key, lambda v, d=digits: number(v, d)):>16}" for key, _, digits in columns)
        )
    return "\n".join([*lines, ""])


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the cells by method, in the order of the config."""
    return {
        label: [row for row in rows if row["label"] == label] for label in dict.fromkeys(row["label"] for row in rows)
    }


def _modalities(rows: Sequence[Row]) -> list[str]:
    return list(
        dict.fromkeys(key.removeprefix("readout_") for row in rows for key in row if key.startswith("readout_"))
    )


def _spread(group: Sequence[Row], key: str, show: Any) -> str:
    values = [row[key] for row in group if row.get(key) is not None]
    if not values:
        return DASH
    return str(show(float(np.mean(values)))) + (f" ± {show(float(np.std(values, ddof=1)))}" if len(values) > 1 else "")


def _table(title: str, groups: dict[str, list[Row]], columns: Sequence[tuple[str, str, Any]]) -> Table:
    rows = [(label, *(_spread(group, key, show) for key, _, show in columns)) for label, group in groups.items()]
    return Table(
        title, ("Tokenizer", *(head for _, head, _ in columns)), [row for row in rows if set(row[1:]) != {DASH}]
    )


@style.styled
def bars(title: str, groups: dict[str, list[Row]], columns: Sequence[tuple[str, str]], low: float = 0.0) -> Figure:
    """Draw horizontal bars that start at ``low``: one group per method, one bar per column that the method has;
    whiskers are the range over seeds. A bar above ``_LONGEST`` is cut, with its value beside it."""
    by_label = {
        label: {
            key: values for key, _ in columns if (values := [row[key] for row in group if row.get(key) is not None])
        }
        for label, group in groups.items()
    }
    tops = np.cumsum(
        [0, *(len(metrics) + 1 for metrics in by_label.values())]
    )  # the height of a bar is 1, as is the gap between groups
    figure, (axes,) = style.canvas(title, 0.8 + 0.13 * int(tops[-1]))
    for index, (key, name) in enumerate(columns):
        cells = [
            (top + list(metrics).index(key), metrics[key])
            for top, metrics in zip(tops, by_label.values())
            if key in metrics
        ]
        middle = np.array([np.mean(values) for _, values in cells])
        whiskers = (
            np.array([[m - min(values), max(values) - m] for m, (_, values) in zip(middle, cells)]).reshape(-1, 2).T
        )
        at = [top for top, _ in cells]
        axes.barh(
            at,
            middle,
            1,
            xerr=whiskers,
            label=name,
            color=style.PALETTE[index % len(style.PALETTE)],
            error_kw={"lw": 0.8},
        )
        for top, value in zip(at, middle):
            if value > _LONGEST:
                axes.annotate(f" {value:.3g}", (_LONGEST, top), va="center", fontsize=6, annotation_clip=False)
    axes.set_yticks([top + (len(found) - 1) / 2 for top, found in zip(tops, by_label.values())], list(groups))
    axes.set_xlim(low, None)
    axes.set_xlim(low, min(axes.get_xlim()[1], _LONGEST))
    axes.invert_yaxis()
    if len(columns) > 1 or columns[0][1] not in title:
        style.legend(figure, 3)
    return figure
