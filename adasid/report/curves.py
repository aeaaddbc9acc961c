"""Draw the curves of training over epochs: rows of metrics in, a matplotlib ``Figure`` out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adasid.report.figures import Array, Row
from adasid.report.style import BLUE, DASHES, INK, ORANGE, PALETTE, canvas, legend, log, percent, styled, thousands


def series(rows: Iterable[Row], key: str) -> tuple[Array, Array]:
    """Return epochs and values of one metric, skipping rows that lack it; a list of values (one per slot) is averaged.
    If a resumed training logged an epoch twice, the later row counts."""
    values: dict[float, float] = {}
    for row in rows:
        epoch, value = row.get("epoch"), row.get(key)
        value = float(np.mean(value)) if isinstance(value, list) and value else value
        if isinstance(epoch, (int, float)) and isinstance(value, (int, float)) and math.isfinite(value):
            values[float(epoch)] = float(value)
    table = np.array(sorted(values.items()), dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@styled
def recall(rows: Sequence[Row], best: int | None, early: int | None) -> Figure:
    """Plot Recall@10 of the next item on validation and test users by epoch."""
    figure, (axes,) = canvas("Behaviour model: recall@10")
    for part, colour, dashes in (("validation", BLUE, DASHES[0]), ("test", ORANGE, DASHES[1])):
        x, y = series(rows, f"{part}_recall@10")
        if len(x):
            axes.plot(x, y, color=colour, ls=dashes, marker="o", ms=3, label=part)
    _epochs(axes, {"best": best, "early": early})
    axes.set_ylabel("recall@10, full catalogue")
    axes.set_ylim(bottom=0)
    percent(axes.yaxis)
    legend(figure)
    return figure


@styled
def spearman(rows: Sequence[Row], best: int | None, early: int | None, threshold: float | None = None) -> Figure:
    """Plot the rank correlation of embedding norm and count by epoch; below ``threshold`` the norm is not used."""
    figure, (axes,) = canvas("Behaviour model: norm as a measure of richness")
    axes.plot(*series(rows, "spearman"), color=BLUE, marker="o", ms=3, label="Spearman(norm, count)")
    if threshold is not None:
        axes.axhline(threshold, color=ORANGE, lw=1.1, label=f"least accepted ({threshold:g})")
    _epochs(axes, {"best": best, "early": early})
    axes.set_ylabel("Spearman(norm, count)")
    legend(figure)
    return figure


def _epochs(axes: Axes, marks: Mapping[str, int | None]) -> None:
    axes.set_xlabel("epoch")
    thousands(axes.xaxis, 6)
    for (name, epoch), dashes in zip(marks.items(), (DASHES[1], DASHES[2])):
        if epoch is not None:
            axes.axvline(epoch, color=INK, lw=1.1, ls=dashes, label=f"{name} (epoch {epoch})")


def _lines(axes: Axes, rows: Sequence[Row], names: Mapping[str, str], positive: bool = False) -> None:
    """Draw one line per metric that has values, each with its own colour and dashes."""
    for (key, label), colour, dashes in zip(names.items(), PALETTE * 2, DASHES * 2):
        x, y = series(rows, key)
        keep = y > 0 if positive else np.isfinite(y)
        if keep.any():
            axes.plot(x[keep], y[keep], color=colour, ls=dashes, label=label, marker="o" if keep.sum() == 1 else None)
    _epochs(axes, {})


@styled
def losses(rows: Sequence[Row]) -> Figure:
    """Plot the total loss and its parts, on a log axis if they differ much; a part that stays below a thousandth of the
    largest value is omitted."""
    figure, (axes,) = canvas("Tokenizer: losses")
    parts = (
        "reconstruction",
        "codebook",
        "alignment",
        "routing",
        "repulsion",
        "contrast",
        "collaborative",
        "diversity",
    )
    names = {"loss": "total", **{part: part for part in parts}}
    tops = {key: series(rows, key)[1].max(initial=0) for key in names}
    floor = max(tops.values()) / 1000
    _lines(axes, rows, {key: label for key, label in names.items() if tops[key] > floor}, positive=True)
    if max(axes.yaxis.get_data_interval()) > 5 * axes.yaxis.get_minpos():
        log(axes.yaxis)
        axes.set_ylim(bottom=max(floor, axes.get_ylim()[0]))
    axes.set_ylabel("loss")
    legend(figure)
    return figure


@styled
def unexplained(rows: Sequence[Row]) -> Figure:
    """Plot the share of each modality's variance that reconstruction from codes leaves unexplained (FVU)."""
    figure, (axes,) = canvas("Tokenizer: unexplained variance (FVU)")
    modalities = dict.fromkeys(key.removeprefix("fvu_") for row in rows for key in row if key.startswith("fvu_"))
    _lines(axes, rows, {f"fvu_{name}": name for name in modalities})
    axes.set_ylabel("unexplained share (FVU)")
    axes.set_ylim(bottom=0)
    legend(figure, 3)
    return figure


@styled
def sparsity(rows: Sequence[Row]) -> Figure:
    """Plot the share of inactive behaviour slots and its target, above the sparsity weight."""
    figure, (above, below) = canvas("Tokenizer: sparsity of the router", 3.6, (1.5, 1))
    _lines(above, rows, {"sparsity": "inactive slots", "sparsity_target": "target"})
    above.set(ylabel="inactive slots", xlabel="")
    above.set_ylim(bottom=0)
    percent(above.yaxis)
    _lines(below, rows, {"lambda": "weight λ"}, positive=True)
    log(below.yaxis)
    below.set_ylabel("weight λ")
    legend(figure, 2, above)
    return figure


@styled
def code_use(rows: Sequence[Row], size: int | None) -> Figure:
    """Plot the share of codes in use, above the entropy of code use with its maximum ln K."""
    figure, (above, below) = canvas("Tokenizer: use of the codebooks", 3.6, (1, 1))
    _lines(above, rows, {"utilisation": "codes in use"})
    above.set(ylabel="codes in use", xlabel="", ylim=(0, 1.04))
    percent(above.yaxis)
    _lines(below, rows, {"entropy": "mean entropy"})
    if size:
        below.axhline(
            math.log(size), color=ORANGE, lw=1.1, ls=DASHES[1], label=f"cap ln {size} = {math.log(size):.2f} nats"
        )
    below.set_ylabel("entropy (nats)")
    below.set_ylim(bottom=0)
    legend(figure, 2, below)
    return figure
