"""This module defines the base class of every settings model and the types that they share. No settings module imports
torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Names = Annotated[tuple[str, ...], Field(strict=False)]
Sizes = Annotated[tuple[int, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

NGrams = Literal["auto", "none"] | Annotated[tuple[Annotated[Names, Field(min_length=2)], ...], Field(strict=False)]
"""Combinations of slots, by their names, whose codes together are a further token of an item."""


class Section(BaseModel):
    """A section is a frozen mapping of the configuration, with strict types and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
