"""One look for all figures: narrow single-column pictures that stay readable on a phone, and a palette that colour-blind readers can tell apart.

Figures are plain ``Figure`` objects; nothing touches pyplot's global state.
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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#B5588D", "#56B4E9", "#B8860B"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER)
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
INK, GREY, PALE = "#222222", "#767676", "#D9D9D9"
WIDTH = 4.2  # inches: 9 point text is 10.7 px on a 390 px phone and 15 px in a 520 px column
SMALL = 8

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK, "axes.labelsize": 9,
    "axes.edgecolor": GREY, "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.titlesize": 9, "axes.titlelocation": "left", "grid.color": "#E8E8E8", "grid.linewidth": 0.7, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "lines.linewidth": 1.8, "legend.frameon": False, "legend.fontsize": SMALL, "legend.handlelength": 2.2, "legend.columnspacing": 1.4,
    "figure.facecolor": "white", "figure.titlesize": 10, "figure.titleweight": "bold", "savefig.facecolor": "white",
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under the shared style, whatever the caller's matplotlib settings are."""

    @wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
            return draw(*args, **kwargs)

    return inner


def canvas(title: str, height: float = 3.0, ratios: tuple[float, ...] = (1,)) -> tuple[Figure, list[Axes]]:
    """A figure with its title and one axes a row; rows share the x axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
    figure.suptitle(title, x=0.01, ha="left")
    return figure, list(grid[:, 0])


def legend(figure: Figure, columns: int = 2, axes: Axes | None = None) -> None:
    """The legend of ``axes`` (all axes by default) below the figure, where it can cover no data."""
    handles, labels = (axes or figure.axes[0]).get_legend_handles_labels() if axes or len(figure.axes) == 1 else _all(figure)
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(handles)), borderpad=0.2)


def _all(figure: Figure) -> tuple[list[Any], list[Any]]:
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels())]
    return [handle for handle, _ in pairs], [label for _, label in pairs]


def log(axis: Axis) -> None:
    """A logarithmic axis that names powers of ten in plain figures."""
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")  # type: ignore[attr-defined]
    axis.set_major_locator(LogLocator(10, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axis.set_minor_formatter(NullFormatter())


def power(value: float) -> str:
    """``1000`` -> ``1,000``; ``1e-8`` -> ``10⁻⁸``."""
    if 0.001 <= value < 1e6:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    ten = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ten if mantissa == "1" else f"{mantissa}·{ten}"


def percent(axis: Axis, full: float = 1.0) -> None:
    """Ticks in percent of ``full``."""
    axis.set_major_formatter(PercentFormatter(full, symbol="\N{NARROW NO-BREAK SPACE}%"))


def thousands(axis: Axis, bins: int = 5) -> None:
    """Whole-number ticks with thousands separators."""
    axis.set_major_locator(MaxNLocator(bins, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def png(figure: Figure) -> bytes:
    """The picture, sharp on dense screens; the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        figure.savefig(buffer, format="png", dpi=240, metadata={"Software": None})
    return buffer.getvalue()
