"""Parse lines that are Python literals, as in the Amazon metadata of 2014: ``{'asin': 'B1', 'price': None, 'title':
'Caf\\xe9'}``."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence

import pyarrow as pa


def parse(names: Sequence[str], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Parse batches with a column ``line`` to ``names`` as text, and ``broken``, the line if it is no dictionary. Text
    stays as it is, None is null, other values are JSON. Pass only lines that are not JSON: each is parsed by Python."""
    for batch in batches:
        lines = batch["line"].to_pylist()
        rows = [_fields(line, names) for line in lines]
        columns = [pa.array([None if row is None else row[name] for row in rows], pa.string()) for name in names]
        broken = pa.array([line if row is None else None for line, row in zip(lines, rows)], pa.string())
        yield pa.RecordBatch.from_arrays([*columns, broken], names=[*names, "broken"])


def _fields(line: str, names: Sequence[str]) -> dict[str, str | None] | None:
    try:
        value = ast.literal_eval(line.strip())
        return {name: _text(value.get(name)) for name in names} if isinstance(value, dict) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _text(value: object) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate from an escape is not valid text
