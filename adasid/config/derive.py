"""Expand a section of the config before validation: the section that it is ``like``, and defaults that depend on other
keys. The resolved config, and so every input hash, equals that of a file with all keys written out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adasid.config.content import AMAZON_TEXTS
from adasid.config.downstream import Ranking, Retrieval
from adasid.tokenizers.registry import BY_NAME, TOKENIZERS
from adasid.tokenizers.settings import TokenizerSettings

Model = type[BaseModel] | None
ModelOf = Callable[[Mapping[str, Any]], Model]
_DEFAULT: str = TOKENIZERS[0].model_fields["name"].default
_EVALUATED: dict[str, type[BaseModel]] = {
    "retrievers": Retrieval,
    "rankers": Ranking,
    "controls": Retrieval,
    "ranking_controls": Ranking,
}


def resolved(data: Mapping[str, Any], content: Sequence[str]) -> dict[str, Any]:
    """Return ``data``, the whole config as read, with its tokenizer, compared and evaluated sections as if they were
    written out. ``content``: the modalities of ``features.content``. Raises ValueError as :func:`written_out`."""
    result = {**data, "tokenizer": filled(data.get("tokenizer", {}), content)}
    if encoders := _amazon_encoders(data, content):
        result["content"] = {**data.get("content", {}), "encoders": encoders}
    compare, evaluate = data.get("compare"), data.get("evaluate")
    if isinstance(compare, Mapping) and isinstance(compare.get("tokenizers"), Mapping):
        sections = {label: _named(section) for label, section in compare["tokenizers"].items()}
        sections = written_out("compare.tokenizers", sections, _tokenizer)
        tokenizers = {label: filled(section, content) for label, section in sections.items()}
        result["compare"] = {**compare, "tokenizers": tokenizers}
    if isinstance(evaluate, Mapping):
        result["evaluate"] = dict(evaluate)
        for kind, model in _EVALUATED.items():
            if isinstance(evaluate.get(kind), Mapping):
                result["evaluate"][kind] = written_out(f"evaluate.{kind}", evaluate[kind], _always(model))
    return result


def _amazon_encoders(data: Mapping[str, Any], content: Sequence[str]) -> dict[str, Any]:
    """Return the encoders of the Amazon files where the config has none: they bring no vectors."""
    source, section = data.get("source"), data.get("content", {})
    amazon = isinstance(source, Mapping) and source.get("kind") == "amazon"
    if not amazon or "text" not in content or not isinstance(section, Mapping) or section.get("encoders"):
        return {}
    return {"text": {"fields": list(AMAZON_TEXTS)}}


def written_out(key: str, sections: Mapping[str, Any], model_of: ModelOf) -> dict[str, Any]:
    """Return ``sections``, label -> section, without the key ``like``: ``{like: LABEL, ...}`` is the section of that
    label, which may itself be like another, with the other keys merged into it by :func:`merged`.

    ``key`` is the name of the mapping in errors; ``model_of`` returns the settings model of a section, None where it is
    unknown. Raises ValueError for an unknown label, a cycle, and a section whose ``name`` differs from its base's.
    """
    return {label: _written_out(key, sections, (label,), model_of) for label in sections}


def _written_out(key: str, sections: Mapping[str, Any], chain: tuple[str, ...], model_of: ModelOf) -> Any:
    """Return the section of the last label in ``chain``, in which each label is like the one after it."""
    label = chain[-1]
    section = sections[label]
    if not isinstance(section, Mapping) or "like" not in section:
        return section
    like = section["like"]
    if not isinstance(like, str) or like not in sections:
        others = [str(other) for other in sections if other != label]
        near = difflib.get_close_matches(str(like), others, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key}.{label}.like is {like!r}, which is not a label of {key}{hint}")
    if like in chain:
        cycle = " -> ".join(repr(part) for part in (*chain[chain.index(like) :], like))
        raise ValueError(f"{key}.{label}.like is {like!r}: {cycle} is a cycle; write one of them out, without like")
    base = _written_out(key, sections, (*chain, like), model_of)
    if not isinstance(base, Mapping):
        raise ValueError(f"{key}.{label}.like is {like!r}, which is {base!r}, not a section: write {label!r} out")
    given = {name: value for name, value in section.items() if name != "like"}
    if "name" in base and given.get("name", base["name"]) != base["name"]:
        raise ValueError(
            f"{key}.{label}.name is {given['name']!r} but it is like {like!r}, whose name is {base['name']!r}: "
            "remove name, or write the section out, without like"
        )
    return merged(model_of(base), base, given)


def merged(model: Model, base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``given``. A value replaces the base's, except that two sections (a field of
    ``model`` that is a settings model itself) of one ``kind`` are merged recursively. A mapping that is a single value,
    such as ``levels`` or ``content_experts``, is replaced as a whole, and so is a list."""
    fields = model.model_fields if model else {}
    return {**base, **{name: _merged_value(fields.get(name), base.get(name), value) for name, value in given.items()}}


def _merged_value(field: FieldInfo | None, old: Any, new: Any) -> Any:
    models = list(_models(field.annotation)) if field else []
    if not field or not models or not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    kind = old.get("kind", getattr(field.default, "kind", None))
    if new.get("kind", kind) != kind:
        return new
    return merged(models[0] if len(models) == 1 else None, old, new)


def filled(section: Any, content: Sequence[str]) -> Any:
    """Return a tokenizer section with missing parts filled in: the default's name, all of ``content`` where it does not
    say what it reads, and its method's defaults in partly given sections."""
    if not isinstance(section, Mapping):
        return section
    section = {"name": _DEFAULT, **section}
    model = _tokenizer(section)
    if model is None:
        return section
    defaults = {name: field.default for name, field in model.model_fields.items()}
    section = {**model.reading(content), **section}
    return {name: _completed(defaults.get(name), value) for name, value in section.items()}


def _always(model: Model) -> ModelOf:
    return lambda section: model


def _named(section: Any) -> Any:
    """Return a tokenizer section with the default's name if it has neither a name nor a base to take one from."""
    return {"name": _DEFAULT, **section} if isinstance(section, Mapping) and "like" not in section else section


def _tokenizer(section: Mapping[str, Any]) -> type[TokenizerSettings] | None:
    return BY_NAME.get(str(section.get("name")))


def _completed(default: Any, given: Any) -> Any:
    """Return ``given`` completed by ``default`` if both are sections of one ``kind``; else ``given``."""
    if not isinstance(default, BaseModel) or not isinstance(given, Mapping):
        return given
    kind = getattr(default, "kind", None)
    if given.get("kind", kind) != kind:
        return given
    return {**default.model_dump(), **{key: _completed(getattr(default, key, None), given[key]) for key in given}}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the settings models in an annotation such as ``A``, ``A | None`` or ``Annotated[A | B, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _models(part)
