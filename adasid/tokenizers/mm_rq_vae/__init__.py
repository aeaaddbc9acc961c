"""This package defines MM-RQ-VAE: its settings here, the class in ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from adasid.tables import BEHAVIOR
from adasid.tokenizers.rq_vae import RqVaePlusSettings

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


class MmRqVaeSettings(RqVaePlusSettings):
    """MM-RQ-VAE (MME-SID, arXiv 2509.02017): one RQ-VAE for each modality, distributions reconstructed, modalities
    aligned with behaviour."""

    name: Literal["mm-rq-vae"] = Field(  # type: ignore[assignment]
        "mm-rq-vae", description="RQ-VAE++ with MMD reconstruction and aligned modalities"
    )
    reconstruction: Literal["mmd", "mse"] = Field(
        "mmd",
        description="mmd: match the batch's distribution, as published; mse: each item",
    )
    reconstruction_weight: float = Field(3.0, ge=0, description="weight of L_recon")
    alignment: Literal["contrastive", "mmd"] = Field(
        "contrastive",
        description="contrastive: as in the paper; mmd: as in its code",
    )
    alignment_weight: float = Field(
        0.01,
        ge=0,
        description="weight of the alignment of each content modality with behaviour",
    )
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive alignment")

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.mm_rq_vae.model import MmRqVae

        return MmRqVae(self, widths)

    @model_validator(mode="after")
    def _behavior(self) -> MmRqVaeSettings:
        if BEHAVIOR not in self.levels:
            raise ValueError(
                f"tokenizer.levels of mm-rq-vae lacks {BEHAVIOR!r}, which the others are aligned with: add it",
            )
        return self
