"""Write what the documents derive from the code: `make docs`.

Parts of ``docs/architecture.md`` and ``docs/configuration.md``, between the lines that name this script, and the
picture ``docs/dataflow.svg``. A test compares the files with what this script makes.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

from adasid import config
from adasid.config.reference import render_reference
from adasid.files import write_json
from adasid.tokenizers import artifact
from pipelines import chain, sids
from pipelines.engines.lake import Lake
from pipelines.stage import Stage
from pipelines.training import downstream
from pipelines.training.payload import Catalogue

ROOT = Path(__file__).resolve().parents[1]
JOBS = {
    "ingest": "ingest",
    "content": "encode_content",
    "features": "build_features",
    "item pairs": "build_features",
    "behavior": "train --stage behavior",
    "item features": "build_features",
    "tokenizer": "train --stage tokenizer",
    "sids": "write_sids",
    "report": "report",
    "retrieval": "train --stage retrieval",
    "ranking": "train --stage ranking",
}
"""Stage -> the job that runs it, without ``jobs/`` and ``.py``."""

ALSO = {
    "report": "aggregates, the live generation and its items",
    "item features": "aggregates, `truth`",
}
"""What stages read without a hash, where the list of tables is long."""

SOURCES = {"ingest": "the source", "report": "see the third table"}
"""What stages read that declare no table for it."""

ALL = {"tokenizer": {"name": "das"}, "content": {"encoders": {"text": {"fields": ["title"]}}}}
"""A config that needs every table: it learns from pairs, encodes text, and its synthetic source has a truth."""

FEW = {
    "source": {"kind": "tables", "tables": {"items": "items", "interactions": "interactions"}},
    "behavior": {"source": "column"},
}
"""A config that needs few tables: items bring their behaviour vectors."""


class Row(NamedTuple):
    """A stage as it is declared. ``extra``: what it reads and writes under some configs only; ``uses`` and ``makes``:
    artifacts; ``settings``: names of what is hashed besides tables."""

    name: str
    engine: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    appends: tuple[str, ...]
    also: tuple[str, ...]
    uses: tuple[str, ...]
    makes: tuple[str, ...]
    settings: tuple[str, ...]
    extra: frozenset[str]


def rows() -> list[Row]:
    """Every declared stage, in the order in which they run."""
    few = {stage.name: stage for stage in declared(FEW)}
    cfg, least, lake = config.build(ALL), config.build(FEW), Lake("/nonexistent", {})
    result = []
    for stage in declared(ALL):
        other = few.get(stage.name)
        needed = {*other.reads(least), *other.writes(least)} if other else set()
        everything = {*stage.reads(cfg), *stage.writes(cfg)}
        result.append(
            Row(
                stage.name,
                stage.engine,
                stage.reads(cfg),
                stage.writes(cfg),
                stage.appends,
                stage.also,
                stage.uses,
                stage.makes,
                settings(stage, cfg, lake),
                frozenset(everything - needed) if other else frozenset(),
            )
        )
    return result


def declared(values: Mapping[str, object]) -> list[Stage]:
    """The stages of the chain under a config, and the downstream models."""
    cfg, lake = config.build(values), Lake("/nonexistent", {})
    stages = [stage for stage in chain.declared(cfg, lake) if isinstance(stage, Stage)]
    catalogue = Catalogue(table="sids", version=0, slots=())
    return [*stages, downstream.declare("retrieval", catalogue), downstream.declare("ranking", catalogue)]


def settings(stage: Stage, cfg: config.Config, lake: Lake) -> tuple[str, ...]:
    """Names of the settings that a stage hashes. The stage of SIDs reads a manifest for that, so it is given one."""
    with tempfile.TemporaryDirectory() as folder:
        empty = {"slots": [], "widths": {}, "parameters": 0, "config": {}, "digest": ""}
        write_json(Path(folder) / "manifest.json", {"format": artifact.FORMAT, "tokenizer": "", **empty})
        known = cfg.model_copy(update={"sids": cfg.sids.model_copy(update={"artifact": folder})})
        chosen = sids.declare(known) if stage.name == "sids" else stage
        return tuple(name for name in chosen.settings(known, lake) if name not in stage.unhashed)


def tables(stages: list[Row]) -> str:
    """Three tables in Markdown: what stages read, what they write, and which settings count."""
    lines = ["| stage | engine | job | reads |", "|---|---|---|---|"]
    for row in stages:
        read = [*named(row.reads, row.extra), *(f"artifact {name}" for name in row.uses)]
        lines.append(f"| {row.name} | {row.engine} | `{JOBS[row.name]}` | {', '.join(read) or SOURCES[row.name]} |")
    lines += ["", "| stage | writes |", "|---|---|"]
    for row in stages:
        written = [*named(row.writes, row.extra), *(f"artifact {name}" for name in row.makes)]
        written += [f"rows of {name}" for name in named(row.appends, frozenset())]
        lines.append(f"| {row.name} | {', '.join(written) or '`report/`'} |")
    lines += ["", "| stage | settings that count | reads where it exists, not hashed |", "|---|---|---|"]
    for row in stages:
        lines.append(
            f"| {row.name} | {ticked(row.settings) or 'always runs'} | {ALSO.get(row.name) or ticked(row.also)} |"
        )
    return "\n".join(lines)


def named(names: tuple[str, ...], extra: frozenset[str]) -> list[str]:
    """Names as code; in parentheses where only some configs need them."""
    return [f"(`{name}`)" if name in extra else f"`{name}`" for name in names]


def ticked(names: tuple[str, ...]) -> str:
    """Names as code, in one text."""
    return ", ".join(f"`{name}`" for name in names)


def mermaid(stages: list[Row]) -> str:
    """The graph of stages and tables in Mermaid. Boxes are stages, rounded boxes are tables and artifacts."""

    def node(name: str) -> str:
        return name.replace(" ", "_")

    lines = ["```mermaid", "graph TD"]
    for row in stages:
        lines.append(f'    {node(row.name)}_stage["{row.name} ({row.engine})"]')
        lines += [
            f'    {node(name)}_table(["{name}"])' for name in (*row.writes, *(f"artifact {made}" for made in row.makes))
        ]
    for row in stages:
        stage = f"{node(row.name)}_stage"
        written = (*row.writes, *(f"artifact {name}" for name in row.makes))
        read = (*row.reads, *(f"artifact {name}" for name in row.uses))
        lines += [f"    {node(name)}_table --> {stage}" for name in read]
        lines += [f"    {node(name)}_table -.-> {stage}" for name in row.also]
        lines += [f"    {stage} --> {node(name)}_table" for name in written]
    return "\n".join([*lines, "```"])


LEFT, TOP, PITCH, HEIGHT, BOX = 168, 64, 122, 62, 148
"""Pixels: where the columns begin, where the rows begin, width of a column, height of a row, width of a stage."""
COLOURS = {"spark": "#c75a00", "ray": "#1f5fa8", "python": "#555555"}


def svg(stages: list[Row]) -> str:
    """The picture of the data flow: a row a stage; its tables as boxes; a line from each down to the stages that read
    it."""
    made = [(*row.writes, *(f"{name} artifact" for name in row.makes)) for row in stages]
    read = [(*row.reads, *(f"{name} artifact" for name in row.uses)) for row in stages]
    last = {name: at for at, names in enumerate(read) for name in names}
    column = columns(made, last)
    width, height = LEFT + PITCH * (max(column.values()) + 1) + 12, TOP + HEIGHT * len(stages) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *legend(),
    ]
    for at, row in enumerate(stages):
        parts += crossing(at, row, read[at], column)
    for at, names in enumerate(made):
        parts += [line(column[name], at, last[name], COLOURS[stages[at].engine]) for name in names if name in column]
    for at, row in enumerate(stages):
        middle, colour = TOP + HEIGHT * at + 22, COLOURS[row.engine]
        parts += [dot(column[name], at, name, stages, made) for name in read[at]]
        parts += [box(10, middle - 20, BOX, 40, colour, colour)]
        parts += [
            text(20, middle - 3, row.name, "#ffffff", 15, "bold"),
            text(20, middle + 13, JOBS[row.name], "#ffffff", 11),
        ]
        for name in made[at]:
            if name in column:
                x = LEFT + PITCH * column[name]
                parts += [box(x + 3, middle - 13, PITCH - 6, 26, "#ffffff", colour)]
                size = 10.5 if len(name) > 15 else 12.5
                parts += [text(x + PITCH / 2, middle + 4, name, "#111111", size, anchor="middle")]
        if rest := [name for name in made[at] if name not in column]:
            parts.append(
                note(
                    middle + 31,
                    f"writes {', '.join(rest)}, too" if len(made[at]) > len(rest) else f"writes the {rest[0]}",
                )
            )
        elif not made[at]:
            parts.append(note(middle + 4, f"reads {', '.join(row.also)} where they exist"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def columns(made: list[tuple[str, ...]], last: dict[str, int]) -> dict[str, int]:
    """The column of each table that some stage reads. A column is free again below the last reader of its table."""
    free, result = dict[int, int](), dict[str, int]()
    for at, names in enumerate(made):
        for name in names:
            if name in last:
                number = next(n for n in range(len(result) + 1) if free.get(n, -1) < at)
                result[name], free[number] = number, last[name]
    return result


def crossing(at: int, row: Row, names: tuple[str, ...], column: dict[str, int]) -> Iterator[str]:
    """The line of a stage's row, from the stage to the farthest table that it reads or writes."""
    middle, colour = TOP + HEIGHT * at + 22, COLOURS[row.engine]
    own = (*names, *row.writes, *(f"{name} artifact" for name in row.makes))
    if reached := [column[name] for name in own if name in column]:
        end = LEFT + PITCH * max(reached) + PITCH / 2
        yield f'<path d="M{10 + BOX} {middle}H{end}" stroke="{colour}" stroke-width="1.5" fill="none"/>'


