"""This package defines ADA-SID, the first version of ADC-SID: its settings here, the class in ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adasid.settings import Share
from adasid.tokenizers.adc_sid import AdcSidSettings, Router
from adasid.tokenizers.settings import Revival, Training

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer


class AdaSidSettings(AdcSidSettings):
    """ADA-SID (arXiv 2510.25622 v1): behaviour aligned to text + image, item-specific sparsity, SIDs of variable
    length."""

    name: Literal["ada-sid"] = Field(  # type: ignore[assignment]
        "ada-sid",
        description="first version of ADC-SID; inactive slots become PAD",
    )
    shared_experts: int = Field(1, ge=1, description="experts that read all modalities (N_s)")
    start: Literal["axes", "random"] = Field(
        "random",
        description="axes: an expert begins as the linear map to the principal axes of what it reads, each modality in "
        "dimensions of its own; random: as a random network (the paper)",
    )
    distance: Literal["cosine", "euclidean"] = Field(
        "cosine", description="how the nearest codeword is found; cosine: by direction alone (the paper)"
    )
    damping: Share = Field(
        0.0,
        description="share of the codewords of shared slots and of earlier slots of its modality that a slot does not "
        "quantize again (eta); 0: slots are parallel (the paper)",
    )
    count_power: Share = Field(
        0.0,
        description="an item counts when codebooks are initialised by (its training interactions + 1) to this power",
    )
    behavior_experts: int = Field(5, ge=1, description="experts of the behaviour modality (N_b)")
    threshold: float = Field(0.0, ge=0, description="a behaviour slot whose weight is not above it becomes PAD")
    router: Router = Field(Router(sparsity=0.4, item_weight=0.1), description="dynamic behaviour gate")
    revival: Revival = Field(Revival(), description="revival of dead codes")  # type: ignore[assignment]
    training: Training = Field(Training(), description="the training loop")  # type: ignore[assignment]

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.ada_sid.model import AdaSid

        return AdaSid(self, widths)
