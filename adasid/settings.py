"""The base of every settings model, and the types that they share. It imports no torch, and neither does any settings
model."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Names = Annotated[tuple[str, ...], Field(strict=False)]
Sizes = Annotated[tuple[int, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A mapping of the configuration: frozen, of strict types, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
