"""Write and read a trained tokenizer as files: ``weights.safetensors`` and ``manifest.json``, loadable with torch
alone.

The manifest is written last and has the digest of the weights: a folder without it, or with other weights, is not an
artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_serializer
from safetensors.torch import load, save

from adasid import config, files
from adasid.errors import InputError
from adasid.faults import wrapped
from adasid.files import Location
from adasid.sid import Slot
from adasid.tokenizers.base import Tokenizer
from adasid.tokenizers.relabel import Relabelled

FORMAT = 2
_FORMER = {"start": "random", "distance": "cosine", "damping": 0.0, "count_power": 0.0, "expert_lr": 1.0}
"""What ADC-SID was before these settings existed."""
_SETTINGS: TypeAdapter[config.TokenizerSettings] = TypeAdapter(config.AnyTokenizer)


class Manifest(BaseModel):
    """A manifest describes an artifact: the method ``tokenizer``, its ``slots``, the ``widths`` of its inputs, the
    ``config`` section it was trained with, the ``digest`` of its weights, and whether its codes were ``relabelled``;
    ``richness``: the scale of the richness of items (``adasid.fit``); ``metrics``, ``inputs`` (versions of the tables)
    and ``seconds`` of the training. Further facts are extra fields."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: int
    tokenizer: str
    slots: tuple[Slot, ...]
    widths: dict[str, int]
    parameters: int
    config: dict[str, Any]
    digest: str
    relabelled: bool = False
    richness: dict[str, Any] | None = None
    metrics: dict[str, Any] = {}
    inputs: dict[str, int] = {}
    seconds: float = 0.0

    @field_serializer("slots")
    def _slots(self, slots: tuple[Slot, ...]) -> list[dict[str, Any]]:
        return [slot._asdict() for slot in slots]

    def json_text(self) -> str:
        """Return the content of ``manifest.json``."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


def build(settings: config.TokenizerSettings, widths: Mapping[str, int]) -> Tokenizer:
    """Return the untrained tokenizer of ``settings``. ``widths``: modality -> width of all its inputs."""
    return settings.build(widths)


def write(
    folder: Location, tokenizer: Tokenizer, settings: config.TokenizerSettings, facts: Mapping[str, Any]
) -> Manifest:
    """Write the artifact and return its manifest. ``facts``: further entries of the manifest (inputs, seed, versions,
    metrics)."""
    manifest = {
        "format": FORMAT,
        "tokenizer": settings.name,
        "slots": tokenizer.slots,
        "widths": tokenizer.widths,
        **tokenizer.facts(),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        **facts,
        "config": settings.model_dump(mode="json"),
    }
    return rewrite(folder, tokenizer, manifest)


def rewrite(folder: Location, tokenizer: Tokenizer, manifest: Manifest | Mapping[str, Any]) -> Manifest:
    """Write the artifact with the ``manifest`` of another one; entries that depend on the weights are replaced."""
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()})
    entries = manifest.model_dump() if isinstance(manifest, Manifest) else manifest
    digest = hashlib.sha256(weights).hexdigest()[:16]
    written = Manifest(**{**entries, "digest": digest, "relabelled": isinstance(tokenizer, Relabelled)})
    for name, content in (("weights.safetensors", weights), ("manifest.json", written.json_text().encode())):
        files.write_bytes(folder / name, content)
    return written


def read_manifest(folder: Location) -> Manifest:
    """Read and check the manifest. Raises InputError if the folder has no artifact of this format."""
    try:
        entries = dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"artifact {folder}: no manifest.json; train a tokenizer first (jobs/train.py --stage tokenizer)"
        ) from None
    except OSError as error:
        raise wrapped(error, f"artifact {folder}/manifest.json: cannot be read ({error})") from error
    except ValueError:
        raise InputError(f"artifact {folder}/manifest.json: not valid JSON; train the tokenizer again") from None
    if entries.get("format") != FORMAT:
        raise InputError(
            f"artifact {folder}: format {entries.get('format')!r}, this version reads {FORMAT}; train the tokenizer "
            "again"
        )
    try:
        return Manifest(**entries)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(
            f"artifact {folder}/manifest.json: {where}: {problem['msg']}; train the tokenizer again"
        ) from None


def settings_of(section: Mapping[str, Any]) -> config.TokenizerSettings:
    """Return the settings of the ``config`` of a manifest. Raises InputError if this version does not know them."""
    former = _FORMER if section.get("name") == "adc-sid" else {}
    try:
        return _SETTINGS.validate_python({**former, **section})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"][1:]))
        raise InputError(
            f"artifact: its config is of another version of adasid ({where}: {problem['msg']}); train the tokenizer "
            "again"
        ) from None


def read(folder: Location) -> tuple[Tokenizer, Manifest]:
    """Return the tokenizer, ready to encode, and its manifest."""
    manifest = read_manifest(folder)
    try:
        weights = (folder / "weights.safetensors").read_bytes()
    except FileNotFoundError:
        raise InputError(f"artifact {folder}: no weights.safetensors; train the tokenizer again") from None
    except OSError as error:
        raise wrapped(error, f"artifact {folder}/weights.safetensors: cannot be read ({error})") from error
    return decode(manifest, weights), manifest


def decode(manifest: Manifest, weights: bytes) -> Tokenizer:
    """Build the tokenizer from a manifest and the bytes of its weights. Raises InputError if they do not belong
    together."""
    if hashlib.sha256(weights).hexdigest()[:16] != manifest.digest:
        raise InputError(
            f"artifact {manifest.digest}: the weights are damaged or belong to another manifest; train the "
            "tokenizer again"
        )
    try:
        tokenizer = build(settings_of(manifest.config), manifest.widths)
        tokenizer = Relabelled(tokenizer) if manifest.relabelled else tokenizer
        tokenizer.load_state_dict(load(weights))
    except (ValidationError, RuntimeError, KeyError) as error:
        raise InputError(
            f"artifact {manifest.digest}: weights and config do not fit ({str(error).splitlines()[0]}); train the "
            "tokenizer again"
        ) from None
    return tokenizer.eval().requires_grad_(False)
