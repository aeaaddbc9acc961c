"""Write files atomically. This module does not import torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON with :func:`write_text`."""
    write_text(path, json.dumps(data, indent=1))
