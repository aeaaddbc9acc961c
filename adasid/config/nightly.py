"""This module defines the settings of the nightly job: how new and changed items get their SIDs, and the gates for
publishing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adasid.settings import Section, Share

Policy = Literal["frozen", "warm", "refit"]
Exports = Annotated[tuple[Literal["parquet", "array", "index", "prefixes", "changes"], ...], Field(strict=False)]


class Warm(Section):
    epochs: int = Field(10, ge=1, description="epochs from the live tokenizer on, or rounds of a fitted one")
    lr: float = Field(0.0001, gt=0, description="learning rate at the start; cosine decay to 0")


class Auto(Section):
    """The policy ``auto`` checks these limits from ``refit`` down; the first that today's drift reaches decides."""

    refit_error: float = Field(
        1.3,
        ge=1,
        description="refit where a modality's quantization error is this many times that of the tokenizer's own data",
    )
    warm_error: float = Field(1.1, ge=1, description="warm where it is this many times")
    warm_norms: float = Field(
        0.25, gt=0, description="warm where a modality's norms have moved by this population stability index"
    )

    @model_validator(mode="after")
    def _order(self) -> Auto:
        if self.warm_error > self.refit_error:
            raise ValueError(
                f"retokenize.auto.warm_error {self.warm_error} is above refit_error {self.refit_error}: nothing would "
                "be warm"
            )
        return self


class NightlyGates(Section):
    """These gates apply in addition to ``sids.gates``."""

    max_tail_collision: Share = Field(0.5, description="highest share of tail and cold items whose SID is not unique")
    max_tail_group: int = Field(1000, ge=1, description="most tail and cold items of one SID")
    max_churn: Share = Field(0.1, description="highest share of the items of both generations whose SID changed")
    max_weighted_churn: Share = Field(0.1, description="the same, weighted by training events")
    max_removed: Share = Field(0.1, description="highest share of the live items that are gone")
    max_error_ratio: float = Field(
        1.5, ge=1, description="a modality's quantization error against that on the tokenizer's own data"
    )


class Lease(Section):
    seconds: float = Field(60.0, gt=0, description="a lease that was not renewed for so long is void")
    wait: float = Field(
        90.0,
        ge=0,
        description="seconds to wait for another run to end, or for the lease of a killed one, which takes "
        "`seconds`; 0: leave at once",
    )


class Retention(Section):
    """``jobs/maintain.py`` removes what is older, unless something needs it."""

    sources: int = Field(
        3, ge=1, description="generations whose sources, such as item_features, stay readable; the SIDs of `keep` stay"
    )
    exports: int = Field(7, ge=1, description="generations whose exported files stay")
    artifact_days: int = Field(
        30, ge=1, description="models stay so long after their last change; those that are in use stay longer"
    )
    tracking_days: int = Field(90, ge=1, description="files of MLflow's runs stay so long, their metrics always")
    rejected: int = Field(10, ge=1, description="runs of ingest and features whose rejected rows stay")


class Retokenize(Section):
    policy: Literal["frozen", "warm", "refit", "auto"] = Field(
        "frozen",
        description="frozen: live codebooks; warm: continue the training; refit: train from scratch and match the "
        "codes; auto: by drift, and frozen where "
        "the table of the other fails a gate",
    )
    slack: float = Field(
        0.1,
        ge=0,
        description="an item keeps a published code whose squared distance is at most 1 + slack times that of the "
        "nearest; 0: always the nearest",
    )
    refit_slack: float = Field(
        5.0,
        ge=0,
        description="the same while refit trains, divided by the share of training that is done: forced first, freer "
        "later; 0: trained freely",
    )
    warm: Warm = Field(Warm(), description="policy warm")
    auto: Auto = Field(Auto(), description="policy auto")
    gates: NightlyGates = Field(
        NightlyGates(),
        description="what a nightly run must satisfy beside sids.gates; write_sids too, of removals and churn",
    )
    lease: Lease = Field(Lease(), description="one run at a time")
    small_night: int = Field(
        100_000,
        ge=0,
        description="new, changed and removed items up to which a nightly run that keeps its codebooks works without "
        "Spark; 0: never",
    )
    small_table: int = Field(
        10_000_000,
        ge=0,
        description="live items up to which a nightly run may do without Spark: comparing and merging take up to 800 "
        "bytes for each in memory; where less is left, Spark does it",
    )
    sample: int = Field(20_000, ge=100, description="items, always the same ones, on which drift is measured")
    exports: Exports = Field(
        ("parquet", "array", "index", "prefixes", "changes"),
        description="files for consumers, below <run>/exports/<generation>",
    )
    keep: int = Field(30, ge=1, description="generations that jobs/maintain.py keeps, and that the report shows")
    lineage_days: int = Field(
        3,
        ge=0,
        description="jobs/maintain.py keeps the versions that a run in MLflow of so many days has read or written",
    )
    grace_hours: int = Field(48, ge=0, description="jobs/maintain.py: unused files of tables younger than this stay")
    retention: Retention = Field(Retention(), description="what else jobs/maintain.py keeps")
