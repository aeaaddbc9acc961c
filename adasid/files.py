"""Read and write files, on a disk or in object storage, whole or not at all. This module does not import torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from adasid.storage import ObjectPath, is_remote

Location = Path | ObjectPath
"""A file or folder, on a disk or in object storage."""


def location(path: str | Location) -> Location:
    """Return the location that a path or a URI names."""
    return ObjectPath.of(str(path)) if is_remote(path) else Path(str(path))


@contextmanager
def replacing(path: Location) -> Iterator[Path]:
    """Yield a local file to write; it becomes ``path`` at the end, and nothing does where the block raises."""
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="adasid-") as folder:
            draft = Path(folder) / path.name
            yield draft
            path.upload(draft)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex[:8]}")  # threads and hosts may write one path
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def local(path: Location) -> Iterator[Path]:
    """Yield a local copy of the file or folder ``path``, or ``path`` itself where it is local."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="adasid-") as folder:
        copy = Path(folder) / path.name
        if path.exists():
            path.download(copy)
        else:
            for file in path.files():
                target = copy / file.relative_to(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.download(target)
        yield copy


def write_bytes(path: Location, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
    if isinstance(path, ObjectPath):
        path.write_bytes(content)
        return
    with replacing(path) as draft:
        draft.write_bytes(content)


def write_text(path: Location, text: str) -> None:
    """Write text with :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Location, data: Any) -> None:
    """Write JSON with :func:`write_bytes`."""
    write_text(path, json.dumps(data, indent=1))


def append_line(path: Location, line: str) -> None:
    """Add a line to a small file; in object storage, which cannot append, it is written again."""
    if isinstance(path, Path):
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return
    try:
        before = path.read_text()
    except FileNotFoundError:
        before = ""
    path.write_text(f"{before}{line}\n")


def remove(folder: Location) -> int:
    """Remove a folder with all its files, or a file; return their bytes. There may be none."""
    if isinstance(folder, ObjectPath):
        return folder.remove()
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return size


def children(folder: Location) -> list[Location]:
    """Return the files and folders directly below a folder, in the order of their names; none where there is no
    folder."""
    inner: list[Location] = list(folder.iterdir()) if folder.is_dir() else []
    return sorted(inner, key=lambda path: path.name)


def newest(folder: Location) -> float:
    """Return the unix time at which a file of the folder was changed last, 0 where there is none."""
    if isinstance(folder, ObjectPath):
        return max((time for _, _, time in folder.entries()), default=0.0)
    return max((path.stat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)


def modified(path: Location) -> float:
    """Return the time of the last change, in unix seconds. Raises FileNotFoundError."""
    if isinstance(path, Path):
        return path.stat().st_mtime
    facts = path.head()
    if facts is None:
        raise FileNotFoundError(str(path))
    return float(facts["last_modified"].timestamp())
