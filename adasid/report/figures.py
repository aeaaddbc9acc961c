"""Draw every figure of the report: plain numbers in, a matplotlib ``Figure`` out, with one style
(:mod:`adasid.report.style`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from adasid.report import style, words
from adasid.report.style import (
    AMBER,
    BLUE,
    DASHES,
    GREY,
    INK,
    ORANGE,
    PALE,
    PALETTE,
    SKY,
    SMALL,
    canvas,
    legend,
    log,
    percent,
    styled,
    thousands,
)

Array = npt.NDArray[np.float64]
Row = Mapping[str, Any]

PAPERS = ((10.0, 9.0), (20.0, 7.0), (20.0, 9.0), (20.0, 14.0))
"""(alpha, beta) of the alignment controller in the papers' settings (first) and in their ablation."""


def column(points: Iterable[Row], key: str) -> Array:
    """Return one field of a list of structs."""
    return np.array([point[key] for point in points], dtype=np.float64)


def alignment_weight(richness: Array, alpha: float, beta: float) -> Array:
    """Compute sigma(alpha x - beta) / sigma(alpha - beta): 1 for the richest item."""
    return np.asarray((1 + np.exp(beta - alpha)) / (1 + np.exp(beta - alpha * richness)))


def sample(quantiles: Sequence[Row], size: int = 2000) -> Array:
    """Return values spread over a distribution that is known by its quantiles (x in percent)."""
    return np.interp((np.arange(size) + 0.5) * 100 / size, column(quantiles, "x"), column(quantiles, "y"))


@styled
def popularity(points: Sequence[Row], head: int | None = None) -> Figure:
    """Plot training events of an item over its rank; items without events are omitted because of the log axis.
    ``head``: number of head items."""
    figure, (axes,) = canvas("Popularity of items")
    rank, events = column(points, "x"), column(points, "y")
    if head:
        axes.axvspan(0.9, head + 0.5, color=PALE, alpha=0.45, lw=0)
        axes.text(
            0.03, 0.05, f"head: top {words.plural(head, 'item')}", transform=axes.transAxes, color=INK, fontsize=SMALL
        )
    axes.plot(rank[events > 0], events[events > 0], color=BLUE)
    log(axes.xaxis)
    log(axes.yaxis)
    axes.set(
        xlim=(0.9, rank.max(initial=1) * 1.15),
        ylim=(0.8, None),
        xlabel="rank of the item (1 = most events)",
        ylabel="training events",
    )
    return figure


@styled
def lorenz(points: Sequence[Row], gini: float) -> Figure:
    """Plot the share of events on the least popular share of items, against equal popularity."""
    figure, (axes,) = canvas("Concentration (Lorenz curve)")
    items, events = column(points, "x"), column(points, "y")
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=DASHES[1])
    axes.fill_between(items, events, items, color=BLUE, alpha=0.12, lw=0)
    axes.plot(items, events, color=BLUE)
    axes.text(0.05, 0.9, f"Gini {words.number(gini, 2)}", transform=axes.transAxes, fontweight="bold", va="top")
    axes.text(0.05, 0.8, "dashed: all items equal", transform=axes.transAxes, fontsize=SMALL, color=GREY, va="top")
    axes.set(
        xlim=(0, 1), ylim=(0, 1.01), xlabel="share of items, least popular first", ylabel="share of training events"
    )
    percent(axes.xaxis)
    percent(axes.yaxis)
    return figure


@styled
def norm_by_count(spread: Sequence[Row], spearman: float | None) -> Figure:
    """Plot median and 10-90 % band of the behaviour norm within bins of the count."""
    figure, (axes,) = canvas("Behaviour norm over popularity")
    x = column(spread, "x")
    axes.fill_between(
        x, column(spread, "p10"), column(spread, "p90"), color=BLUE, alpha=0.18, lw=0, label="10th to 90th percentile"
    )
    axes.plot(x, column(spread, "p50"), color=BLUE, marker="o", ms=3.5, label="median")
    log(axes.xaxis)
    axes.set(xlabel="training events of the item", ylabel="norm of the embedding (L2)")
    axes.set_title(f"Spearman(norm, count) {words.number(spearman, 2)}", fontsize=SMALL)
    legend(figure)
    return figure


@styled
def alignment(controller: tuple[float, float] | None, quantiles: Sequence[Row], flat: bool = False) -> Figure:
    """Plot the alignment weight over richness, beside the papers' settings, above the distribution of richness.

    ``controller``: (alpha, beta) of this run, None while unknown; ``flat``: the controller is off and every weight is
    1."""
    figure, (above, below) = canvas("Alignment weight over richness", 4.1, (2.2, 1))
    x = np.linspace(0, 1, 401)
    if flat:
        above.plot(x, np.ones_like(x), color=BLUE, lw=2.4, label="this run: off, weight 1")
    elif controller:
        alpha, beta = controller
        above.plot(
            x, alignment_weight(x, alpha, beta), color=BLUE, lw=2.4, label=f"this run: α {alpha:g}, β {beta:.3g}"
        )
    for (alpha, beta), dashes, colour in zip(PAPERS, DASHES[1:], (ORANGE, GREY, AMBER, INK)):
        above.plot(
            x,
            alignment_weight(x, alpha, beta),
            color=colour,
            lw=1.2,
            ls=dashes,
            label=f"papers: α {alpha:g}, β {beta:g}",
        )
    above.set(ylabel="alignment weight w", ylim=(-0.02, 1.04), xlim=(0, 1))
    weights, edges = np.histogram(np.clip(sample(quantiles), 0, 1), bins=40, range=(0, 1))
    below.bar(
        edges[:-1],
        weights / weights.sum(),
        width=np.diff(edges),
        align="edge",
        color=SKY,
        edgecolor="white",
        linewidth=0.4,
    )
    below.set(xlabel="richness of an item (0 = least known)", ylabel="items")
    percent(below.yaxis)
    legend(figure, 2, above)
    return figure


