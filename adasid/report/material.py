"""This module defines the data of a report: plain values, each of which may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adasid.config import AdcSidSettings, Config
from adasid.tables import BEHAVIOR

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """This is the content of a training's folder: rows of ``metrics.jsonl`` and the final facts (``result.json`` or
    ``manifest.json``)."""

    rows: Sequence[Row]
    facts: Row


@dataclass(frozen=True)
class Material:
    """``Material`` contains the data of a report. ``catalog``: the row of ``catalog_stats``; ``content``: rows of
    ``content_quality``; ``refused_contents``: reason -> items whose raw content could not be encoded; ``generation``: a
    row of ``generations`` with its JSON columns parsed (``refused``: a newer one that is not live); ``stages``: all
    rows of ``stages.jsonl``; ``versions``: tables that the report itself read; ``lags``: sentences on tables that are
    older than their inputs; ``created``: time of creation, as text; ``explore``: whether the page of items and codes is
    written."""

    cfg: Config
    catalog: Row | None = None
    generation: Row | None = None
    refused: Row | None = None
    behavior: Training | None = None
    tokenizer: Training | None = None
    stages: Sequence[Row] = ()
    versions: Mapping[str, int] = field(default_factory=dict)
    created: str = ""
    lags: Sequence[str] = ()
    content: Sequence[Row] = ()
    refused_contents: Mapping[str, int] = field(default_factory=dict)
    explore: bool = False

    @property
    def empty(self) -> bool:
        """Return whether no stage has left data to report."""
        return not any((self.catalog, self.generation, self.refused, self.behavior, self.tokenizer))

    @property
    def codes(self) -> Row:
        """Return the code metrics of the generation; empty before one is published."""
        return self.generation["metrics"] if self.generation else {}

    @property
    def published(self) -> bool:
        """Return whether the generation shown is live."""
        return bool(self.generation and self.generation["live"])

    @property
    def same_tokenizer(self) -> bool:
        """Return whether the tokenizer shown is the one that wrote the generation."""
        return not (self.generation and self.tokenizer) or self.generation["tokenizer"] in (
            self.tokenizer.facts.get("digest"),
            self.tokenizer.facts.get("folder"),
        )

    @property
    def behavior_slots(self) -> dict[int, str]:
        """Return index and name of the slots that the router switches, by the tokenizer's manifest if it is known, else
        by their names."""
        kinds = {
            slot["name"]: slot["kind"] for slot in (self.tokenizer.facts.get("slots", ()) if self.tokenizer else ())
        }
        return {
            index: name
            for index, name in enumerate(self.codes.get("slots", ()))
            if kinds.get(name, BEHAVIOR if name.startswith("b") else "") == BEHAVIOR
        }

    @property
    def controller(self) -> tuple[float, float] | None:
        """Return (alpha, beta) of the alignment weight; None until training has set them."""
        alpha, beta = (self._controller.get(name) for name in ("alpha", "beta"))
        return None if isinstance(beta, str) or alpha is None or beta is None else (float(alpha), float(beta))

    @property
    def controlled(self) -> bool:
        """Return whether the controller is on; off, every alignment weight is 1."""
        return bool(self._controller["enabled"])

    @property
    def routed(self) -> bool:
        """Return whether the tokenizer aligns by richness and weighs behaviour slots."""
        return isinstance(self.cfg.tokenizer, AdcSidSettings)

    @property
    def _controller(self) -> Row:
        trained = (self.tokenizer.facts.get("controller") or {}) if self.tokenizer else {}
        settings = self.cfg.tokenizer
        if not isinstance(settings, AdcSidSettings):
            return {"enabled": False}
        return {**settings.controller.model_dump(), **trained}


def last_stages(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each stage and part, in the order in which they first ran; the report's own rows are
    omitted."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["stage"] != "report":
            last[row["stage"], part(row)] = row
    return list(last.values())


def part(row: Row) -> str:
    """Return the part of a stage that a row of ``stages.jsonl`` is about; empty if the stage has no parts."""
    return str(row.get("part") or (row.get("facts") or {}).get("part") or "")
