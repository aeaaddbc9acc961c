"""This module defines the settings of the sources of items and interactions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from adasid.config.names import is_table_name
from adasid.settings import Section, Share


class Synthetic(Section):
    items: int = Field(20_000, ge=10, description="catalogue size")
    users: int = Field(20_000, ge=10, description="number of users")
    interactions: int = Field(400_000, ge=100, description="expected number of interactions, all users together")
    topics: int = Field(30, ge=2, description="planted clusters of items")
    popularity_exponent: float = Field(0.9, ge=0.0, description="Zipf exponent of item popularity")
    text_width: int = Field(128, ge=2, description="width of the text embedding")
    visual_width: int = Field(64, ge=2, description="width of the visual embedding")
    content_noise: float = Field(
        0.8, ge=0.0, description="norm of the noise on a content vector; the topic vector has norm 1"
    )
    near_duplicates: float = Field(
        0.0, ge=0.0, le=0.5, description="share of items whose content is nearly that of another item of their topic"
    )
    missing_visual: Share = Field(0.05, description="share of items that have no visual embedding")
    behavior_width: int = Field(
        0, ge=0, description="0: no behaviour is planted, SASRec learns it; else the width of a planted vector"
    )
    behavior_noise: float = Field(
        2.0, ge=0.0, description="planted behaviour = topic + noise of norm behavior_noise / sqrt(1 + count)"
    )
    chunk_users: int = Field(10_000, ge=1, description="users generated at a time by one Spark task")

    @model_validator(mode="after")
    def _activity(self) -> Synthetic:
        if self.interactions < 5 * self.users:
            raise ValueError(
                f"source.synthetic.interactions {self.interactions} is less than 5 a user for {self.users} users: "
                "raise it, or lower users"
            )
        return self


class TablesSource(Section):
    items: str = Field(
        description="path of the items table, or its name in Spark's catalogue (main.recsys.items): item_id, one array "
        "column a modality, optional title"
    )
    interactions: str = Field(
        description="path or name of the interactions table: user_id, item_id, timestamp or pos, "
        "optional rating or label"
    )
    format: Literal["parquet", "delta"] = Field(
        "parquet", description="format of tables that are named by a path; the catalogue knows that of the others"
    )
    in_place: Annotated[tuple[Literal["items", "interactions"], ...], Field(strict=False)] = Field(
        (),
        description="Delta tables that are not copied into the lake: all stages read the source at the version that "
        "ingest has checked, which must stay readable",
    )

    @model_validator(mode="after")
    def _delta(self) -> TablesSource:
        for table in self.in_place:
            if self.format != "delta" and not is_table_name(getattr(self, table)):
                raise ValueError(
                    f"source.tables.in_place names {table!r}, a path, but source.tables.format is {self.format!r}: "
                    "only Delta tables have versions that can be read in place; set format: delta, or take it out"
                )
        return self


class ArraysSource(Section):
    folder: str = Field(description="folder that holds the files named below")
    items: str = Field(
        "items.parquet", description="rows of the arrays: Parquet with item_id, or a text file with one id a line"
    )
    interactions: str = Field("interactions.parquet", description="Parquet: user_id, item_id, timestamp and/or pos")
    embeddings: dict[str, str] = Field(description="modality -> .npy file, row i belongs to row i of items")


class AmazonSource(Section):
    reviews: str = Field(description="reviews as downloaded (JSON lines, .gz or not)")
    metadata: str = Field(description="product metadata as downloaded (JSON lines, .gz or not)")
    pictures: str | None = Field(
        None,
        description="folder of downloaded pictures, each under the last part of its address; null: the field image has "
        "the addresses, and its encoder needs web: true",
    )


class FolderSource(Section):
    folder: str = Field(description="folder that holds what is named below")
    items: str = Field("items.csv", description="CSV with a header, or Parquet: item_id, and raw fields")
    interactions: str = Field(
        "interactions.csv", description="CSV with a header, or Parquet: user_id, item_id, timestamp and/or pos"
    )
    pictures: str = Field("pictures", description="folder of the pictures, to which paths in the field image refer")
    suffix: str | None = Field(
        None, description="such as .jpg: an item's picture is its item_id with this suffix; null: the field image says"
    )


class Source(Section):
    kind: Literal["synthetic", "tables", "arrays", "amazon", "folder"] = Field(
        "synthetic", description="which reader; its section below must be the only one given"
    )
    synthetic: Synthetic | None = Field(None, description="the synthetic long-tail catalogue with a planted truth")
    tables: TablesSource | None = Field(None, description="Parquet or Delta tables")
    arrays: ArraysSource | None = Field(None, description="embedding arrays beside a table")
    amazon: AmazonSource | None = Field(None, description="the public Amazon review files")
    folder: FolderSource | None = Field(None, description="a table of items beside a folder of pictures")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind", "synthetic") == "synthetic" and data.get("synthetic") is None:
            return {**data, "synthetic": {}}
        return data

    @model_validator(mode="after")
    def _one_section(self) -> Source:
        for kind in ("synthetic", "tables", "arrays", "amazon", "folder"):
            given = getattr(self, kind) is not None
            if given and kind != self.kind:
                raise ValueError(
                    f"source.{kind} is set but source.kind is {self.kind!r}: remove the section or set source.kind: "
                    f"{kind}"
                )
            if not given and kind == self.kind:
                raise ValueError(f"source.kind is {kind!r} but the section source.{kind} is missing: add it")
        return self
