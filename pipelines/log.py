"""Print lines of progress, warnings and errors on standard error, for people or, with ``ADASID_LOG=json``, as one JSON
object a line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Literal

from adasid.config.secrets import masked_text

Level = Literal["INFO", "WARN", "ERROR"]

_place = {"run": "", "stage": ""}


def place(run: str, stage: str = "") -> tuple[str, str]:
    """Set the run and the stage that the next lines name; return those before."""
    before = _place["run"], _place["stage"]
    _place.update(run=run, stage=stage)
    return before


def line(message: str, level: Level = "INFO", stage: str | None = None, facts: Mapping[str, Any] | None = None) -> None:
    """Print one line. ``stage``: instead of the one of :func:`place`; ``facts``: figures, after the message."""
    where = {"run": _place["run"], "stage": _place["stage"] if stage is None else stage}
    print(written(message, level, where, facts or {}), file=sys.stderr, flush=True)


def written(message: str, level: Level, where: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Return a line such as ``2026-11-22T02:30:05Z INFO  beauty/ingest: items written at version 3``, or its JSON
    object."""
    now, message = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}", masked_text(message)
    if os.environ.get("ADASID_LOG") == "json":
        row = {"time": now, "level": level, **where, "message": message}
        return json.dumps(row | ({"facts": dict(facts)} if facts else {}), default=str, ensure_ascii=False)
    name = "/".join(part for part in where.values() if part)
    figures = "".join(f" | {key} {value}" for key, value in facts.items())
    return " ".join(f"{now} {level:<5} {f'{name}: ' if name else ''}{message}{figures}".splitlines())
