"""Register tokenizers in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from adasid.config import Config
from adasid.tokenizers import artifact
from pipelines.engines.tracking import StageContext


def register(
    cfg: Config, context: StageContext, folder: Path, tokenizer: str, alias: Literal["candidate", "champion"]
) -> None:
    """Set ``alias`` of the registered model to the tokenizer (its digest), whose artifact in ``folder`` is logged
    unless it was: ``candidate`` is the one trained last by jobs/train.py, ``champion`` that of the live semantic
    IDs."""
    method = artifact.read_manifest(folder).tokenizer if (folder / "manifest.json").exists() else None
    record = {"do": "register", "run": context.key, "model": cfg.tracking.model or f"adasid-{cfg.name}"}
    context.recorder.put({**record, "path": str(folder), "digest": tokenizer, "tokenizer": method, "alias": alias})
