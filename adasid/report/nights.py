"""Build the page of the nightly job: churn, drift and gates over the last generations, and the nightly run that was
refused, if the last one was."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adasid.report import style
from adasid.report.page import Page, Plot, Section, Table
from adasid.report.words import DASH, count, number, plain, share

Row = dict[str, Any]


def build(name: str, generations: Sequence[Row], refused: Row | None, dry: Row | None = None) -> Page:
    """Build the page. ``generations``: the last rows of the table, oldest first, JSON parsed; ``refused``: the row of a
    nightly run that was not published; ``dry``: the row that a dry run would have added."""
    nights = [row for row in generations if row["churn"]]
    live = next((row for row in generations if row["live"]), None)
    warnings = []
    if refused:
        stays = f"Generation {live['generation'] if live else DASH} stays live."
        warnings.append(f"The nightly run of {refused['run_date']} was refused: {_failed(refused)}. {stays}")
    if live and live.get("hold"):
        warnings.append(on_hold(live))
    if dry:
        end = f"gates would refuse it: {failed}" if (failed := _failed(dry)) else "all gates passed"
        warnings.append(f"Dry run of {dry['run_date']}, policy {dry['policy']}: nothing was published; {end}.")
    if live and live["drift"].get("asked"):
        warnings.append(
            f"Generation {live['generation']} is frozen though its drift asked for {live['drift']['asked']}, whose "
            "table failed a gate: look at its run "
            "in MLflow, then raise retokenize.gates for it, or train a new tokenizer."
        )
    shown = []
    if nights:
        shown = [
            Plot(
                "churn",
                churn(nights),
                "Share of items whose SID changed, by generation.",
                "Readers of the table see these changes.",
            ),
            Plot(
                "shared",
                shared(generations),
                "Share of items whose SID is not unique, by generation.",
                "The second line counts tail and cold items only.",
            ),
        ]
    errors = [row for row in generations if row["drift"].get("error_ratio")]
    drifts = (
        [
            Plot(
                "error",
                ratios(errors),
                "Quantization error by modality and generation.",
                "At 1 the error is that on the tokenizer's training data.",
            )
        ]
        if errors
        else []
    )
    used = [row for row in generations if row["drift"].get("usage")]
    if used:
        drifts.append(
            Plot(
                "usage",
                usage(used),
                "Divergence of the use of codes by generation.",
                "How differently codes are used than a generation before.",
            )
        )
    changed, missing = _changes(generations, dry), "" if generations else "Nothing published yet."
    sections = [
        Section("changes", "What changed", plots=shown, tables=[changed], missing=missing),
        Section(
            "drift",
            "How far items have moved",
            plots=drifts,
            tables=[_drift(errors)] if errors else [],
            missing="" if drifts else "No nightly run yet.",
        ),
        Section(
            "gates",
            "What each generation had to satisfy",
            plots=[
                Plot(
                    "gates",
                    gates(generations, refused),
                    "How much of what each gate allows was used, by generation; the refused run comes last."
                    if refused
                    else "How much of what each gate allows was used, by generation.",
                    "Above 100 % the run is refused.",
                )
            ]
            if generations
            else [],
            tables=[_gates(generations, refused, dry)] if generations else [],
            missing="",
        ),
    ]
    if refused:
        worst = [(kind, ", ".join(items)) for kind, items in refused["worst"].items() if items]
        sections.append(
            Section(
                "refused",
                "The items that a refused run moved most",
                tables=[Table("Worst items", ("Kind", "Items"), worst, words=2)],
            )
        )
    headline = (
        [("Live generation", count(live["generation"])), ("Items", count(live["items"])), ("Policy", live["policy"])]
        if live
        else []
    )
    said = [f"The last {len(generations)} generations of {name}."] if generations else ["Nothing is published yet."]
    return Page(f"Nightly runs of {name}", said, warnings, headline, sections, f"Nightly job of run {name}.")


@style.styled
def churn(nights: Sequence[Row]) -> Figure:
    """Plot the churn of each generation: of items, and weighted by events."""
    figure, (axes,) = style.canvas("Items whose SID changed", 2.6)
    for index, (key, label) in enumerate((("churn", "Of items"), ("weighted", "Weighted by events"))):
        _line(axes, [row["generation"] for row in nights], [row["churn"][key] for row in nights], label, index)
    axes.set_ylim(0, None)
    style.percent(axes.yaxis)
    style.thousands(axes.xaxis)
    axes.set_xlabel("Generation")
    style.legend(figure)
    return figure


@style.styled
def shared(generations: Sequence[Row]) -> Figure:
    """Plot the share of items that share their SID with another: of all items, and of the tail and cold items."""
    figure, (axes,) = style.canvas("Items whose SID is not unique", 2.6)
    for index, (key, label) in enumerate(
        (("collision_items", "Of all items"), ("collision_tail", "Of tail and cold items"))
    ):
        _line(
            axes,
            [row["generation"] for row in generations],
            [row["metrics"].get(key, np.nan) for row in generations],
            label,
            index,
        )
    axes.set_ylim(0, None)
    style.percent(axes.yaxis)
    style.thousands(axes.xaxis)
    axes.set_xlabel("Generation")
    style.legend(figure)
    return figure


@style.styled
def ratios(nights: Sequence[Row]) -> Figure:
    """Plot the quantization error relative to that on the tokenizer's training data, and the stability index of the
    norms, by modality."""
    figure, axes = style.canvas("Drift of the items", 3.8, (1, 1))
    modalities = list(dict.fromkeys(m for row in nights for m in row["drift"]["error_ratio"]))
    for index, m in enumerate(modalities):
        at = [row["generation"] for row in nights]
        _line(
            axes[0],
            at,
            [row["drift"]["error_ratio"].get(m, {}).get("all", np.nan) for row in nights],
            m.capitalize(),
            index,
        )
        _line(axes[1], at, [row["drift"]["norms"].get(m, np.nan) for row in nights], "", index)
    axes[0].axhline(1, color=style.GREY, lw=0.8)
    axes[0].set_ylabel("Error, ratio")
    axes[1].set_ylabel("Norms, index")
    axes[1].set_ylim(0, None)
    axes[1].set_xlabel("Generation")
    style.thousands(axes[1].xaxis)
    style.legend(figure, 3, axes[0])
    return figure


@style.styled
def usage(nights: Sequence[Row]) -> Figure:
    """Plot the Jensen-Shannon divergence of each slot's codes from the previous generation."""
    figure, (axes,) = style.canvas("Use of codes against the generation before", 2.6)
    for index, slot in enumerate(nights[-1]["drift"]["usage"]):
        _line(
            axes,
            [row["generation"] for row in nights],
            [row["drift"]["usage"].get(slot, np.nan) for row in nights],
            slot,
            index,
        )
    axes.set_ylim(0, None)
    axes.set_ylabel("Divergence, bits")
    axes.set_xlabel("Generation")
    style.thousands(axes.xaxis)
    style.legend(figure, 6)
    return figure


