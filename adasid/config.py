"""The whole configuration as typed, frozen models. The field defaults here are the only defaults; ``conf/base.yaml``
shows them all and a test keeps the two equal. An unknown key, a wrong type or a clash between two keys is a
:class:`~adasid.errors.ConfigError` that names the file, the key and the nearest valid key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adasid.errors import ConfigError

Names = Annotated[tuple[str, ...], Field(strict=False)]
Sizes = Annotated[tuple[int, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Synthetic(Section):
    items: int = Field(20_000, ge=10, description="catalogue size")
    users: int = Field(20_000, ge=10, description="number of users")
    interactions: int = Field(400_000, ge=100, description="expected number of interactions, all users together")
    topics: int = Field(30, ge=2, description="planted clusters of items")
    popularity_exponent: float = Field(0.9, ge=0.0, description="Zipf exponent of item popularity")
    text_width: int = Field(128, ge=2, description="width of the text embedding")
    visual_width: int = Field(64, ge=2, description="width of the visual embedding")
    content_noise: float = Field(0.8, ge=0.0, description="norm of the noise on a content vector; the topic vector has norm 1")
    missing_visual: Share = Field(0.05, description="share of items that have no visual embedding")
    behavior_width: int = Field(0, ge=0, description="0: no behaviour is planted, SASRec learns it; else the width of a planted vector")
    behavior_noise: float = Field(2.0, ge=0.0, description="planted behaviour = topic + noise of norm behavior_noise / sqrt(1 + count)")
    chunk_users: int = Field(10_000, ge=1, description="users generated at a time by one Spark task")

    @model_validator(mode="after")
    def _activity(self) -> Synthetic:
        if self.interactions < 5 * self.users:
            raise ValueError(
                f"source.synthetic.interactions {self.interactions} is less than 5 a user for {self.users} users: raise it, or lower users"
            )
        return self


class TablesSource(Section):
    items: str = Field(description="path of the items table: item_id, one array column a modality, optional title")
    interactions: str = Field(description="path of the interactions table: user_id, item_id, timestamp or pos, optional rating")
    format: Literal["parquet", "delta"] = Field("parquet", description="format of both tables")


class ArraysSource(Section):
    folder: str = Field(description="folder that holds the files named below")
    items: str = Field("items.parquet", description="rows of the arrays: Parquet with item_id, or a text file with one id a line")
    interactions: str = Field("interactions.parquet", description="Parquet: user_id, item_id, timestamp and/or pos")
    embeddings: dict[str, str] = Field(description="modality -> .npy file, row i belongs to row i of items")


class AmazonSource(Section):
    reviews: str = Field(description="reviews as downloaded (JSON lines, .gz or not)")
    metadata: str = Field(description="product metadata as downloaded (JSON lines, .gz or not)")
    text_width: int = Field(128, ge=2, description="width of the text embedding learned from title, brand and categories (Word2Vec)")
    min_word_count: int = Field(5, ge=1, description="words rarer than this are ignored by Word2Vec")


class Source(Section):
    kind: Literal["synthetic", "tables", "arrays", "amazon"] = Field(
        "synthetic", description="which reader; its section below must be the only one given"
    )
    synthetic: Synthetic | None = Field(None, description="the synthetic long-tail catalogue with a planted truth")
    tables: TablesSource | None = Field(None, description="Parquet or Delta tables")
    arrays: ArraysSource | None = Field(None, description="embedding arrays beside a table")
    amazon: AmazonSource | None = Field(None, description="the public Amazon review files")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind", "synthetic") == "synthetic" and data.get("synthetic") is None:
            return {**data, "synthetic": {}}
        return data

    @model_validator(mode="after")
    def _one_section(self) -> Source:
        for kind in ("synthetic", "tables", "arrays", "amazon"):
            given = getattr(self, kind) is not None
            if given and kind != self.kind:
                raise ValueError(f"source.{kind} is set but source.kind is {self.kind!r}: remove the section or set source.kind: {kind}")
            if not given and kind == self.kind:
                raise ValueError(f"source.kind is {kind!r} but the section source.{kind} is missing: add it")
        return self


class Features(Section):
    deduplicate: Literal["exact", "pair", "none"] = Field(
        "exact", description="exact: same user, item and time; pair: first event of a user with an item; none"
    )
    k_core: int = Field(0, ge=0, description="keep users and items with at least this many events, iterated; 0 switches it off")
    k_core_rounds: int = Field(20, ge=1, description="upper bound of the k-core iteration")
    max_length: int = Field(50, ge=2, description="longest history kept in a sequence, in events")
    split: Literal["leave_one_out", "global_time"] = Field(
        "leave_one_out", description="leave_one_out: last event test, the one before validation; global_time: by two cut-off times"
    )
    holdout: Share = Field(0.1, description="global_time: last share of events is test, the same share before it is validation")
    positive_rating: float = Field(3.0, description="a rating above this is label 1; data without ratings has label 1 throughout")
    head_share: Share = Field(0.25, description="share of items, by training count, called head")
    tail_share: Share = Field(0.25, description="share of items, by training count, called tail (items never trained on are cold)")
    max_rejected: Share = Field(0.05, description="larger share of rejected rows in a table stops the stage")
    now: str | None = Field(None, description="ISO time after which a timestamp is in the future; null: the clock")
    norm_percentiles: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.5, 99.5), description="norms are clipped to these percentiles before min-max scaling"
    )
    proxy_min_spearman: float = Field(
        0.2, ge=-1, le=1, description="below this Spearman(norm, count) richness falls back to min-max of log(1 + count)"
    )

    @model_validator(mode="after")
    def _shares(self) -> Features:
        if self.head_share + self.tail_share > 1:
            raise ValueError(f"features.head_share + features.tail_share is {self.head_share + self.tail_share:g}: must be at most 1")
        if not 0 <= self.norm_percentiles[0] < self.norm_percentiles[1] <= 100:
            raise ValueError(f"features.norm_percentiles {self.norm_percentiles} must rise within 0 and 100")
        if self.split == "global_time" and not 0 < self.holdout < 0.5:
            raise ValueError(f"features.holdout is {self.holdout:g} but a global_time split needs it between 0 and 0.5")
        return self


class Behavior(Section):
    source: Literal["sasrec", "column"] = Field("sasrec", description="sasrec: train it; column: items bring a 'behavior' vector")
    width: int = Field(64, ge=2, description="width of the behaviour embedding")
    blocks: int = Field(2, ge=1, description="transformer blocks")
    heads: int = Field(1, ge=1, description="attention heads")
    max_length: int = Field(20, ge=1, description="events of history that the model sees")
    dropout: Share = Field(0.5, description="dropout on embeddings, attention and feed-forward")
    epochs: int = Field(40, ge=1, description="upper bound of epochs")
    patience: int = Field(5, ge=1, description="epochs without a better validation NDCG@10 before stopping")
    batch_users: int = Field(256, ge=2, description="users a step, all workers together")
    negatives: int = Field(1024, ge=1, description="in-batch negatives a step, drawn from the targets of all workers")
    table_lr: float = Field(0.05, gt=0, description="Adagrad learning rate of the item table (lazy: only rows of the batch)")
    lr: float = Field(0.001, gt=0, description="Adam learning rate of everything else")
    eval_users: int = Field(25_000, ge=1, description="users scored at each validation, at most")
    norm_checkpoint: Literal["early", "best"] = Field(
        "early", description="early: norms from the epoch of highest Spearman(norm, count); best: from the best validation epoch"
    )
    early_epochs: int = Field(10, ge=1, description="the early checkpoint is chosen among this many first epochs")

    @model_validator(mode="after")
    def _heads(self) -> Behavior:
        if self.width % self.heads:
            raise ValueError(f"behavior.width {self.width} is not a multiple of behavior.heads {self.heads}")
        return self


class Training(Section):
    epochs: int = Field(100, ge=2, description="passes over the catalogue")
    batch: int = Field(1024, ge=2, description="items a step, all workers together")
    lr: float = Field(0.001, gt=0, description="AdamW learning rate at the start; cosine decay to 0")
    weight_decay: float = Field(0.0001, ge=0, description="AdamW weight decay (not on codebooks and biases)")
    warmup_epochs: int = Field(1, ge=1, description="epochs without quantization, before the k-means initialisation")
    checkpoint_epochs: int = Field(20, ge=1, description="epochs between two checkpoints")
    log_epochs: int = Field(5, ge=1, description="epochs between two rows of metrics")

    @model_validator(mode="after")
    def _warmup(self) -> Training:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"tokenizer.training.warmup_epochs {self.warmup_epochs} is not below tokenizer.training.epochs {self.epochs}: nothing would be quantized"
            )
        return self


class Controller(Section):
    enabled: bool = Field(True, description="false: every alignment weight is 1 (ablation)")
    alpha: float = Field(10.0, gt=0, description="slope of the alignment weight over richness")
    beta: float | Literal["calibrated"] = Field(
        "calibrated", description="shift of the alignment weight (paper: 9); calibrated: see calibrated_share"
    )
    calibrated_share: Share = Field(0.4, description="calibrated beta puts this share of items below a weight of 0.05 (the paper's 'about 40 %')")


class Router(Section):
    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(1 / 3, description="target share of inactive behaviour slots, averaged over items")
    lambda_start: float = Field(1e-3, gt=0, description="first weight of the sparsity loss (ReMoE: 1e-8, for 60,000 steps)")
    lambda_step: float = Field(1.02, gt=1, description="factor by which that weight moves a step (ReMoE: 1.2; it overshoots in short runs)")
    scale: Literal["sigmoid", "alignment"] = Field(
        "sigmoid", description="sigmoid: R is scaled by sigmoid(richness); alignment: by the alignment weight"
    )
    hidden: int = Field(64, ge=1, description="hidden width of the gates")


class Revival(Section):
    every: int = Field(50, ge=1, description="steps between two looks at code usage")
    min_share: float = Field(0.25, ge=0, description="a code used less than this share of its fair share 1/K is revived")
    until: Share = Field(0.9, description="share of training after which codes are left alone")


class AdcSid(Section):
    """ADC-SID (arXiv 2510.25622 v3); S1.9 of the paper's settings on Beauty where it states them."""

    name: Literal["adc-sid"] = Field("adc-sid", description="which tokenizer")
    codebook_size: int = Field(100, ge=2, description="codes in a codebook (K)")
    shared_experts: int = Field(1, ge=1, description="experts that read all modalities (N_s)")
    content_experts: dict[str, int] = Field(
        {"text": 1, "visual": 1}, description="experts of each content modality (N_t, N_v, ...); its keys are the modalities used"
    )
    behavior_experts: int = Field(3, ge=1, description="experts of the behaviour modality (N_b)")
    latent_width: int = Field(64, ge=2, description="width of a latent and of a codeword (d)")
    projector_width: int = Field(256, ge=2, description="width of the aligned space (d_h)")
    hidden: Sizes = Field((512, 256), description="hidden widths of an expert")
    decoder_hidden: Sizes = Field((256, 512), description="hidden widths of the decoder")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive losses")
    reconstruction_weight: float = Field(1.0, ge=0, description="weight of L_recon")
    codebook_weight: float = Field(1.0, gt=0, description="weight of the codebook loss")
    commitment: float = Field(
        1.0, ge=0, description="weight of the commitment half of the codebook loss (0.25 is usual; gates then grow without bound)"
    )
    alignment_weight: float = Field(0.1, ge=0, description="weight of the alignment losses")
    kmeans_samples: int = Field(20_000, ge=1, description="latents that initialise the codebooks")
    kmeans_rounds: int = Field(20, ge=1, description="Lloyd rounds of that initialisation")
    controller: Controller = Field(Controller(), description="alignment strength controller")
    router: Router = Field(Router(), description="dynamic behaviour gate")
    revival: Revival = Field(Revival(), description="revival of dead codes")
    training: Training = Field(Training(), description="the training loop")

    @property
    def content(self) -> tuple[str, ...]:
        """Content modalities in slot order."""
        return tuple(self.content_experts)

    @model_validator(mode="after")
    def _experts(self) -> AdcSid:
        for modality, number in self.content_experts.items():
            if number < 1:
                raise ValueError(f"tokenizer.content_experts.{modality} is {number}: must be at least 1, or leave the modality out")
            if modality in {"behavior", "shared"}:
                raise ValueError(f"tokenizer.content_experts.{modality}: {modality!r} is not a content modality")
        if not self.content_experts:
            raise ValueError("tokenizer.content_experts is empty: name at least one content modality, for example {text: 1}")
        return self


