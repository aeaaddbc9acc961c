"""Register tokenizers in MLflow."""

from __future__ import annotations

from typing import Literal

from adasid.config import Config
from adasid.errors import AdasidError, first_line
from adasid.files import Location, write_text
from adasid.report import card
from adasid.tokenizers import artifact
from adasid.tokenizers.artifact import Manifest
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.run import Run

CARD = "card.md"


def model_name(cfg: Config) -> str:
    """Return the name of the registered model."""
    return cfg.tracking.model or f"adasid-{cfg.name}"


def register(
    cfg: Config, context: StageContext, folder: Location, tokenizer: str, alias: Literal["candidate", "champion"]
) -> None:
    """Set ``alias`` of the registered model to the tokenizer (its digest), whose artifact in ``folder`` is logged
    unless it was: ``candidate`` is the one trained last by jobs/train.py, ``champion`` that of the live semantic
    IDs. The artifact gets its card, ``card.md``, which is the description of the model in MLflow."""
    method = text = None
    if (folder / "manifest.json").exists():
        manifest = artifact.read_manifest(folder)
        method, text = manifest.tokenizer, _card(context, folder, manifest)
    record = {"do": "register", "run": context.key, "model": model_name(cfg)}
    context.recorder.put(
        {**record, "path": str(folder), "digest": tokenizer, "tokenizer": method, "alias": alias, "card": text}
    )


def _card(context: StageContext, folder: Location, manifest: Manifest) -> str | None:
    """Return the card of an artifact; write it where there is none, as later encoders may be others."""
    path, lake = folder / CARD, Lake(context.lake.root, context.cfg.pins)
    try:
        if path.exists():
            return path.read_text(encoding="utf-8")
        encoders = lake.read("content_encoders").to_pylist() if lake.exists("content_encoders") else []
        text = card.render(manifest, encoders)
        if str(path).startswith(f"{Run(context.cfg).artifacts}/"):  # others may be shared, and not writable
            write_text(path, text)
        return text
    except (AdasidError, OSError) as error:
        context.note(f"tokenizer {manifest.digest} has no card: {first_line(error)}", "WARN")
        return None
