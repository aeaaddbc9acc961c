"""Send this project's code to machines that have no checkout: to Spark's executors and to Ray's nodes."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import adasid
import pipelines

PACKAGES = tuple(Path(str(package.__file__)).parent for package in (adasid, pipelines))
"""The folders of the packages that executors and workers import."""


def archive() -> Path:
    """Write a zip of the packages into a temporary folder, which is removed when the process ends; return its path."""
    folder = Path(tempfile.mkdtemp(prefix="adasid-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "adasid-code.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as code:
        for package in PACKAGES:
            for file in sorted(package.rglob("*")):
                if file.is_file() and file.suffix in {".py", ".html", ".properties"}:
                    code.write(file, os.path.join(package.name, file.relative_to(package)))
    return path
