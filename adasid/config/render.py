"""Generate ``conf/base.yaml`` from the models."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from adasid.config import yaml12
from adasid.config.whole import Config, section_of
from adasid.tables import BEHAVIOR
from adasid.tokenizers.registry import TOKENIZERS
from adasid.tokenizers.settings import Adaptive, Hamr, TokenizerSettings

_WIDTH = 120


def render_base() -> str:
    """Return the text of ``conf/base.yaml``: every key with its default and one comment; optional sections and the
    other tokenizers are commented out."""
    lines = [
        "# Every key with its default. Generated from adasid/config by `make conf`; a run's own file names only what "
        "differs."
    ]
    _render(Config, Config(), 0, lines, "")
    usual = Config().tokenizer
    for model in TOKENIZERS:
        if model is not type(usual):
            values = model()
            shared = [name for name in model.model_fields if name != "name" and same(usual, values, name)]
            lines += ["", *_described("# ", "tokenizer:", summary(model))]
            _render(model, values, 1, lines, "# ", shared)
            listed, indent = f"as above: {', '.join(shared)}", "#   # "
            lines += textwrap.wrap(listed, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    for kind, repulsion in (("hamr", Hamr(kind="hamr")), ("adaptive", Adaptive(kind="adaptive"))):
        lines += ["", *_described("# ", f"tokenizer.repulsion of kind {kind}:", summary(type(repulsion)))]
        _render(type(repulsion), repulsion, 1, lines, "# ")
    return "\n".join(lines) + "\n"


def render_tokenizers() -> str:
    """Return the table of tokenizers, in Markdown: name, description with links to the papers, and what one with
    default settings reads. The links' targets follow the table."""
    lines, targets = ["| name | what it is | reads, by default |", "|---|---|---|"], dict[str, None]()
    for model in TOKENIZERS:
        name = model.model_fields["name"]
        papers = re.findall(r"arXiv (\d{4}\.\d{5})(?: (v\d))?", summary(model))
        links = ", ".join(f"[{number}{version}]" for number, version in papers)
        targets |= dict.fromkeys(f"{number}{version}" for number, version in papers)
        lines.append(f"| `{name.default}` | {name.description}{f' ({links})' if links else ''} | {reads(model())} |")
    lines += ["", *(f"[{number}]: https://arxiv.org/abs/{number}" for number in targets)]
    return "\n".join(lines) + "\n"


def write(root: Path) -> None:
    """Write ``conf/base.yaml`` below ``root``."""
    (root / "conf" / "base.yaml").write_text(render_base(), encoding="utf-8")


def shown(value: object) -> str:
    """Return a value as YAML in one line."""
    plain = json.loads(json.dumps(value))
    return yaml12.write(plain, default_flow_style=True, width=1000).strip().removesuffix("\n...").strip()


def reads(settings: TokenizerSettings) -> str:
    """Return what a tokenizer reads, in words: content, behaviour, pairs."""
    inputs = set(settings.inputs)
    kinds = {"content": inputs - {BEHAVIOR}, "behaviour": inputs & {BEHAVIOR}, "pairs": settings.pairs}
    return ", ".join(kind for kind, read in kinds.items() if read) or "nothing"


def summary(model: type[BaseModel]) -> str:
    """Return the first paragraph of the docstring, in one line."""
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def same(one: BaseModel, other: BaseModel, name: str) -> bool:
    """Whether a key has the same description and value in two sections."""
    a, b = type(one).model_fields.get(name), type(other).model_fields[name]
    return a is not None and a.description == b.description and getattr(one, name) == getattr(other, name)


def _render(
    model: type[BaseModel],
    values: BaseModel | None,
    depth: int,
    lines: list[str],
    mark: str,
    left_out: Sequence[str] = (),
) -> None:
    for name, field in sorted(model.model_fields.items(), key=lambda pair: pair[0] != "name"):
        if name in left_out:
            continue
        value = getattr(values, name) if values is not None else (None if field.is_required() else field.default)
        inner: Any = type(value) if isinstance(value, BaseModel) else section_of(field.annotation)
        pad = "  " * depth
        if isinstance(inner, type) and issubclass(inner, BaseModel) and not isinstance(value, dict):
            hide = mark or ("# " if value is None else "")
            lines += _described(f"{hide}{pad}", f"{name}:", str(field.description))
            _render(inner, value, depth + 1, lines, hide)
        else:
            text = "<required>" if values is None and field.is_required() else shown(value)
            lines += _described(f"{mark}{pad}", f"{name}: {text}", str(field.description))


def _described(indent: str, entry: str, description: str) -> list[str]:
    """Return an entry with its description beside it, or above it where the line would be too long."""
    line = f"{indent}{entry}  # {description}"
    if len(line) <= _WIDTH:
        return [line]
    above = textwrap.wrap(description, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    return [*above, f"{indent}{entry}"]