class Gates(Section):
    min_utilisation: Share = Field(0.5, description="lowest share of used codes that any codebook may have")
    max_collision: Share = Field(0.5, description="highest share of items whose SID is not unique")
    max_group: int = Field(1000, ge=1, description="largest number of items that may share one SID")


class Sids(Section):
    batch: int = Field(1024, ge=1, description="items encoded at a time")
    artifact: str | None = Field(None, description="folder of another tokenizer artifact; null: the one of this config")
    gates: Gates = Field(Gates(), description="what a table must satisfy to be published")


class Spark(Section):
    master: str = Field("local[*]", description="used when the job is not started by spark-submit")
    driver_memory: str = Field("4g", description="used when the job is not started by spark-submit")
    shuffle_partitions: int = Field(8, ge=1, description="spark.sql.shuffle.partitions")
    conf: dict[str, str] = Field({}, description="further Spark settings, key: value")


class Ray(Section):
    workers: int = Field(2, ge=0, description="training workers; 0 trains in the job's own process, without Ray")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs reserved (and threads used) by a worker")
    gpus: Literal["auto", "never"] = Field("auto", description="auto: a GPU a worker where the cluster has one for each")
    address: str | None = Field(None, description="a running cluster; null: RAY_ADDRESS, else a local one is started")
    max_failures: int = Field(2, ge=0, description="worker deaths after which training gives up; each restart resumes from the checkpoint")


