"""Mask secrets in a config: values of keys that name one, and users and passwords of URLs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

MASK = "***"
_NAMES = {
    "secret",
    "secrets",
    "password",
    "passwd",
    "passphrase",
    "token",
    "credential",
    "credentials",
    "sas",
    "apikey",
}
_BEFORE_KEY = {"access", "account", "api", "private", "secret", "shared"}
_SHORTEST = 6
_QUERY = re.compile(r"(?i)([?&;](?:password|passwd|pwd|token|sig|secret|X-Amz-[\w-]+)=)[^&;\s\"']+")
"""Passwords in the query of a URL, such as that of JDBC."""
_USER = re.compile(r"(?<=://)[^/@\s]+@")

Model = TypeVar("Model", bound=BaseModel)


def names_secret(key: str) -> bool:
    """Return whether a key such as ``spark.hadoop.fs.s3a.secret.key`` names a secret."""
    parts = [part.lower() for part in re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])", key) if part]
    return any(part in _NAMES for part in parts) or any(
        part == "key" and before in _BEFORE_KEY for before, part in zip(parts, parts[1:])
    )


def masked_text(text: str) -> str:
    """Return ``text`` without the users and passwords of its URLs."""
    return _QUERY.sub(rf"\1{MASK}", _USER.sub("", text))


def hidden(text: str, model: BaseModel) -> str:
    """Return ``text``, such as a stack trace, without the secrets of a config and without those of URLs."""
    for secret in sorted(_secrets(model.model_dump(mode="json")), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return masked_text(text)


def _secrets(value: Any, key: str = "") -> set[str]:
    """Return the values of keys that name a secret; none so short that it would be found in other words."""
    if isinstance(value, Mapping):
        return {secret for name, inner in value.items() for secret in _secrets(inner, str(name))}
    return {value} if isinstance(value, str) and len(value) >= _SHORTEST and names_secret(key) else set()


def masked(value: Any, key: str = "") -> Any:
    """Return a value of a config with its secrets masked, of the same type; ``key``: its name."""
    if isinstance(value, BaseModel):
        return masked_config(value)
    if isinstance(value, Mapping):
        return {name: masked(inner, str(name)) for name, inner in value.items()}
    if value is not None and names_secret(key):
        return MASK
    if isinstance(value, (list, tuple)):
        return type(value)(masked(inner) for inner in value)
    return masked_text(value) if isinstance(value, str) else value


def masked_config(model: Model) -> Model:
    """Return a copy of a section, or of the whole config, with its secrets masked."""
    return model.model_copy(update={name: masked(getattr(model, name), name) for name in type(model).model_fields})
