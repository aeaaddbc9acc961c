"""Send this project's code to machines that have no checkout: to Spark's executors and to Ray's nodes."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

import adasid
import pipelines

PACKAGES = tuple(Path(str(package.__file__)).parent for package in (adasid, pipelines))
"""The folders of the packages that executors and workers import."""


def archive() -> Path:
    """Write a zip of the packages into a temporary folder of this process; return its path."""
    path = Path(tempfile.mkdtemp(prefix="adasid-code-")) / "adasid-code.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as code:
        for package in PACKAGES:
            for file in sorted(package.rglob("*")):
                if file.is_file() and file.suffix in {".py", ".html", ".properties"}:
                    code.write(file, os.path.join(package.name, file.relative_to(package)))
    return path
