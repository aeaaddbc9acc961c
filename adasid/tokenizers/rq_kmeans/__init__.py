"""This package defines RQ-KMeans: its settings here, the class in ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from adasid.settings import Section, Share, Sizes
from adasid.tokenizers.settings import SpacesSettings, Training

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


class Aligner(Section):
    """The content encoder that is trained on co-engaged pairs before residual k-means (QARM)."""

    width: int = Field(64, ge=2, description="width of the aligned vector")
    hidden: Sizes = Field((512, 256), description="hidden widths of the encoder")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss on co-engaged pairs")
    training: Training = Field(Training(epochs=30), description="the training loop")


class RqKmeansSettings(SpacesSettings):
    """RQ-KMeans (OneRec, QARM): residual k-means without an encoder; plain, balanced, aligned, or one for each
    modality."""

    name: Literal["rq-kmeans"] = Field(
        "rq-kmeans",
        description="residual k-means: plain, balanced, with an aligner trained on pairs, or for each modality",
    )
    damping: Share = Field(
        1.0,
        description="share of the codewords of earlier slots that a slot does not quantize again (eta): 1: residual "
        "k-means, 0: parallel k-means, between: soft residual",
    )
    content_weight: float = Field(
        0.7,
        gt=0,
        description="weight of each content modality, against 1 for behaviour, in what shared slots of levels read",
    )
    balanced: bool = Field(False, description="fit with clusters of equal size")
    aligner: Aligner | None = Field(
        None,
        description="train a content encoder on co-engaged pairs first; null: raw vectors",
    )

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.rq_kmeans.model import RqKmeans

        return RqKmeans(self, widths)

    @property
    def parallel(self) -> bool:
        """Return whether slots do not depend on each other."""
        return not self.damping

    @property
    def pairs(self) -> bool:
        """Return whether there is an aligner, which learns from pairs."""
        return self.aligner is not None

    @property
    def epochs(self) -> Training | None:
        """Return the aligner's training loop."""
        return self.aligner.training if self.aligner else None

    @model_validator(mode="after")
    def _joint(self) -> RqKmeansSettings:
        if self.balanced and self.count_power:
            raise ValueError(
                f"tokenizer.balanced makes clusters of equal size, but tokenizer.count_power is {self.count_power:g}: "
                "set one of them"
            )
        if isinstance(self.levels, dict) and self.aligner:
            fault = "tokenizer.aligner encodes the joint content vector, but tokenizer.levels names modalities"
            raise ValueError(f"{fault}: give a number, or no aligner")
        return self