@style.styled
def gates(generations: Sequence[Row], refused: Row | None) -> Figure:
    """Plot each gate (rows) in each generation (columns): the used share of its allowance; white where the generation
    had no such gate."""
    nights = [*generations, *([refused] if refused else [])]
    names = list(dict.fromkeys(gate["gate"] for row in reversed(nights) for gate in row["gates"]))
    used = np.full((len(names), len(nights)), np.nan)
    for column, row in enumerate(nights):
        for gate in row["gates"]:
            used[names.index(gate["gate"]), column] = allowance(gate)
    figure, (axes,) = style.canvas("Share of each gate's allowance that was used", 0.9 + 0.2 * len(names))
    shades = axes.imshow(used, aspect="auto", cmap="YlOrRd", vmin=0, vmax=1.25, interpolation="nearest")
    for place, column in np.argwhere(used > 1):
        axes.text(column, place, "×", ha="center", va="center", fontsize=style.SMALL)
    axes.grid(False)
    axes.set_yticks(range(len(names)), [name[:1].upper() + name[1:] for name in names], fontsize=style.SMALL - 1.5)
    places = np.unique(np.linspace(0, len(nights) - 1, min(5, len(nights))).round().astype(int))
    axes.set_xticks(
        places,
        [str(nights[place].get("generation", "")) if place < len(generations) else "refused" for place in places],
    )
    axes.set_xlabel("Generation")
    bar = figure.colorbar(shades, ax=axes, location="bottom", shrink=0.6, aspect=30)
    style.percent(bar.ax.xaxis)
    return figure


