"""Find the files of a model, in a local folder or a repository of the Hugging Face hub, and its identity. Pickled
weights are neither downloaded nor read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from adasid import config
from adasid.encoders.base import Identity, needed
from adasid.errors import InputError, first_line
from adasid.faults import wrapped

_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".jinja", ".tiktoken")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl")
_OTHER = ["onnx/*", "openvino/*", "*.fp16.*", "open_clip*", ".*"]
"""Files of a repository for other libraries."""
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PART = 1 << 20
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A revision that is a commit, and no branch or tag."""


class Origin(NamedTuple):
    """A model's place: a local folder, or a repository of the hub and its commit."""

    folder: Path | None
    commit: str | None


def find(key: str, settings: config.Encoder, offline: bool) -> Origin:
    """Return where the model lies. The commit is that of ``settings.revision``, in the local cache if it is there, else
    on the hub. Raises InputError if the model does not exist, TransientError if the hub does not answer."""
    model, revision = settings.model, settings.revision
    if Path(model).is_dir():
        if revision:
            raise InputError(f"{key}.revision: {revision} has no effect, {model} is a local folder: set null")
        return Origin(Path(model), None)
    if not _NAME.fullmatch(model):
        raise InputError(
            f"{key}.model: {model} is neither a local folder nor the name of a repository of the Hugging Face hub: "
            "create the folder, or name another model"
        )
    hub = needed(key, "huggingface_hub")
    if revision and COMMIT.fullmatch(revision):
        return Origin(None, revision)
    for name in ("config.json", "modules.json"):
        cached = hub.try_to_load_from_cache(model, name, revision=revision)
        if isinstance(cached, str):
            return Origin(None, Path(cached).parent.name)
    if offline:
        raise _not_cached(key, settings)
    try:
        return Origin(None, str(hub.HfApi().model_info(model, revision=revision).sha))
    except Exception as error:
        raise wrapped(error, _refused(key, settings, error)) from None


def fetch(key: str, settings: config.Encoder, origin: Origin, offline: bool) -> Path:
    """Return the local folder with the model's files, downloaded if need be. Raises InputError if they cannot be
    downloaded, or if weights are pickled."""
    folder = origin.folder
    if not folder:
        hub = needed(key, "huggingface_hub")
        try:
            folder = Path(
                hub.snapshot_download(
                    settings.model,
                    revision=origin.commit,
                    local_files_only=offline,
                    allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES],
                    ignore_patterns=_OTHER,
                )
            )
        except Exception as error:
            if offline:
                raise _not_cached(key, settings) from None
            raise wrapped(error, _refused(key, settings, error)) from None
    _check_weights(key, settings, folder)
    return folder


def identity(settings: config.Encoder, origin: Origin) -> Identity:
    """Return the identity of an encoder that is a model: equal for folders with equal files."""
    model: Identity = {"digest": digest(origin.folder)} if origin.folder else {"model": settings.model}
    model |= {"revision": origin.commit} if origin.commit else {}
    if settings.field:
        return {"kind": "transformers", **model, "width": settings.width}
    text: Identity = {"prompt": settings.prompt, "max_chars": settings.max_chars}
    return {"kind": "sentence-transformers", **model, "width": settings.width, **text}


def digest(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a model's files: configuration, tokenizer and weights."""
    whole = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in _files(folder, _SUFFIXES)):
        inner = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(_PART):
                inner.update(part)
        whole.update(f"{name}\0{inner.hexdigest()}\n".encode())
    return whole.hexdigest()


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _check_weights(key: str, settings: config.Encoder, folder: Path) -> None:
    safe = {path.parent for path in _files(folder, (".safetensors",))}
    pickled = [path for path in _files(folder, _PICKLED) if path.parent not in safe and path.stem != "training_args"]
    if pickled:
        raise InputError(
            f"{key}.model: {settings.model} has {pickled[0].relative_to(folder)}, pickled weights, which may run code: "
            "write the model again as safetensors with its save_pretrained, or name another model"
        )
    if not safe:
        raise InputError(
            f"{key}.model: {settings.model} has no file *.safetensors: write the model again with its "
            "save_pretrained, or name another model"
        )


def _not_cached(key: str, settings: config.Encoder) -> InputError:
    return InputError(
        f"{key}.model: {settings.model} is no local folder, and not whole in the local cache of the Hugging Face hub: "
        "download it with content.offline=false, or name a folder"
    )


def _refused(key: str, settings: config.Encoder, error: Exception) -> str:
    return (
        f"{key}.model: {settings.model} is no local folder, and cannot be downloaded from the Hugging Face hub "
        f"({first_line(error)}): check the name, key revision, HF_TOKEN and the network"
    )
