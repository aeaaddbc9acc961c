"""This module defines the base class of every settings model and the types that they share. No settings module imports
torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Names = Annotated[tuple[str, ...], Field(strict=False)]
Sizes = Annotated[tuple[int, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _distinct(ngram: Names) -> Names:
    if len(set(ngram)) < len(ngram):
        raise ValueError(f"{', '.join(ngram)}: an n-gram names each slot once")
    return ngram


NGram = Annotated[Names, Field(min_length=2), AfterValidator(_distinct)]
NGrams = Literal["auto", "none"] | Annotated[tuple[NGram, ...], Field(strict=False)]
"""Combinations of slots, by their names, whose codes together are a further token of an item."""


class Section(BaseModel):
    """A section is a frozen mapping of the configuration, with strict types and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