def line(number: int, start: int, end: int, colour: str) -> str:
    """The line of a table, from the stage that writes it to its last reader."""
    x = LEFT + PITCH * number + PITCH / 2
    path = f"M{x} {TOP + HEIGHT * start + 35}V{TOP + HEIGHT * end + 22}"
    return f'<path d="{path}" stroke="{colour}" stroke-width="3" opacity="0.45"/>'


def dot(number: int, at: int, name: str, stages: list[Row], made: list[tuple[str, ...]]) -> str:
    """A read: a dot of the colour of the stage that wrote the table."""
    writer = next(row for row, names in zip(stages, made) if name in names)
    x, y = LEFT + PITCH * number + PITCH / 2, TOP + HEIGHT * at + 22
    return f'<circle cx="{x}" cy="{y}" r="6.5" fill="{COLOURS[writer.engine]}" stroke="#ffffff" stroke-width="2"/>'


def legend() -> Iterator[str]:
    """What colours, boxes and dots mean."""
    for at, (name, colour) in enumerate(COLOURS.items()):
        yield box(10 + 92 * at, 12, 82, 22, colour, colour)
        yield text(10 + 92 * at + 41, 27, name.capitalize(), "#ffffff", 12, anchor="middle")
    yield box(300, 11, 62, 24, "#ffffff", "#555555")
    yield text(331, 27, "table", "#111111", 12, anchor="middle")
    yield text(370, 27, "at the stage that writes it", "#333333", 12)
    yield '<circle cx="546" cy="23" r="6.5" fill="#555555"/>'
    yield text(559, 27, "at the stages that read it", "#333333", 12)


