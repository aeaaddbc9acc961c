"""Validate the whole configuration across sections, read a file with overrides, and report errors that name the key."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from adasid.config import yaml12
from adasid.config.content import Content
from adasid.config.derive import resolved
from adasid.config.downstream import Evaluate, Ranking, Retrieval
from adasid.config.names import check_labels
from adasid.config.nightly import Retokenize
from adasid.config.publish import Publish
from adasid.config.secrets import masked
from adasid.config.sources import Source, Synthetic
from adasid.config.stages import Behavior, Compare, Explore, Features, Ray, Sids, Spark, Storage, Tracking
from adasid.errors import ConfigError
from adasid.files import Location, location
from adasid.settings import Section
from adasid.storage import SCHEMES, is_remote
from adasid.tables import BEHAVIOR
from adasid.tokenizers.adc_sid import AdcSidSettings
from adasid.tokenizers.registry import BY_NAME, AnyTokenizer

_SPECIAL = '#%?*:^|<>[]{}\\"`'
"""Special characters of globs and URLs."""


class Config(Section):
    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run: its outputs lie in <runs_dir>/<name>",
    )
    seed: int = Field(17, ge=0, lt=2**31, description="the one seed")
    runs_dir: str = Field(
        "runs", description="folder of all runs; or a prefix in object storage, such as s3://bucket/prefix"
    )
    storage: Storage = Field(Storage(), description="object storage")
    pins: dict[str, int] = Field({}, description="table -> version to read instead of the latest")
    source: Source = Field(
        Source(kind="synthetic", synthetic=Synthetic()), description="where items and interactions come from"
    )
    content: Content = Field(Content(), description="encoders of raw text and pictures (Ray Data)")
    features: Features = Field(Features(), description="validation, split and long-tail statistics (Spark)")
    behavior: Behavior = Field(Behavior(), description="behaviour embeddings (SASRec on Ray Train)")
    tokenizer: AnyTokenizer = Field(AdcSidSettings(), description="the tokenizer (Ray Train), chosen by its name")
    sids: Sids = Field(Sids(), description="the semantic-ID table (Spark)")
    publish: Publish = Field(Publish(), description="where others find the published tables")
    retokenize: Retokenize = Field(Retokenize(), description="the nightly job (jobs/retokenize.py)")
    spark: Spark = Field(Spark(), description="Spark session")
    ray: Ray = Field(Ray(), description="Ray Train")
    retrieval: Retrieval = Field(Retrieval(), description="the retriever over the semantic IDs (Ray Train)")
    ranking: Ranking = Field(Ranking(), description="the click-through model over the semantic IDs (Ray Train)")
    compare: Compare = Field(Compare(), description="jobs/compare_tokenizers.py")
    evaluate: Evaluate = Field(Evaluate(), description="jobs/evaluate.py")
    explore: Explore = Field(Explore(), description="the report's page that shows single items and codes")
    tracking: Tracking = Field(Tracking(), description="MLflow")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        features = data.get("features", {})
        content = features.get("content") if isinstance(features, Mapping) else None
        return resolved(data, list(content) if isinstance(content, list | tuple) else Features().content)

    @model_validator(mode="after")
    def _inputs(self) -> Config:
        for key, settings in {
            "tokenizer": self.tokenizer,
            **{f"compare.tokenizers.{k}": v for k, v in self.compare.tokenizers.items()},
        }.items():
            for modality in settings.inputs:
                if modality not in (*self.features.content, BEHAVIOR):
                    raise ValueError(
                        f"{key} ({settings.name}) reads {modality!r} but features.content is "
                        f"{list(self.features.content)}: "
                        "add it there, or leave it out of the tokenizer"
                    )
        return self

    @model_validator(mode="after")
    def _encoded(self) -> Config:
        for modality in self.content.encoders:
            if modality not in self.features.content:
                raise ValueError(
                    f"content.encoders.{modality}: features.content is {list(self.features.content)}: add "
                    f"{modality!r} there, or leave the encoder out"
                )
        brought = {name.lower() for name in self.brought}
        for name in (name for names in self.content.raw() for name in names):
            if name.lower() in brought:
                raise ValueError(
                    f"content.encoders reads the raw field {name!r}, but {name!r} is also a vector that the source "
                    "brings: rename one of the columns"
                )
        return self

    @property
    def brought(self) -> tuple[str, ...]:
        """Return the modalities whose vectors the source brings."""
        content = tuple(name for name in self.features.content if name not in self.content.encoders)
        return (*content, *((BEHAVIOR,) if self.behavior.source == "column" else ()))

    @model_validator(mode="after")
    def _label_texts(self) -> Config:
        check_labels("compare.tokenizers", self.compare.tokenizers)
        for kind in ("retrievers", "rankers", "controls", "ranking_controls", "studies"):
            check_labels(f"evaluate.{kind}", getattr(self.evaluate, kind))
        return self

    @model_validator(mode="after")
    def _lengths(self) -> Config:
        if "://" in self.runs_dir and not is_remote(self.runs_dir):
            raise ValueError(
                f"runs_dir is {self.runs_dir!r}: must be a folder that all machines share, mounted under one path, or "
                f"a bucket ({', '.join(f'{scheme}://' for scheme in SCHEMES)})"
            )
        folder = self.runs_dir.partition("://")[2] if is_remote(self.runs_dir) else str(Path(self.runs_dir).absolute())
        if odd := next((c for c in folder if c in _SPECIAL or not c.isprintable()), None):
            raise ValueError(
                f"runs_dir is {self.runs_dir!r} ({folder!r}): Spark, Delta or URLs read {odd!r} in another way; "
                f"choose a folder whose path has none of {' '.join(_SPECIAL)}"
            )
        if self.behavior.max_length > self.features.max_length:
            raise ValueError(
                f"behavior.max_length {self.behavior.max_length} is longer than features.max_length "
                f"{self.features.max_length}: "
                "the sequences are cut before the model sees them; lower the first or raise the second"
            )
        retrievers = {"retrieval": self.retrieval}
        retrievers |= {f"evaluate.retrievers.{k}": v for k, v in self.evaluate.retrievers.items()}
        retrievers |= {f"evaluate.controls.{k}": v for k, v in self.evaluate.controls.items()}
        for key, settings in retrievers.items():
            if settings.max_length > self.features.max_length:
                raise ValueError(
                    f"{key}.max_length {settings.max_length} is longer than features.max_length "
                    f"{self.features.max_length}: lower it"
                )
            if settings.repeatable != self.retrieval.repeatable:
                raise ValueError(
                    f"{key}.repeatable is {str(settings.repeatable).lower()} but retrieval.repeatable is not: lists "
                    "are compared, so set it alike"
                )
        if self.features.user_buckets < self.ray.workers:
            raise ValueError(
                f"features.user_buckets is {self.features.user_buckets} but ray.workers is {self.ray.workers}: a "
                "worker without a bucket would have no users; raise the first to a multiple of the second"
            )
        if self.evaluate.parallel > 1 and not self.ray.workers:
            raise ValueError(
                f"evaluate.parallel is {self.evaluate.parallel} but ray.workers is 0, which trains in the job's one "
                "process: raise it"
            )
        for label in self.evaluate.labels:
            if label not in self.compare.tokenizers:
                raise ValueError(
                    f"evaluate names {label!r}, which is not a label of compare.tokenizers: add its section there"
                )
        if self.behavior.source == "column" and self.source.synthetic and not self.source.synthetic.behavior_width:
            raise ValueError(
                "behavior.source is 'column' but source.synthetic.behavior_width is 0: set the width, or "
                "behavior.source: sasrec"
            )
        if self.behavior.source == "sasrec" and self.source.synthetic and self.source.synthetic.behavior_width:
            raise ValueError(
                "source.synthetic.behavior_width plants a behaviour vector but behavior.source is 'sasrec': set "
                "behavior.source: column, or the width to 0"
            )
        return self

    @property
    def run_dir(self) -> Location:
        return location(self.runs_dir) / self.name


def digest(*parts: object) -> str:
    """Return 16 hex digits that change when any of ``parts`` (models, mappings, scalars) changes."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file over the defaults, then apply ``dotted.key=value`` overrides (values are YAML).

    Raises ConfigError for a missing file, bad YAML, an unknown key, a wrong type or contradictory keys.
    """
    path = Path(path)
    try:
        data = yaml12.read(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give an existing file, for example conf/demo.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}, not a mapping of keys")
    for override in overrides:
        _apply(data, override)
    return build(data, str(path))


def build(data: Mapping[str, Any], origin: str = "config") -> Config:
    """Validate a plain mapping. ``origin`` names it in errors."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(origin, dict(e)) for e in error.errors())) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: must read dotted.key=value")
    try:
        value = yaml12.read(text)
        if _has_comment(text, value):
            raise yaml.YAMLError("'#' after a blank begins a comment, which would cut the value: put it in quotes")
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error  # not the value, which may be a secret
        raise ConfigError(f"--set {key}: the value is not valid YAML ({' '.join(str(problem).split())})") from None
    node = data
    *parents, last = key.split(".")
    for parent in parents:
        child = node.get(parent)
        node[parent] = node = dict(child) if isinstance(child, dict) else {}
    node[last] = value


