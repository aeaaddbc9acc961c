"""This module defines the page as data, and renders it as one self-contained HTML file. Jinja escapes every value."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from adasid.report import style


@dataclass(frozen=True)
class Plot:
    """A plot is a figure with its file name (no suffix), its alternative text, and one sentence on what to see."""

    name: str
    figure: Figure
    alt: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table has ``rows`` of formatted text: the first ``words`` columns are text, the others figures. ``notes``: one
    small line under each row's first cell."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A section is a part of the page; ``missing`` is the line that replaces it if it has no content."""

    key: str
    title: str
    lead: str = ""
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    missing: str = ""


@dataclass(frozen=True)
class Page:
    """A page is the whole report. ``headline``: (label, value) of the few most important numbers; ``links``: (text,
    address) of further pages."""

    title: str
    summary: list[str]
    warnings: list[str]
    headline: list[tuple[str, str]]
    sections: list[Section]
    footer: str
    links: Sequence[tuple[str, str]] = ()

    def plots(self) -> Iterator[Plot]:
        """Yield every figure in page order."""
        for section in self.sections:
            yield from section.plots


def render(page: Page) -> tuple[str, dict[str, bytes]]:
    """Render the HTML, and the PNG of each figure by file name; the HTML embeds the same bytes."""
    pictures = {plot.name: style.png(plot.figure) for plot in page.plots()}
    encoded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("page.html").render(page=page, pictures=encoded)
    return html, {f"{name}.png": data for name, data in pictures.items()}