def allowance(gate: Mapping[str, Any]) -> float:
    """Return the share of a gate's allowance that a nightly run used, from 0 to 1.25, above 1 if the gate failed: the
    value over the threshold, or the reverse if the threshold is a minimum. A gate without allowance (a maximum of 0, a
    minimum of 1) is at 0 or 1.25; one without a value, which was not measured, is NaN."""
    if gate["value"] is None:
        return math.nan
    value, threshold, passed = float(gate["value"]), float(gate["threshold"]), gate["passed"]
    if not threshold or (passed and value == threshold == 1):
        return 0.0 if passed else 1.25
    part = value / threshold
    if value and (part > 1) == passed:
        part = threshold / value
    return min(part, 1.0) if passed else min(max(part, 1.01), 1.25)


def on_hold(live: Mapping[str, Any]) -> str:
    """Return a sentence on the hold of the live generation."""
    until = "nothing is published until jobs/rollback.py --release"
    return f"Generation {live['generation']} is on hold since {live['hold']}: {until}."


def _failed(row: Row) -> str:
    """Return the gates that failed, in words."""
    failed = (gate for gate in row["gates"] if not gate["passed"])
    return "; ".join(f"{g['gate']} is {number(g['value'], 3)}, allowed {number(g['threshold'], 3)}" for g in failed)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, place: int) -> None:
    colour, dash = style.PALETTE[place % len(style.PALETTE)], style.DASHES[place % len(style.DASHES)]
    axes.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=2.5, label=label or None)


def _changes(generations: Sequence[Row], dry: Row | None) -> Table:
    columns = ("Generation", "Run date", "Policy", "Items", "New", "Changed", "Removed", "Churn", "Weighted", "Tail")
    rows = []
    for row in [*([{**dry, "live": False}] if dry else []), *reversed(generations)]:
        c: Mapping[str, Any] = row["churn"]
        numbers = [count(c.get(key)) for key in ("new", "changed", "removed")] + [
            share(c.get(key), 2) for key in ("churn", "weighted")
        ]
        name = "dry run" if dry and row["generation"] == dry["generation"] else str(row["generation"])
        name += " (live, on hold)" if row.get("hold") else " (live)" if row["live"] else ""
        rows.append(
            (
                name,
                row["run_date"] or DASH,
                row["policy"],
                count(row["items"]),
                *numbers,
                share(c.get("by_stratum", {}).get("tail"), 2),
            )
        )
    return Table("Generations", columns, rows, words=3)


def _drift(nights: Sequence[Row]) -> Table:
    modalities = list(nights[-1]["drift"]["error_ratio"])
    columns = (
        "Generation",
        *(f"Error, {m}" for m in modalities),
        *(f"Norms, {m}" for m in modalities),
        "Cold",
        "Spearman",
    )
    rows = []
    for row in reversed(nights):
        d = row["drift"]
        errors = [number(d["error_ratio"].get(m, {}).get("all"), 3) for m in modalities]
        norms = [number(d["norms"].get(m), 3) for m in modalities]
        rows.append((str(row["generation"]), *errors, *norms, share(d["cold"], 1), number(d["spearman"], 2)))
    return Table("Drift", columns, rows)


def _gates(generations: Sequence[Row], refused: Row | None, dry: Row | None) -> Table:
    """Tabulate the gates of the newest generation, of the refused nightly run and of a dry run, with their
    thresholds."""
    rows = []
    for name, row in (("published", generations[-1]), ("refused", refused), ("dry run", dry)):
        for gate in row["gates"] if row else ():
            what = f"{gate['gate']}, of {gate['of']}" if "of" in gate else gate["gate"]
            failed = f"overruled by {gate['overruled']}" if "overruled" in gate else "FAILED"
            result = "passed" if gate["passed"] else failed
            rows.append((name, what, plain(gate["value"]), plain(gate["threshold"]), result))
    return Table("Gates", ("Nightly run", "Gate", "Value", "Threshold", "Result"), rows, words=2)
