"""This package defines RQ-VAE and RQ-VAE++: their settings here, the classes in ``model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from adasid.tables import BEHAVIOR
from adasid.tokenizers.settings import ContentSettings, Experts, ResidualSettings, check_slots

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


class RqVaeSettings(ContentSettings, ResidualSettings):
    """RQ-VAE (TIGER, arXiv 2305.05065): residual quantization of one content latent."""

    name: Literal["rq-vae"] = Field("rq-vae", description="residual quantization of the content")
    levels: int = Field(6, ge=1, description="codebooks, each of the residual of the one before (L)")

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.rq_vae.model import RqVae

        return RqVae(self, widths)


class RqVaePlusSettings(ResidualSettings):
    """RQ-VAE++ (a baseline of arXiv 2510.25622 v1): one RQ-VAE for each modality."""

    name: Literal["rq-vae++"] = Field(
        "rq-vae++",
        description="a residual quantizer for each modality, behaviour among them",
    )
    levels: Experts = Field(
        {"text": 2, "visual": 2, BEHAVIOR: 2},
        description="codebooks of each modality; not given: two for each of features.content and behaviour",
    )

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.rq_vae.model import RqVaePlus

        return RqVaePlus(self, widths)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the modalities of ``levels``."""
        return tuple(self.levels)

    @classmethod
    def reading(cls, content: Sequence[str]) -> dict[str, Any]:
        """Return two codebooks for each modality of ``content`` and for behaviour."""
        return {"levels": dict.fromkeys([*content, BEHAVIOR], 2)}

    @model_validator(mode="after")
    def _levels(self) -> RqVaePlusSettings:
        check_slots("levels", self.levels, behavior=True)
        return self
