"""The reference of the configuration in ``docs/configuration.md``, generated from the models: every key, its type, its
default and its description."""

from __future__ import annotations

import re
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adasid.config.render import reads, render_tokenizers, same, shown, summary
from adasid.config.whole import Config, section_of
from adasid.tokenizers.registry import TOKENIZERS
from adasid.tokenizers.settings import Adaptive, Hamr

_WIDTH = 120
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}
_SIGNS = {
    limits.Ge: ("ge", "at least"),
    limits.Gt: ("gt", "above"),
    limits.Le: ("le", "at most"),
    limits.Lt: ("lt", "below"),
}


def render_reference() -> str:
    """Return the reference as Markdown, one heading for each section of the config and for each tokenizer."""
    default = Config()
    top = [name for name, field in Config.model_fields.items() if not _is_section(field)]
    lines = ["## Top level", ""]
    for name in top:
        lines += _entry(name, Config.model_fields[name], getattr(default, name))
    for name, field in Config.model_fields.items():
        if name == "tokenizer":
            lines += ["", *_tokenizers()]
        elif name not in top:
            lines += ["", f"## `{name}`", "", f"{_sentence(field.description)}", ""]
            lines += _keys(section_of(field.annotation), getattr(default, name), name)
    return "\n".join(lines) + "\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.default, BaseModel)


def _tokenizers() -> Iterator[str]:
    yield from ("## `tokenizer`", "", "`tokenizer.name` chooses the method; the other keys depend on it.", "")
    yield render_tokenizers().strip()
    usual = TOKENIZERS[0]()
    for model in TOKENIZERS:
        values = model()
        name = model.model_fields["name"]
        shared = [
            key
            for key in model.model_fields
            if key != "name" and model is not TOKENIZERS[0] and same(usual, values, key)
        ]
        yield from ("", f"### `tokenizer.name: {name.default}`", "")
        text = summary(model).replace("``", "`")
        yield from textwrap.wrap(f"{text} Reads by default: {reads(values)}.", _WIDTH)
        if own := list(_keys(model, values, "tokenizer", ("name", *shared))):
            yield from ("", *own)
        if shared:
            listed = ", ".join(f"`{key}`" for key in shared)
            yield from ("", *textwrap.wrap(f"As for `{usual.name}`: {listed}.", _WIDTH))
    for repulsion in (Hamr(kind="hamr"), Adaptive(kind="adaptive")):
        yield from ("", f"### `tokenizer.repulsion.kind: {repulsion.kind}`", "")
        yield from textwrap.wrap(summary(type(repulsion)), _WIDTH)
        yield from ("", *_keys(type(repulsion), repulsion, "tokenizer.repulsion", ("kind",)))


def _keys(model: Any, values: BaseModel | None, prefix: str, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    """The entries of a section's keys and of the sections within it. ``values``: the defaults; None: a section that the
    config does not have by default."""
    for name, field in model.model_fields.items():
        if name in left_out:
            continue
        value = getattr(values, name) if values is not None else field.default
        yield from _entry(f"{prefix}.{name}", field, value)
        inner = type(value) if isinstance(value, BaseModel) else section_of(field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel) and not isinstance(value, dict):
            yield from _keys(inner, value if isinstance(value, BaseModel) else None, f"{prefix}.{name}")


def _entry(key: str, field: FieldInfo, value: object) -> list[str]:
    kind = _kind(field.annotation, _limits(field.metadata))
    if field.is_required():
        kind += ", required"
    elif not isinstance(value, BaseModel):
        kind += f", default `{shown(value)}`"
    text = f"`{key}` ({kind}): {_sentence(field.description, capital=False)}"
    return textwrap.wrap(
        text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _kind(annotation: Any, bounds: str = "") -> str:
    """A type in words; ``bounds``: of its numbers, as :func:`_limits` gives them."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0], _limits(parts[1:]))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("`null`" if part is type(None) else _kind(part, bounds) for part in parts))
    if origin in (dict, tuple):
        inner = [re.sub("^(number|integer|text|section|tokenizer section)", r"\1s", _kind(part)) for part in parts]
        return f"mapping of {inner[0]} to {inner[1]}" if origin is dict else f"list of {inner[0]}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "tokenizer section" if annotation.__name__ == "TokenizerSettings" else "section"
    return _NAMES.get(annotation, "tokenizer section") + bounds


def _limits(metadata: Any) -> str:
    """Bounds of a number, such as `` of at least 1``."""
    flat = [part for group in metadata for part in (group.metadata if isinstance(group, FieldInfo) else (group,))]
    words = [
        f"{word} {getattr(part, name):.10g}"
        for part in flat
        for kind, (name, word) in _SIGNS.items()
        if isinstance(part, kind)
    ]
    return f" {' and '.join(words)}" if words else ""


def _sentence(text: str | None, capital: bool = True) -> str:
    text = (text or "").replace("<", "\\<")
    capital = capital and "/" not in text.split(maxsplit=1)[0]
    return f"{text[0].upper() if capital else text[0]}{text[1:]}."
