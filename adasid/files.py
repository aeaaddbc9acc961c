"""Files that a reader sees whole or not at all. No torch is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, data: Any) -> None:
    """:func:`write_text` of JSON."""
    write_text(path, json.dumps(data, indent=1))
