"""This package defines ADA-SID, the first version of ADC-SID: its settings here, the class in ``model``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from adasid.settings import Share
from adasid.tokenizers.adc_sid import AdcSidSettings, Distance, Router, Start
from adasid.tokenizers.settings import Revival, Training

if TYPE_CHECKING:
    from adasid.tokenizers.base import Tokenizer

_MEANING = {key: field.description for key, field in AdcSidSettings.model_fields.items()}


class AdaSidSettings(AdcSidSettings):
    """ADA-SID (arXiv 2510.25622 v1): behaviour aligned to text + image, item-specific sparsity, SIDs of variable
    length."""

    name: Literal["ada-sid"] = Field(  # type: ignore[assignment]
        "ada-sid",
        description="first version of ADC-SID; inactive slots become PAD",
    )
    shared_experts: int = Field(1, ge=1, description=_MEANING["shared_experts"])
    start: Start = Field("random", description=_MEANING["start"])
    distance: Distance = Field("cosine", description=_MEANING["distance"])
    damping: Share = Field(0.0, description=_MEANING["damping"])
    count_power: Share = Field(0.0, description=_MEANING["count_power"])
    expert_lr: Share = Field(1.0, description=_MEANING["expert_lr"])
    behavior_experts: int = Field(5, ge=1, description=_MEANING["behavior_experts"])
    threshold: float = Field(0.0, ge=0, description="a behaviour slot whose weight is not above it becomes PAD")
    router: Router = Field(Router(sparsity=0.4, item_weight=0.1), description="dynamic behaviour gate")
    revival: Revival = Field(Revival(), description=_MEANING["revival"])  # type: ignore[assignment]
    training: Training = Field(Training(), description=_MEANING["training"])  # type: ignore[assignment]

    def build(self, widths: Mapping[str, int]) -> Tokenizer:
        """Return the untrained tokenizer."""
        from adasid.tokenizers.ada_sid.model import AdaSid

        return AdaSid(self, widths)
