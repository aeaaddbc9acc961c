"""Load a tokenizer from its folder, from the live generation of a run's folder, or from MLflow."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from adasid.api.encoding import SidTokenizer
from adasid.errors import InputError, first_line
from adasid.files import Location, location
from adasid.storage import ObjectPath, configure, is_remote
from adasid.tokenizers import artifact

_CALLER = "adasid.load"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Start of an MLflow URI (``models:/``, ``runs:/``, ``s3://``): a scheme of two letters or more."""


def load(source: str | Path) -> SidTokenizer:
    """Load a tokenizer, ready to encode, on the CPU.

    ``source``: a folder that :meth:`SidTokenizer.save` or a training job wrote; the folder of a run (``runs/<name>``),
    for the tokenizer of its live generation; or an MLflow URI such as ``models:/adasid-demo@champion`` or
    ``runs:/<id>/model``. Both folders may lie in object storage (``s3://bucket/prefix``), whose credentials come from
    the environment.

    The live generation is read from the Delta tables of the run, which needs the package deltalake; without it, from
    ``exports/live.json`` if the run has that file. An MLflow URI needs mlflow, and is looked up on the tracking server
    of ``MLFLOW_TRACKING_URI``.

    Raises InputError if the tokenizer is missing or damaged, or a package is missing.
    """
    if isinstance(source, str) and _URI.match(source) and not is_remote(source):
        return _download(source)
    configure({})
    folder = ObjectPath.of(str(source)) if is_remote(source) else Path(source).expanduser()
    if (folder / "manifest.json").exists():
        return SidTokenizer(*artifact.read(folder))
    if (folder / "lake").is_dir():
        return SidTokenizer(*artifact.read(_live(folder)))
    why = "has neither manifest.json nor lake/" if folder.is_dir() else "is not a folder"
    fix = "give the folder of a saved tokenizer, a run's folder (runs/<name>), or an MLflow URI (models:/name@alias)"
    raise InputError(f"{_CALLER}: {source} {why}; {fix}")


def _download(uri: str) -> SidTokenizer:
    """Load the artifact behind an MLflow URI."""
    mlflow = _engine("mlflow.artifacts", f"{uri} is an MLflow URI")
    with tempfile.TemporaryDirectory(prefix="adasid-load-") as folder:
        try:
            path = Path(mlflow.download_artifacts(artifact_uri=uri, dst_path=folder))
        except Exception as error:
            fix = "check the URI, and MLFLOW_TRACKING_URI"
            raise InputError(f"{_CALLER}: MLflow cannot download {uri} ({first_line(error)}); {fix}") from None
        return SidTokenizer(*artifact.read(path))


def _live(run: Location) -> Location:
    """Return the folder of the artifact of a run's live generation."""
    nothing = "run jobs/write_sids.py first, or give the folder of an artifact (artifacts/tokenizer/<key>/model)"
    exported = run / "exports" / "live.json"
    try:
        delta = _engine("deltalake", f"{run} is a run's folder, whose Delta tables name the live generation")
    except InputError:
        if not exported.exists():
            raise
        return _artifact(run, json.loads(exported.read_text(encoding="utf-8"))["tokenizer"], None)
    if not delta.DeltaTable.is_deltatable(str(run / "lake" / "live")):
        raise InputError(f"{_CALLER}: nothing is published in {run}; {nothing}")
    live = _rows(delta, run / "lake" / "live", ["generation"])
    if not live:
        raise InputError(f"{_CALLER}: nothing is published in {run}; {nothing}")
    number = live[0]["generation"]
    for row in _rows(delta, run / "lake" / "generations", ["generation", "tokenizer", "artifact"]):
        if row["generation"] == number:
            return _artifact(
                run, row["tokenizer"], location(name) if is_remote(name := row["artifact"]) else run / name
            )
    why = f"generation {number} is live in {run}, but the table generations has no such row"
    raise InputError(f"{_CALLER}: {why}; {nothing}")


def _rows(delta: Any, table: Location, columns: list[str]) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = delta.DeltaTable(str(table)).to_pyarrow_table(columns=columns).to_pylist()
    except Exception as error:
        fix = "give an intact run's folder"
        raise InputError(f"{_CALLER}: table {table} cannot be read ({first_line(error)}); {fix}") from None
    return rows


def _artifact(run: Location, digest: str, recorded: Location | None) -> Location:
    """Return the folder of the artifact with this digest: ``recorded``, or below ``artifacts`` in a run that was moved
    or copied."""
    folders = [recorded] if recorded else []
    others: list[Location] = [path.parent for path in (run / "artifacts").rglob("model/manifest.json")]
    folders += sorted(others, key=str)
    for folder in folders:
        with suppress(InputError):  # another artifact may be damaged, or of another format
            if artifact.read_manifest(folder).digest == digest:
                return folder
    fix = "bring the artifact back, or train and publish again"
    why = f"tokenizer {digest}, which is live in {run}, is in no folder of {run / 'artifacts'}"
    raise InputError(f"{_CALLER}: {why}; {fix}")


def _engine(name: str, why: str) -> Any:
    """Import an optional package. Raises InputError if it is missing."""
    try:
        return import_module(name)
    except ImportError:
        package = name.split(".", maxsplit=1)[0]
        fix = f"run `pip install {package}`"
        raise InputError(f"{_CALLER}: {why}, and the package {package} is missing; {fix}") from None