def _has_comment(text: str, value: Any) -> bool:
    """Return whether ``value`` is the text before a ``#``, which YAML reads as a comment."""
    match = re.search(r"(^|\s)#", text)
    try:
        return match is not None and bool(value == yaml12.read(text[: match.start()]))
    except yaml.YAMLError:  # the value is quoted
        return False


def _explain(origin: str, error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"] if part not in BY_NAME]  # the tag of a union is not a key
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        siblings = _keys([str(part) for part in error["loc"][:-1]])
        near = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
        return f"{origin}: unknown key {key!r}{hint}"
    if error["type"] == "value_error":
        return f"{origin}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] == "missing":
        return f"{origin}: key {key!r} is missing; add it"
    if error["type"] == "union_tag_invalid":
        tag = error["ctx"]["discriminator"].strip("'")
        return f"{origin}: {key}.{tag} is {error['ctx']['tag']!r}: must be one of {error['ctx']['expected_tags']}"
    value, hint = error.get("input"), ""
    if error["type"] == "string_type" and isinstance(value, (int, float)):
        hint = " (put it in quotes)"
    elif error["type"] == "string_type" and isinstance(value, dict):
        hint = f" (a name with dots is written --set '{'.'.join(location[:-1])}={{{location[-1]}.x.y: value}}')"
    shown = type(value).__name__ if isinstance(value, (dict, list)) else repr(masked(value, key))
    return f"{origin}: {key} is {shown}: {error['msg'][0].lower()}{error['msg'][1:]}{hint}"


def _keys(location: list[str]) -> list[str]:
    model: Any = Config
    labelled = False  # this part is a label in a mapping of sections
    for part in location:
        if labelled:
            labelled = False
            continue
        if part in BY_NAME:
            model = BY_NAME[part]
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            if not isinstance(model, type):  # a label of compare.tokenizers, followed by its tag
                continue
            return []
        model, labelled = (
            section_of(field.annotation),
            get_origin(field.annotation) is dict and section_of(field.annotation) is not field.annotation,
        )
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def section_of(annotation: Any) -> Any:
    """Return the model class inside ``Model`` or ``Model | None``, or the annotation itself if there is none or more
    than one."""
    result = [
        candidate
        for candidate in (annotation, *get_args(annotation))
        if isinstance(candidate, type) and issubclass(candidate, BaseModel)
    ]
    return result[0] if len(result) == 1 else annotation
