"""This module defines the settings of the encoders of raw text and pictures."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from adasid.config.names import check_modalities
from adasid.settings import Names, Section

TF_IDF = "tf-idf"
"""Name of the text encoder that needs no download."""


AMAZON_TEXTS = ("title", "brand", "categories", "description")
"""Text fields of the Amazon files, in all releases; ``brand`` is ``store`` in the latest."""


class Encoder(Section):
    model: str = Field(
        TF_IDF,
        min_length=1,
        description="of text: tf-idf (hashed words and a random projection, no download), or a sentence-transformers "
        "model; of pictures: a vision or CLIP-like model of transformers; a model is the name of a repository of "
        "the Hugging Face hub, or a local folder",
    )
    revision: str | None = Field(
        None, description="commit of the hub's repository; null: that of the first use, which later runs keep"
    )
    fields: Names = Field((), description="text fields of an item, joined in this order; empty for pictures")
    field: str | None = Field(
        None, description="the item's picture: bytes, a path, or a URI of the lake's storage; null for text"
    )
    width: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="the first so many values of a vector are kept and scaled to norm 1 (Matryoshka models allow it); "
        "null: all of a model, 256 of tf-idf",
    )
    prompt: str = Field(
        "", description="text put before each text, such as the instruction that a model was trained with"
    )
    batch: int = Field(32, ge=1, description="items that the model encodes at a time")
    max_chars: int = Field(8192, ge=1, description="a longer text is cut")
    max_bytes: int = Field(20_000_000, ge=1, description="a larger picture file is refused")
    max_pixels: int = Field(50_000_000, ge=1, description="a picture with more pixels is refused before it is decoded")
    web: bool = Field(
        False,
        description="whether pictures may be fetched from public http and https addresses; those of private networks "
        "need an entry in content.roots",
    )

    @property
    def read(self) -> tuple[str, ...]:
        """Return the raw fields that it reads."""
        return (*self.fields, *((self.field,) if self.field else ()))


class Content(Section):
    encoders: dict[str, Encoder] = Field(
        {},
        description="modality -> encoder of the items' raw text or picture; other modalities of features.content are "
        "vectors that the source brings",
    )
    offline: bool = Field(False, description="true: models come from local folders and the hub's local cache only")
    actors: Annotated[int, Field(ge=1)] | None = Field(
        None, description="encoding processes; null: one a GPU, without GPUs ray.workers"
    )
    roots: Names = Field(
        (),
        description="folders, buckets and addresses from which pictures may be read besides the folder of the source, "
        "such as /mnt/pictures, s3://shop/pictures or https://images.example",
    )
    part_items: int = Field(
        2048, ge=1, description="items of a part: an interrupted job loses the parts at work and keeps the others"
    )
    replace: bool = Field(
        False, description="true: encode all items again where an encoder is another than that of the published vectors"
    )

    @model_validator(mode="after")
    def _names(self) -> Content:
        check_modalities("content.encoders", self.encoders)
        for modality, encoder in self.encoders.items():
            key = f"content.encoders.{modality}"
            if bool(encoder.fields) == bool(encoder.field):
                raise ValueError(f"{key} must read text or a picture: set either fields, a list, or field, one name")
            if encoder.field and encoder.model == TF_IDF:
                raise ValueError(f"{key}.model is {TF_IDF!r}, which encodes text only: name a vision model")
            if encoder.field and encoder.field.lower() == "title":
                raise ValueError(f"{key}.field is 'title', which is text: name the column of pictures")
            if encoder.prompt and (encoder.field or encoder.model == TF_IDF):
                raise ValueError(f"{key}.prompt has no effect on {encoder.model}: leave it out")
            for name in encoder.read:
                if name.lower() == "item_id" or not name.strip():
                    raise ValueError(f"{key} reads {name!r}, which says nothing about the content: leave it out")
        texts, pictures = self.raw()
        lower = [name.lower() for name in (*texts, *pictures)]
        if twice := next((name for name in lower if lower.count(name) > 1), None):
            raise ValueError(f"content.encoders reads {twice!r} under two spellings, or as text and as a picture")
        return self

    def raw(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the raw fields of items that are read: those of text, and pictures."""
        texts = dict.fromkeys(name for encoder in self.encoders.values() for name in encoder.fields)
        pictures = dict.fromkeys(encoder.field for encoder in self.encoders.values() if encoder.field)
        return tuple(texts), tuple(pictures)
