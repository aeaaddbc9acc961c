"""This package defines OPQ: its settings here, the class in ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from adasid.tokenizers.settings import SpacesSettings

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


class OpqSettings(SpacesSettings):
    """OPQ (Ge et al., CVPR 2013, as RPG uses it): principal components, a learned rotation, one k-means for each
    sub-space; over the joint content, or for each modality."""

    name: Literal["opq"] = Field(
        "opq",
        description="optimised product quantization of the content, or of each modality; any number of codes",
    )
    width: int = Field(
        96,
        ge=1,
        description="principal components of a vector: at most as many as it has, and a multiple of its levels",
    )
    whiten: bool = Field(True, description="scale the components to unit variance")
    rounds: int = Field(30, ge=1, description="rounds of the fit")
    momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="engine own: momentum of the rotation along its last step",
    )
    engine: Literal["own", "faiss"] = Field(
        "own",
        description="own: any K; faiss: K a power of two, needs the faiss-cpu package",
    )

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.opq.model import Opq

        return Opq(self, widths)

    @property
    def parallel(self) -> bool:
        """Return True: sub-spaces do not depend on each other."""
        return True

    @model_validator(mode="after")
    def _width(self) -> OpqSettings:
        for levels in self.levels.values() if isinstance(self.levels, dict) else (self.levels,):
            if self.width % levels:
                fix = self.width // levels * levels or levels
                raise ValueError(
                    f"tokenizer.width {self.width} is not a multiple of tokenizer.levels {levels}: take {fix}",
                )
        if self.engine == "faiss" and self.codebook_size & (self.codebook_size - 1):
            size = f"tokenizer.codebook_size {self.codebook_size}"
            raise ValueError(f"tokenizer.engine is 'faiss' but {size} is not a power of two: use engine: own")
        if self.engine == "faiss" and self.count_power:
            raise ValueError(
                f"tokenizer.count_power is {self.count_power:g}, but tokenizer.engine is 'faiss', which weighs all "
                "items alike: use engine: own, or count_power: 0"
            )
        return self