@styled
def by_stratum(
    values: Mapping[str, Sequence[float]], slots: Sequence[str], title: str, label: str, shares: bool = False
) -> Figure:
    """Draw grouped bars: one group per stratum, one bar per behaviour slot."""
    figure, (axes,) = canvas(title)
    width = 0.8 / max(1, len(slots))
    for index, slot in enumerate(slots):
        left = np.arange(len(values)) + (index - (len(slots) - 1) / 2) * width
        axes.bar(
            left, [row[index] for row in values.values()], width * 0.92, color=PALETTE[index % len(PALETTE)], label=slot
        )
    axes.set_xticks(range(len(values)), list(values))
    axes.set(xlabel="stratum of items by popularity", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    if shares:
        axes.set_ylim(0, 1)
        percent(axes.yaxis)
    legend(figure, 6)
    return figure


@styled
def active_counts(values: Mapping[str, Sequence[float]]) -> Figure:
    """Draw stacked bars: share of the items of a stratum with 0, 1, ... active behaviour slots."""
    figure, (axes,) = canvas("Active behaviour slots of an item")
    columns = max(map(len, values.values()))
    shades = ["#E3E3E3", *(_mix(BLUE, 0.25 + 0.75 * index / max(1, columns - 1)) for index in range(1, columns))]
    places, left = np.arange(len(values)), np.zeros(len(values))
    for number in range(columns):
        widths = np.array([row[number] if number < len(row) else 0.0 for row in values.values()])
        axes.barh(
            places,
            widths,
            left=left,
            height=0.68,
            color=shades[number],
            edgecolor="white",
            linewidth=0.8,
            label=str(number),
        )
        left += widths
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of items, by number of active slots", ylabel="stratum")
    axes.grid(axis="y", visible=False)
    percent(axes.xaxis)
    legend(figure, 8)
    return figure


def _mix(colour: str, share: float) -> tuple[float, ...]:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return tuple(1 - share * (1 - rgb))


@styled
def usage(
    slots: Sequence[str],
    codes: Sequence[Sequence[int]],
    utilisation: Sequence[float],
    entropy: Sequence[float | None],
) -> Figure:
    """Draw small multiples: items of each code, largest first, one panel per slot; the dashed line is uniform use."""
    rows = math.ceil(len(slots) / 2)
    figure = Figure(figsize=(style.WIDTH, 0.7 + 1.15 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False, sharex=True)
    figure.suptitle("Use of the codes in each codebook", x=0.01, ha="left")
    for axes, slot, counts, used, nats in zip(grid.flat, slots, codes, utilisation, entropy):
        ordered = np.sort(np.asarray(counts, dtype=np.float64))[::-1]
        axes.fill_between(np.arange(1, len(ordered) + 1), ordered, step="mid", color=BLUE, alpha=0.85, lw=0)
        axes.axhline(ordered.mean() if len(ordered) else 0, color=ORANGE, lw=1.1, ls=DASHES[1])
        axes.set_ylim(0, 1.45 * max(1.0, ordered.max(initial=0)))
        thousands(axes.yaxis, 3)
        cap = math.log(max(2, len(ordered)))
        axes.set_title(slot, fontweight="bold", pad=3)
        axes.text(
            0.98,
            0.97,
            f"{words.share(used)} used\n{words.number(nats, 2)} of {cap:.2f} nats",
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=SMALL,
        )
    for spare in list(grid.flat)[len(slots) :]:
        spare.set_visible(False)
    figure.supxlabel("codes, most used first", fontsize=9)
    figure.supylabel("items with the code", fontsize=9)
    return figure


@styled
def groups(sizes: Sequence[Sequence[int]], by_distinct: float, by_items: float, largest: int) -> Figure:
    """Plot the number of SIDs that 1, 2, 3, ... items have."""
    figure, (axes,) = canvas("Items that share one semantic ID")
    table = np.array(sizes, dtype=np.float64).reshape(-1, 2)
    top = table[:, 0].max(initial=1)
    axes.bar(table[:, 0], table[:, 1], width=0.7, color=BLUE, edgecolor=BLUE, linewidth=0.7)
    log(axes.xaxis)
    log(axes.yaxis)
    axes.set(xlim=(0.6, max(3.0, 1.3 * top)), ylim=(0.5, 3 * table[:, 1].max(initial=1)))
    axes.set(xlabel="items in the group (1 = unique ID)", ylabel="number of groups")
    text = (
        f"items with a shared ID {words.share(by_items)}\n(M − distinct) / M {words.share(by_distinct)}\nlargest "
        f"group {words.plural(largest, 'item')}"
    )
    axes.text(
        0.98,
        0.98,
        text,
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=SMALL,
        linespacing=1.4,
        bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 2},
    )
    return figure
