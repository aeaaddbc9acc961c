"""This module defines the settings of the stages around the tokenizer, and of the engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from adasid.config.names import check_modalities
from adasid.config.secrets import names_secret
from adasid.settings import Names, Section, Share
from adasid.tokenizers.registry import AnyTokenizer


class Pairs(Section):
    method: Literal["swing", "cooccurrence"] = Field(
        "swing",
        description="swing: users who share little else count more; cooccurrence: number of users who have both",
    )
    per_item: int = Field(20, ge=1, description="largest number of partners of an item, the best by score")
    min_users: int = Field(2, ge=1, description="users who must have both items")
    max_user_items: int = Field(100, ge=2, description="of a longer history only the latest items make pairs")
    max_item_users: int = Field(
        50,
        ge=2,
        description="swing: users of an item that are compared with each other, at most; a fixed sample of more",
    )
    max_rows: int = Field(
        5_000_000_000,
        ge=1,
        description="swing: pairs of users of one item, and pairs of items of two users: the rows of its largest "
        "shuffles, about 40 bytes each; more stop the stage before they are formed",
    )
    alpha: float = Field(1.0, gt=0, description="swing: smoothing added to the number of items that two users share")


class Features(Section):
    content: Names = Field(("text", "visual"), min_length=1, description="content modalities of the items")
    deduplicate: Literal["exact", "pair", "none"] = Field(
        "exact", description="exact: same user, item and time; pair: first event of a user with an item; none"
    )
    k_core: int = Field(
        0, ge=0, description="keep users and items with at least this many events, iterated; 0 switches it off"
    )
    k_core_rounds: int = Field(20, ge=1, description="upper bound of the k-core iteration")
    max_length: int = Field(50, ge=2, description="longest history of a sequence, in events")
    split: Literal["leave_one_out", "global_time"] = Field(
        "leave_one_out",
        description="leave_one_out: last event test, the one before validation; global_time: by two cut-off times",
    )
    holdout: Share = Field(
        0.1, description="global_time: last share of events is test, the same share before it is validation"
    )
    ranking_split: Literal["auto", "same", "global_time"] = Field(
        "auto",
        description="same: ranking samples are split as above; global_time: by two cut-off times of their own, and "
        "what one task holds out neither "
        "embeddings nor SIDs learn from; auto: global_time where every event has a time and "
        "some are rated low or labelled 0",
    )
    ranking_holdout: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        (0.05, 0.1), description="ranking_split global_time: shares of events that are validation and, the last, test"
    )
    positive_rating: float = Field(
        3.0,
        description="a rating above this is label 1; an unrated event among rated ones has none; without ratings and "
        "labels all are 1",
    )
    histories: Literal["auto", "all", "positive"] = Field(
        "auto",
        description="events that make histories, counts and embeddings: auto: all but those of label 0 (impressions "
        "without a click); all; positive: "
        "neither those nor events rated low. Ranking samples hold all events",
    )
    max_user_events: int = Field(
        10_000, ge=2, description="of a user with more events only the latest so many are used"
    )
    user_buckets: int = Field(
        8,
        ge=1,
        description="parts by user of sequences and ranking_samples: a worker reads the buckets b with b % ray.workers "
        "equal to its rank, so at least ray.workers, better a multiple of it",
    )
    first_year: int = Field(
        1990,
        ge=1,
        le=9999,
        description="a time before this year is refused: it is in another unit, or stands for an unknown one",
    )
    head_share: Share = Field(0.25, description="share of items, by training count, called head")
    tail_share: Share = Field(
        0.25, description="share of items, by training count, called tail (items never trained on are cold)"
    )
    max_rejected: Share = Field(0.05, description="larger share of rejected rows in a table stops the stage")
    now: str | None = Field(None, description="ISO time after which a timestamp is in the future; null: the clock")
    norm_percentiles: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.5, 99.5), description="norms are clipped to these percentiles before min-max scaling"
    )
    pairs: Pairs = Field(Pairs(), description="co-engaged pairs of items, mined where a tokenizer learns from them")
    proxy_min_spearman: float = Field(
        0.2,
        ge=-1,
        le=1,
        description="below this Spearman(norm, count) richness falls back to min-max of log(1 + count)",
    )

    @model_validator(mode="after")
    def _shares(self) -> Features:
        check_modalities("features.content", self.content)
        if self.head_share + self.tail_share > 1:
            raise ValueError(
                f"features.head_share + features.tail_share is {self.head_share + self.tail_share:g}: must be at most 1"
            )
        if not 0 <= self.norm_percentiles[0] < self.norm_percentiles[1] <= 100:
            raise ValueError(f"features.norm_percentiles {self.norm_percentiles} must rise within 0 and 100")
        if self.split == "global_time" and not 0 < self.holdout < 0.5:
            raise ValueError(f"features.holdout is {self.holdout:g} but a global_time split needs it between 0 and 0.5")
        if not all(self.ranking_holdout) or sum(self.ranking_holdout) >= 1:
            raise ValueError(
                f"features.ranking_holdout is {list(self.ranking_holdout)}: two shares above 0 that leave a training "
                "part, such as [0.05, 0.1]"
            )
        return self


class Behavior(Section):
    source: Literal["sasrec", "column"] = Field(
        "sasrec", description="sasrec: train it; column: items bring a 'behavior' vector"
    )
    refresh: Literal["always", "keep"] = Field(
        "always",
        description="always: train again where the sequences have changed; keep: those of an earlier run serve. "
        "Nightly runs use those that are there",
    )
    width: int = Field(64, ge=2, description="width of the behaviour embedding")
    blocks: int = Field(2, ge=1, description="transformer blocks")
    heads: int = Field(1, ge=1, description="attention heads")
    max_length: int = Field(20, ge=1, description="events of history that the model sees")
    dropout: Share = Field(0.5, description="dropout on embeddings, attention and feed-forward")
    epochs: int = Field(40, ge=1, description="upper bound of epochs")
    patience: int = Field(5, ge=1, description="epochs without a better validation NDCG@10 before stopping")
    batch_users: int = Field(256, ge=2, description="users a step, all workers together")
    negatives: int = Field(1024, ge=1, description="in-batch negatives a step, drawn from the targets of all workers")
    table_lr: float = Field(
        0.05, gt=0, description="learning rate of row-wise Adagrad for the item table (only rows of the batch)"
    )
    lr: float = Field(0.001, gt=0, description="Adam learning rate of everything else")
    eval_users: int = Field(25_000, ge=1, description="users scored at each validation, at most")
    norm_checkpoint: Literal["early", "best"] = Field(
        "early",
        description="early: norms of the epoch of highest Spearman(norm, count); best: of the best validation epoch",
    )
    early_epochs: int = Field(10, ge=1, description="the early checkpoint is chosen among this many first epochs")

    @model_validator(mode="after")
    def _heads(self) -> Behavior:
        if self.width % self.heads:
            raise ValueError(f"behavior.width {self.width} is not a multiple of behavior.heads {self.heads}")
        return self


class Gates(Section):
    min_utilisation: Share = Field(0.5, description="lowest share of used codes that any codebook may have")
    max_collision: Share = Field(0.5, description="highest share of items whose SID is not unique")
    max_group: int = Field(1000, ge=1, description="largest number of items that may share one SID")


class Sids(Section):
    batch: int = Field(1024, ge=1, description="items encoded at a time")
    artifact: str | None = Field(None, description="folder of another tokenizer artifact; null: the one of this config")
    gates: Gates = Field(Gates(), description="what a table must satisfy to be published")
    replace: bool = Field(False, description="true: churn and removals may be of any size, a replacement on purpose")


def _spark_text(value: object) -> object:
    """Format a number or a boolean as Spark spells it."""
    return str(value).lower() if isinstance(value, (bool, int, float)) else value


class Spark(Section):
    master: str = Field("local[*]", description="used when the job is not started by spark-submit")
    driver_memory: str = Field("4g", description="used when the job is not started by spark-submit")
    shuffle_partitions: int | None = Field(
        None,
        ge=1,
        description="spark.sql.shuffle.partitions; null: by the size of a stage's input, one for 32 MiB of its files "
        "and at least two a core, of which Spark's adaptive execution joins small ones. A value of spark-submit or "
        "spark-defaults.conf wins",
    )
    scores_from: int = Field(
        5_000_000,
        ge=1,
        description="ranking: from so many test samples on, workers leave their scores in Parquet and Spark computes "
        "AUC and GAUC",
    )
    conf: dict[str, Annotated[str, BeforeValidator(_spark_text)]] = Field(
        {},
        description="further Spark settings, key: value",
    )


class Ray(Section):
    workers: int = Field(2, ge=0, description="training workers; 0 trains in the job's own process, without Ray")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs reserved (and threads used) by a worker")
    gpus: Literal["auto", "never"] = Field(
        "auto", description="auto: a GPU a worker, and no more workers than GPUs where the cluster has any"
    )
    address: str | None = Field(None, description="a running cluster; null: RAY_ADDRESS, else a local one is started")
    scratch: str | None = Field(
        None,
        description="folder on a disk of each worker for vectors that are memory-mapped (above 4 GiB a worker); null: "
        "the system's temporary folder",
    )
    max_failures: int = Field(
        2, ge=0, description="worker deaths after which training gives up; each restart resumes from the checkpoint"
    )


class Categories(Section):
    file: str = Field(description="Parquet with item_id and the column below")
    column: str = Field("categories", description="a text, or a list of texts from the broadest category down")
    depth: int = Field(3, ge=1, description="of a list so many levels make the category")


class Compare(Section):
    tokenizers: dict[str, AnyTokenizer] = Field(
        {},
        description="label -> tokenizer section: what jobs/compare_tokenizers.py trains on the same features; "
        "{like: LABEL, ...} is the section of that label with other values",
    )
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = Field(
        (17,), description="seeds of each of them"
    )
    more_seeds: dict[str, Annotated[tuple[int, ...], Field(strict=False)]] = Field(
        {}, description="label -> further seeds"
    )
    sample: int = Field(50_000, ge=100, description="items, evenly spaced by popularity, on which codes are probed")
    queries: int = Field(2_000, ge=1, description="of these, items whose neighbours are looked at, evenly spaced")
    neighbours: int = Field(
        10, ge=1, description="neighbours by shared codes that are compared with an item by category"
    )
    near_duplicate: float = Field(
        0.95, gt=0, le=1, description="cosine of content from which two items are near-duplicates"
    )
    categories: Categories | None = Field(
        None, description="where the items' categories are; null: the topics of a synthetic catalogue, else none"
    )

    @model_validator(mode="after")
    def _labels(self) -> Compare:
        for label in self.more_seeds:
            if label not in self.tokenizers:
                raise ValueError(f"compare.more_seeds.{label}: compare.tokenizers has no such label")
        return self


class Explore(Section):
    items: int = Field(
        20_000, ge=1, le=20_000, description="items on the page, an equal share of head, mid, tail and cold"
    )
    pictures: int = Field(2_000, ge=0, description="of these, the most popular of each stratum have their picture")
    picture_pixels: int = Field(96, ge=16, le=512, description="longer side of a picture")


class Storage(Section):
    options: dict[str, str] = Field(
        {},
        description="environment variables of the object store's clients that are no secret, such as AWS_ENDPOINT_URL "
        "and AWS_REGION; the environment itself wins",
    )

    @model_validator(mode="after")
    def _no_secret(self) -> Storage:
        if secret := next((name for name in self.options if names_secret(name)), None):
            raise ValueError(f"storage.options.{secret} is a secret: set it in the environment of the job instead")
        return self


class Tracking(Section):
    uri: str | None = Field(None, description="MLflow tracking server; null: sqlite in the run's folder")
    timeout: float = Field(
        5.0,
        gt=0,
        description="seconds to wait for an answer of the server, twelve times that for an upload; what it has not "
        "taken by then goes to <run>/mlflow-spool, and the next stage that reaches it sends that first",
    )
    experiment: str = Field("adasid", description="MLflow experiment")
    model: str | None = Field(None, description="name in the model registry; null: adasid-<run name>")
