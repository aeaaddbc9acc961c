"""Register tokenizers in MLflow."""

from __future__ import annotations

from typing import Literal

from adasid.config import Config
from adasid.files import Location
from adasid.tokenizers import artifact
from pipelines.engines.tracking import StageContext


def model_name(cfg: Config) -> str:
    """Return the name of the registered model."""
    return cfg.tracking.model or f"adasid-{cfg.name}"


def register(
    cfg: Config, context: StageContext, folder: Location, tokenizer: str, alias: Literal["candidate", "champion"]
) -> None:
    """Set ``alias`` of the registered model to the tokenizer (its digest), whose artifact in ``folder`` is logged
    unless it was: ``candidate`` is the one trained last by jobs/train.py, ``champion`` that of the live semantic
    IDs."""
    method = artifact.read_manifest(folder).tokenizer if (folder / "manifest.json").exists() else None
    record = {"do": "register", "run": context.key, "model": model_name(cfg)}
    context.recorder.put({**record, "path": str(folder), "digest": tokenizer, "tokenizer": method, "alias": alias})
