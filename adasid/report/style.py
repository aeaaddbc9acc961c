"""This module defines one style for all figures: narrow single-column pictures that stay readable on a phone, and a
palette that colour-blind readers can tell apart.

Figures are plain ``Figure`` objects; pyplot's global state is never used.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#B5588D", "#56B4E9", "#B8860B"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER)
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
INK, GREY, PALE = "#222222", "#767676", "#D9D9D9"
WIDTH = 4.2  # inches: 9 point text is 10.7 px on a 390 px phone and 15 px in a 520 px column
SMALL = 8

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "figure.facecolor": "white",
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "savefig.facecolor": "white",
}

LOOK: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")} | STYLE

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under the shared style, whatever the caller's matplotlib settings are."""

    @wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(LOOK):
            return draw(*args, **kwargs)

    return inner


def canvas(title: str, height: float = 3.0, ratios: tuple[float, ...] = (1,)) -> tuple[Figure, list[Axes]]:
    """Return a figure with its title and one axes per row; rows share the x axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
    figure.suptitle(title, x=0.01, ha="left")
    return figure, list(grid[:, 0])


def legend(figure: Figure, columns: int = 2, axes: Axes | None = None) -> None:
    """Draw the legend of ``axes`` (default: all axes) below the figure, where it cannot cover data."""
    pairs = [pair for part in ([axes] if axes else figure.axes) for pair in zip(*part.get_legend_handles_labels())]
    if pairs:
        handles, labels = zip(*pairs)
        figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(pairs)), borderpad=0.2)


def log(axis: Axis) -> None:
    """Make the axis of the current plot logarithmic, with ticks in plain figures: powers of ten, with 2 and 5 between
    them if the range is short."""
    steps = (1.0, 2.0, 5.0) if max(axis.get_data_interval()) < 100 * axis.get_minpos() else (1.0,)
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")  # type: ignore[attr-defined]
    axis.set_major_locator(LogLocator(10, steps, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axis.set_minor_formatter(NullFormatter())


def power(value: float) -> str:
    """Format a power of ten: ``1000`` -> ``1,000``; ``1e-8`` -> ``10⁻⁸``."""
    if 0.001 <= value < 1e7:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    ten = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ten if mantissa == "1" else f"{mantissa}·{ten}"


def percent(axis: Axis) -> None:
    """Show the ticks of a share in percent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}\N{NARROW NO-BREAK SPACE}%"))


def thousands(axis: Axis, bins: int = 5) -> None:
    """Show whole-number ticks with thousands separators."""
    axis.set_major_locator(MaxNLocator(bins, integer=True))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value - round(value)) < 1e-6 else "")
    )


def png(figure: Figure) -> bytes:
    """Render the figure as PNG, sharp on dense screens; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(LOOK):
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()
