"""Write and read a trained tokenizer as files: ``weights.safetensors`` and ``manifest.json``, loadable with torch
alone.

The manifest is written last and has the digest of the weights: a folder without it, or with other weights, is not an
artifact."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load, save

from adasid import config
from adasid.errors import InputError
from adasid.tokenizers.base import Tokenizer
from adasid.tokenizers.relabel import Relabelled

FORMAT = 2
_SETTINGS: TypeAdapter[config.TokenizerSettings] = TypeAdapter(config.AnyTokenizer)


def build(settings: config.TokenizerSettings, widths: Mapping[str, int]) -> Tokenizer:
    """Return the untrained tokenizer of ``settings``. ``widths``: modality -> width of all its inputs."""
    return settings.build(widths)


def write(
    folder: Path, tokenizer: Tokenizer, settings: config.TokenizerSettings, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the artifact and return its manifest. ``facts``: further entries of the manifest (inputs, seed, versions,
    metrics)."""
    manifest = {
        "format": FORMAT,
        "tokenizer": settings.name,
        "slots": [slot._asdict() for slot in tokenizer.slots],
        "widths": tokenizer.widths,
        **tokenizer.facts(),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        **facts,
        "config": settings.model_dump(mode="json"),
    }
    return rewrite(folder, tokenizer, manifest)


def rewrite(folder: Path, tokenizer: Tokenizer, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the artifact with the ``manifest`` of another one; entries that depend on the weights are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()})
    manifest = {
        **manifest,
        "digest": hashlib.sha256(weights).hexdigest()[:16],
        "relabelled": isinstance(tokenizer, Relabelled),
    }
    for name, content in (("weights.safetensors", weights), ("manifest.json", json.dumps(manifest, indent=1).encode())):
        draft = folder / f".{name}.{os.getpid()}"
        draft.write_bytes(content)
        draft.replace(folder / name)
    return dict(manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest. Raises InputError if the folder has no artifact of this format."""
    try:
        manifest = dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    except OSError:
        raise InputError(
            f"artifact {folder}: no manifest.json; train a tokenizer first (jobs/train.py --stage tokenizer)"
        ) from None
    except ValueError:
        raise InputError(f"artifact {folder}/manifest.json: not valid JSON; train the tokenizer again") from None
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"artifact {folder}: format {manifest.get('format')!r}, this version reads {FORMAT}; train the tokenizer "
            "again"
        )
    return manifest


def settings_of(manifest: Mapping[str, Any]) -> config.TokenizerSettings:
    """Return the tokenizer section that the artifact was trained with."""
    return _SETTINGS.validate_python(manifest["config"])


def read(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer, ready to encode, and its manifest."""
    manifest = read_manifest(folder)
    try:
        weights = (folder / "weights.safetensors").read_bytes()
    except OSError:
        raise InputError(f"artifact {folder}: no weights.safetensors; train the tokenizer again") from None
    return decode(manifest, weights), manifest


def decode(manifest: Mapping[str, Any], weights: bytes) -> Tokenizer:
    """Build the tokenizer from a manifest and the bytes of its weights. Raises InputError if they do not belong
    together."""
    if hashlib.sha256(weights).hexdigest()[:16] != manifest["digest"]:
        raise InputError(
            f"artifact {manifest['digest']}: the weights are damaged or belong to another manifest; train the "
            "tokenizer again"
        )
    try:
        tokenizer = build(settings_of(manifest), manifest["widths"])
        tokenizer = Relabelled(tokenizer) if manifest.get("relabelled") else tokenizer
        tokenizer.load_state_dict(load(weights))
    except (ValidationError, RuntimeError, KeyError) as error:
        raise InputError(
            f"artifact {manifest['digest']}: weights and config do not fit ({str(error).splitlines()[0]}); train the "
            "tokenizer again"
        ) from None
    return tokenizer.eval().requires_grad_(False)
