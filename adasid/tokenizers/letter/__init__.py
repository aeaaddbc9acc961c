"""This package defines LETTER: its settings here, the class in ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adasid.tables import BEHAVIOR
from adasid.tokenizers.rq_vae import RqVaeSettings

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


class LetterSettings(RqVaeSettings):
    """LETTER (arXiv 2405.07314): RQ-VAE with collaborative and diversity regularisation."""

    name: Literal["letter"] = Field(  # type: ignore[assignment]
        "letter", description="RQ-VAE whose latent matches behaviour, with diverse codebooks"
    )
    collaborative_weight: float = Field(0.02, ge=0, description="weight of L_CF")
    diversity_weight: float = Field(1e-4, ge=0, description="weight of L_div")
    diversity_groups: int = Field(10, ge=2, description="groups of codewords of a level, formed again every epoch")
    sinkhorn: float = Field(
        0.003,
        ge=0,
        description="entropy of the balanced assignment of the last level in training; 0: nearest code",
    )
    sinkhorn_rounds: int = Field(50, ge=1, description="row and column normalisations of that assignment")

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.letter.model import Letter

        return Letter(self, widths)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the content modalities, then behaviour."""
        return (*self.content, BEHAVIOR)
