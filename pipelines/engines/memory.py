"""Estimate whether work outside the JVM fits into memory: the limit of the container, else of the machine."""

from __future__ import annotations

import os
from pathlib import Path

from pyspark import SparkConf, SparkContext

SMALL_NIGHT = 800
"""Bytes that a nightly run without Spark takes for each live item."""
_NONE = 2**60
"""cgroup v1 writes a number above this where there is no limit."""


def small_night(items: int) -> int:
    """Return the bytes that a nightly run without Spark takes for a table of ``items``."""
    return items * SMALL_NIGHT


def limit(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that this process and its JVM may take together: the lowest limit of its cgroups (version 2 or
    1), at most the machine's memory."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _files(root, process):
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _NONE:
            found.append(int(text))
    return min(found)


def _files(root: Path, process: Path) -> list[Path]:
    """Return the files that may state a limit: those of the process's groups and of all groups above."""
    try:
        lines = process.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    files = [root / "memory.max", root / "memory" / "memory.limit_in_bytes"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        parts = [part for part in group.split("/") if part]
        for depth in range(1, len(parts) + 1):
            below = "/".join(parts[:depth])
            if not controllers:
                files.append(root / below / "memory.max")
            elif "memory" in controllers.split(","):
                files.append(root / "memory" / below / "memory.limit_in_bytes")
    return files


def taken() -> int:
    """Return the bytes that this process has now, without its JVM."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def jvm(configured: str) -> int:
    """Return the bytes that the heap of this process's JVM may take: 0 where there is none yet. ``configured``: the
    config's ``spark.driver_memory``, with which a job starts its JVM if spark-submit has not started one."""
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        SparkContext._ensure_initialized()
        return to_bytes(SparkConf().get("spark.driver.memory", "1g") or "1g")
    return to_bytes(configured) if SparkContext._gateway is not None else 0


def to_bytes(text: str) -> int:
    """Return the bytes of a size as Spark writes it, such as ``8g``; a bare number is in MiB."""
    text = text.strip().lower().removesuffix("b")
    units = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text) * 2**20
