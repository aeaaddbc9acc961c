"""This package defines DAS: its settings here, the class in ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adasid.tables import BEHAVIOR
from adasid.tokenizers.rq_vae import RqVaeSettings
from adasid.tokenizers.settings import Contrast

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


class DasSettings(RqVaeSettings):
    """DAS (arXiv 2508.10584), item side: RQ-VAE aligned with behaviour and with co-engaged items."""

    name: Literal["das"] = Field(  # type: ignore[assignment]
        "das", description="RQ-VAE aligned with behaviour and co-engagement (item side)"
    )
    behavior_weight: float = Field(0.1, ge=0, description="weight of the contrast of quantized content and behaviour")
    temperature: float = Field(0.07, gt=0, description="temperature of that contrast")
    contrast: Contrast | None = Field(Contrast(), description="contrast of the quantized vectors of co-engaged pairs")

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.das.model import Das

        return Das(self, widths)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the content modalities, then behaviour."""
        return (*self.content, BEHAVIOR)
