"""Register tokenizers in MLflow."""

from __future__ import annotations

from typing import Literal

from mlflow.exceptions import MlflowException

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
    name, client = model_name(cfg), context.client
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("digest") == tokenizer]
    if known:
        version = known[0]
    elif (folder / "manifest.json").exists():
        context.artifact(folder)
        source = f"{client.get_run(context.run_id).info.artifact_uri}/{folder.name}"
        tags = {"digest": tokenizer, "tokenizer": artifact.read_manifest(folder).tokenizer}
        version = client.create_model_version(name, source, context.run_id, tags=tags)
    else:
        context.note(f"tokenizer {tokenizer} is neither in MLflow nor in {folder}: {alias} stays")
        return
    client.set_registered_model_alias(name, alias, version.version)
