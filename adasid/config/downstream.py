"""This module defines the settings of the models on top of semantic IDs, and of their comparison."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adasid.settings import Names, NGrams, Section, Share

Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(strict=False)]


class Retrieval(Section):
    head: Literal["item", "parallel", "autoregressive"] = Field(
        "item",
        description="item: an item is the sum of its tokens; parallel: all tokens at once; autoregressive: one after "
        "the other, beam search",
    )
    ngrams: NGrams = Field(
        "auto",
        description="lists of slots, by name, whose codes together are a further token of an item; auto: prefixes of "
        "residual slots, pairs of parallel ones, and pairs across modalities; none",
    )
    ngram_rows: int = Field(32_768, ge=1, lt=2**31, description="rows of the table that n-grams are hashed into")
    ngram_min_items: int = Field(
        2,
        ge=1,
        description="an n-gram that fewer items with training events have is not used; from 2 on, no n-gram stands for "
        "one item, and new items are ranked better among the others",
    )
    ngram_dropout: Share = Field(
        0.2,
        description="share of items that are trained without their n-grams at a step, so that items without known "
        "n-grams, the new ones, are ranked well among the others",
    )
    width: int = Field(64, ge=2, description="width of tokens and states")
    blocks: int = Field(2, ge=1, description="transformer blocks of the encoder")
    decoder_blocks: int = Field(1, ge=1, description="transformer blocks of the autoregressive decoder")
    heads: int = Field(1, ge=1, description="attention heads")
    feedforward: int = Field(
        1, ge=1, description="hidden width of the blocks' feed-forward layers, in widths (SASRec: 1)"
    )
    max_length: int = Field(20, ge=1, description="events of history that the model sees")
    dropout: Share = Field(0.5, description="dropout on embeddings, attention and feed-forward")
    temperature: float = Field(0.07, gt=0, description="temperature of the token heads' cosine logits")
    repeatable: bool = Field(
        True,
        description="whether items of a user's history may be recommended again; false, where nobody takes an item "
        "twice: lists leave out those of the "
        "last features.max_length events",
    )
    inactive: Literal["keep", "pad"] = Field(
        "keep", description="an inactive slot's token: keep it, or pad: replace it by PAD"
    )
    weights: bool = Field(
        False, description="token heads: the tokenizer's weights of the target's behaviour tokens weigh their losses"
    )
    order: Literal["slots", "behavior"] = Field(
        "slots",
        description="autoregressive: tokens are decoded in the order of the slots, or those of behaviour before all "
        "others",
    )
    continuations: Literal["all", "valid"] = Field(
        "all",
        description="autoregressive: a token's probability is among all tokens of its slot, or among the valid ones: "
        "those with which the prefix leads "
        "to an item; the probabilities of all SIDs then sum to 1",
    )
    beam: int = Field(
        100, ge=100, description="autoregressive: width of the beam in the test; the deepest cut-off is 100"
    )
    validation_beam: int = Field(20, ge=10, description="the same in validation, which looks at the first 10")
    epochs: int = Field(40, ge=1, description="upper bound of epochs")
    patience: int = Field(5, ge=1, description="epochs without a better validation NDCG@10 before stopping")
    batch_users: int = Field(256, ge=2, description="users a step, all workers together")
    negatives: int = Field(
        1024,
        ge=0,
        description="item head: in-batch negatives a step, drawn from the targets of all workers; 0: all items (small "
        "catalogues)",
    )
    table_lr: float = Field(0.05, gt=0, description="Adagrad learning rate of the token table")
    lr: float = Field(0.001, gt=0, description="Adam learning rate of everything else")
    average: float = Field(
        0.998,
        ge=0,
        lt=1,
        description="decay, a step, of the moving average of the weights that is validated and tested; 0: the weights "
        "themselves",
    )
    eval_users: int = Field(25_000, ge=1, description="users scored at each validation, at most")
    test_users: int = Field(
        100_000,
        ge=1,
        description="users scored in the test, at most: all, or a fixed random sample; the result says how many they "
        "were",
    )

    @model_validator(mode="after")
    def _heads(self) -> Retrieval:
        if self.width % self.heads:
            raise ValueError(f"retrieval.width {self.width} is not a multiple of retrieval.heads {self.heads}")
        return self


class Ranking(Section):
    items: Literal["concat", "sum", "prefix"] = Field(
        "concat",
        description="an item's vector: its tokens' embeddings side by side, their sum, or the sum over prefixes "
        "(residual SIDs)",
    )
    ngrams: NGrams = Field(
        "auto", description="concat and sum: n-grams, as retrieval.ngrams, whose embeddings are added to that vector"
    )
    ngram_rows: int = Field(
        32_768, ge=1, lt=2**31, description="rows of the table that n-grams, or prefixes, are hashed into"
    )
    ngram_min_items: int = Field(1, ge=1, description="as retrieval.ngram_min_items; not for prefixes")
    weights: bool = Field(
        True,
        description="the tokenizer's weights scale the tokens' embeddings, and those of behaviour tokens are features",
    )
    inactive: Literal["keep", "pad"] = Field(
        "keep", description="an inactive slot's token: keep it, or pad: replace it by PAD"
    )
    width: int = Field(
        48,
        ge=1,
        description="width of users and items (concat: of all tokens together, rounded up to a multiple of their "
        "number)",
    )
    user_rows: int = Field(
        1_000_000,
        ge=1,
        lt=2**31,
        description="rows of the table of users, at most: of more users, several share a row (FNV-1a of user_index)",
    )
    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = Field(
        (64, 64, 64), min_length=1, description="widths of the hidden layers"
    )
    gate_hidden: int = Field(64, ge=1, description="hidden width of the gates")
    dropout: Share = Field(0.2, description="dropout on hidden layers")
    max_length: int = Field(20, ge=1, description="latest events of the history whose mean is a feature")
    labels: Literal["auto", "ratings", "sampled"] = Field(
        "auto",
        description="ratings: events are positive or negative by features.positive_rating; sampled: events against "
        "drawn items; auto: by the data",
    )
    negatives: int = Field(4, ge=1, description="sampled: items drawn for each event")
    negative_power: float = Field(
        0.75, ge=0, description="sampled: an item is drawn in proportion to its training count to this power"
    )
    batch: int = Field(4096, ge=2, description="samples a step, all workers together")
    table_lr: float = Field(
        0.05,
        gt=0,
        description="Adagrad learning rate of the table of users, and of those of items from 131072 rows on (lazy: "
        "only rows of the batch)",
    )
    lr: float = Field(0.001, gt=0, description="Adam learning rate of everything else")
    weight_decay: float = Field(1e-6, ge=0, description="weight decay; of those tables, that of the rows of the batch")
    epochs: int = Field(20, ge=1, description="upper bound of epochs")
    patience: int = Field(2, ge=1, description="epochs without a better validation AUC before stopping")
    eval_users: int = Field(100_000, ge=1, description="users whose samples are scored at each validation, at most")

    @model_validator(mode="after")
    def _prefixes(self) -> Ranking:
        if self.items == "prefix" and self.ngrams not in ("auto", "none"):
            raise ValueError(
                "ranking.ngrams lists n-grams, but ranking.items is 'prefix', whose n-grams are all prefixes: set "
                "items: concat or sum, or leave ngrams out"
            )
        return self


class Evaluate(Section):
    tokenizers: Names = Field((), description="labels of compare.tokenizers whose SIDs are evaluated")
    retrievers: dict[str, Retrieval] = Field(
        {},
        description="label -> retrieval section: each on the SIDs of each tokenizer, unless evaluate.models says which",
    )
    rankers: dict[str, Ranking] = Field({}, description="label -> ranking section: the same")
    controls: dict[str, Retrieval] = Field(
        {}, description="label -> retrieval section with head item: on one token an item instead of SIDs (SASRec)"
    )
    ranking_controls: dict[str, Ranking] = Field(
        {}, description="label -> ranking section: on item ids instead of SIDs"
    )
    parallel: int = Field(
        1, ge=1, description="cells in the making at a time; more than one needs ray.workers of at least 1"
    )
    published: Literal["none", "beauty"] = Field(
        "none", description="published results shown beside ours: those of this data set"
    )
    studies: dict[str, Names] = Field(
        {},
        description="heading -> labels of compare.tokenizers, the first of which the others are compared with "
        "(ablations, other constants); those that "
        "evaluate.tokenizers and evaluate.models do not name get the first retriever and all rankers",
    )
    reference: str = Field("adc-sid", description="label of evaluate.tokenizers that the others are compared with")
    seeds: Seeds = Field((17,), min_length=1, description="seeds of tokenizer and downstream model together")
    more_seeds: dict[str, Seeds] = Field({}, description="label of a tokenizer or control -> further seeds")
    models: dict[str, dict[str, Seeds]] = Field(
        {},
        description="label of a tokenizer -> label of a retriever or ranker -> seeds: only these cells, where not all "
        "models and seeds are wanted",
    )

    @property
    def repeatable(self) -> bool:
        """Return whether recommendation lists may contain items of the history; equal for all models that are
        compared."""
        return all(model.repeatable for model in (*self.retrievers.values(), *self.controls.values()))

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels of all tokenizers that are evaluated."""
        return tuple(dict.fromkeys((*self.tokenizers, *(label for study in self.studies.values() for label in study))))

    @model_validator(mode="after")
    def _labels(self) -> Evaluate:
        for title, study in self.studies.items():
            if len(set(study)) < max(2, len(study)):
                raise ValueError(f"evaluate.studies.{title}: name at least two tokenizers, each once")
        for label in self.more_seeds:
            if label not in (*self.labels, *self.controls, *self.ranking_controls):
                raise ValueError(f"evaluate.more_seeds.{label}: no tokenizer or control of evaluate has such a label")
        for label in set(self.retrievers) & set(self.rankers):
            raise ValueError(f"evaluate.retrievers and evaluate.rankers both name {label!r}: rename one")
        for label in self.tokenizers:
            if self.tokenizers.count(label) > 1:
                raise ValueError(f"evaluate.tokenizers names {label!r} twice: remove one")
        if self.tokenizers and self.reference not in self.tokenizers:
            raise ValueError(
                f"evaluate.reference is {self.reference!r}, which evaluate.tokenizers does not name: add it there, or "
                "name another"
            )
        return self

    @model_validator(mode="after")
    def _models(self) -> Evaluate:
        for label, chosen in self.models.items():
            if label not in self.labels:
                raise ValueError(f"evaluate.models.{label}: no tokenizer of evaluate has such a label")
            if label in self.more_seeds:
                raise ValueError(
                    f"evaluate.models.{label} names its seeds, and so does evaluate.more_seeds: remove one"
                )
            if not chosen or not all(chosen.values()):
                raise ValueError(
                    f"evaluate.models.{label}: name at least one model, each with at least one seed, or leave "
                    f"{label!r} out of evaluate"
                )
            for model in chosen:
                if model not in (*self.retrievers, *self.rankers):
                    raise ValueError(
                        f"evaluate.models.{label}.{model}: no retriever or ranker of evaluate has such a label"
                    )
        return self

    @model_validator(mode="after")
    def _controls(self) -> Evaluate:
        for label, settings in self.controls.items():
            if settings.head != "item":
                raise ValueError(
                    f"evaluate.controls.{label}.head is {settings.head!r}: one token an item has nothing to decode, "
                    "use head: item"
                )
        return self