class Tracking(Section):
    uri: str | None = Field(None, description="MLflow tracking server; null: sqlite in the run's folder")
    experiment: str = Field("adasid", description="MLflow experiment")
    model: str | None = Field(None, description="name in the model registry; null: adasid-<run name>")


class Config(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run: its outputs lie in <runs_dir>/<name>")
    seed: int = Field(17, ge=0, lt=2**31, description="the one seed")
    runs_dir: str = Field("runs", description="where runs are kept")
    pins: dict[str, int] = Field({}, description="table -> version to read instead of the latest")
    source: Source = Field(Source(kind="synthetic", synthetic=Synthetic()), description="where items and interactions come from")
    features: Features = Field(Features(), description="validation, split and long-tail statistics (Spark)")
    behavior: Behavior = Field(Behavior(), description="behaviour embeddings (SASRec on Ray Train)")
    tokenizer: AdcSid = Field(AdcSid(), description="the tokenizer (Ray Train)")
    sids: Sids = Field(Sids(), description="the semantic-ID table (Spark)")
    spark: Spark = Field(Spark(), description="Spark session")
    ray: Ray = Field(Ray(), description="Ray Train")
    tracking: Tracking = Field(Tracking(), description="MLflow")

    @model_validator(mode="after")
    def _lengths(self) -> Config:
        if "://" in self.runs_dir:
            raise ValueError(f"runs_dir is {self.runs_dir!r}: must be a folder that all machines share, mounted under one path")
        if self.behavior.max_length > self.features.max_length:
            raise ValueError(
                f"behavior.max_length {self.behavior.max_length} is longer than features.max_length {self.features.max_length}: "
                "the sequences are cut before the model sees them; lower the first or raise the second"
            )
        if self.behavior.source == "column" and self.source.synthetic and not self.source.synthetic.behavior_width:
            raise ValueError("behavior.source is 'column' but source.synthetic.behavior_width is 0: set the width, or behavior.source: sasrec")
        if self.behavior.source == "sasrec" and self.source.synthetic and self.source.synthetic.behavior_width:
            raise ValueError(
                "source.synthetic.behavior_width plants a behaviour vector but behavior.source is 'sasrec': set behavior.source: column, or the width to 0"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


def digest(*parts: object) -> str:
    """16 hex digits that change when any of ``parts`` (models, mappings, scalars) changes."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file over the defaults, then apply ``dotted.key=value`` overrides (values are YAML).

    Raises ConfigError for a missing file, bad YAML, an unknown key, a wrong type or contradictory keys.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing file, for example conf/demo.yaml") from None
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
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML") from None
    node = data
    *parents, last = key.split(".")
    for parent in parents:
        child = node.get(parent)
        node[parent] = node = dict(child) if isinstance(child, dict) else {}
    node[last] = value


def _explain(origin: str, error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        siblings = _keys(location[:-1])
        near = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
        return f"{origin}: unknown key {key!r}{hint}"
    if error["type"] == "value_error":
        return f"{origin}: {error['msg'].removeprefix('Value error, ')}"
    if error["type"] == "missing":
        return f"{origin}: key {key!r} is missing; add it"
    return f"{origin}: {key} is {error.get('input')!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys(location: list[str]) -> list[str]:
    model: Any = Config
    for part in location:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = section_of(field.annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def section_of(annotation: Any) -> Any:
    """The model class inside ``Model`` or ``Model | None``; the annotation itself where there is none."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return annotation


def render_base() -> str:
    """The text of ``conf/base.yaml``: every key with its default and one comment; optional sections are commented out."""
    lines = ["# Every key with its default. Generated from adasid/config.py by `make conf`; a run's own file names only what differs."]
    _render(Config, Config(), 0, lines, "")
    return "\n".join(lines) + "\n"


def _render(model: type[BaseModel], values: BaseModel | None, depth: int, lines: list[str], mark: str) -> None:
    for name, field in model.model_fields.items():
        value = getattr(values, name) if values is not None else (None if field.is_required() else field.default)
        inner, pad = section_of(field.annotation), "  " * depth
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            hide = mark or ("# " if value is None else "")
            lines.append(f"{hide}{pad}{name}:  # {field.description}")
            _render(inner, value, depth + 1, lines, hide)
        else:
            plain = json.loads(json.dumps(value))
            text = yaml.safe_dump(plain, default_flow_style=True, width=1000).strip().removesuffix("\n...").strip()
            shown = "<required>" if values is None and field.is_required() else text
            lines.append(f"{mark}{pad}{name}: {shown}  # {field.description}")