def box(x: float, y: float, width: float, height: float, fill: str, edge: str) -> str:
    """A rounded rectangle."""
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {place} rx="6" fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'


def text(
    x: float, y: float, content: str, colour: str, size: float, weight: str = "normal", anchor: str = "start"
) -> str:
    """A line of text whose baseline is at ``y``."""
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" fill="{colour}" {style}>{escape(content)}</text>'


def note(y: float, content: str) -> str:
    """Small text at the left of the columns, on a white ground."""
    ground = f'<rect x="{LEFT}" y="{y - 11}" width="{6.1 * len(content) + 10}" height="15" fill="#ffffff"/>'
    return ground + text(LEFT + 6, y, content, "#555555", 11)


def replaced(document: str, part: str, content: str) -> str:
    """``document`` with ``content`` between the lines that open and close ``part``."""
    start, end = f"<!-- {part}: written by docs/make.py -->\n", f"<!-- end of {part} -->"
    if start not in document or end not in document:
        raise ValueError(f"the document has no part {part!r}: add the lines {start.strip()} and {end}")
    return re.sub(
        f"{re.escape(start)}.*?{re.escape(end)}",
        lambda match: f"{start}\n{content}\n\n{end}",
        document,
        flags=re.DOTALL,
    )


def documents(read: Callable[[str], str]) -> dict[str, str]:
    """Path below ``docs`` -> its text as it should be. ``read``: the text that a path has now."""
    stages = rows()
    architecture = replaced(read("architecture.md"), "stages", tables(stages))
    return {
        "architecture.md": replaced(architecture, "graph", mermaid(stages)),
        "configuration.md": replaced(read("configuration.md"), "reference", render_reference().strip()),
        "dataflow.svg": svg(stages),
    }


if __name__ == "__main__":
    docs = ROOT / "docs"
    for name, content in documents(lambda path: (docs / path).read_text(encoding="utf-8")).items():
        (docs / name).write_text(content, encoding="utf-8")
