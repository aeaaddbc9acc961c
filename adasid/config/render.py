"""``conf/base.yaml``, generated from the models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from adasid.config import yaml12
from adasid.config.parts import Adaptive, Hamr
from adasid.config.tokenizers import TOKENIZERS
from adasid.config.whole import Config, section_of


def render_base() -> str:
    """The text of ``conf/base.yaml``: every key with its default and one comment; optional sections and the other tokenizers are commented out."""
    lines = ["# Every key with its default. Generated from adasid/config by `make conf`; a run's own file names only what differs."]
    _render(Config, Config(), 0, lines, "")
    usual = Config().tokenizer
    for model in TOKENIZERS:
        if model is not type(usual):
            values = model()
            shared = [name for name in model.model_fields if name != "name" and _same(usual, values, name)]
            lines += ["", f"# tokenizer:  # {(model.__doc__ or '').splitlines()[0]}"]
            _render(model, values, 1, lines, "# ", shared)
            lines.append(f"#   # as above: {', '.join(shared)}")
    for kind, repulsion in (("hamr", Hamr(kind="hamr")), ("adaptive", Adaptive(kind="adaptive"))):
        lines += ["", f"# tokenizer.repulsion of kind {kind}:  # {(repulsion.__doc__ or '').splitlines()[0]}"]
        _render(type(repulsion), repulsion, 1, lines, "# ")
    return "\n".join(lines) + "\n"


def _same(one: BaseModel, other: BaseModel, name: str) -> bool:
    a, b = type(one).model_fields.get(name), type(other).model_fields[name]
    return a is not None and a.description == b.description and getattr(one, name) == getattr(other, name)


def _render(model: type[BaseModel], values: BaseModel | None, depth: int, lines: list[str], mark: str, left_out: Sequence[str] = ()) -> None:
    for name, field in sorted(model.model_fields.items(), key=lambda pair: pair[0] != "name"):
        if name in left_out:
            continue
        value = getattr(values, name) if values is not None else (None if field.is_required() else field.default)
        inner: Any = type(value) if isinstance(value, BaseModel) else section_of(field.annotation)
        pad = "  " * depth
        if isinstance(inner, type) and issubclass(inner, BaseModel) and not isinstance(value, dict):
            hide = mark or ("# " if value is None else "")
            lines.append(f"{hide}{pad}{name}:  # {field.description}")
            _render(inner, value, depth + 1, lines, hide)
        else:
            plain = json.loads(json.dumps(value))
            text = yaml12.write(plain, default_flow_style=True, width=1000).strip().removesuffix("\n...").strip()
            shown = "<required>" if values is None and field.is_required() else text
            lines.append(f"{mark}{pad}{name}: {shown}  # {field.description}")
