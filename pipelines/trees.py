"""Measure and remove folders below a run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path


def remove(folder: Path) -> int:
    """Remove a folder with all its files; return their bytes."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return size


def changed(folder: Path) -> float:
    """Return the time at which a file of the folder, or the folder itself, was changed last, in unix seconds."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
