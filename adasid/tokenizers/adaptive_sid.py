"""AdaSID (config key ``adasid``) is an RQ-VAE with other defaults, so it needs no class of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adasid.tokenizers.rq_vae import RqVaeSettings
from adasid.tokenizers.settings import Adaptive, Contrast, Repulsion


class AdaptiveSidSettings(RqVaeSettings):
    """AdaSID (arXiv 2604.23522): residual quantization, repulsion regulated by similarity, load and progress."""

    name: Literal["adasid"] = Field(  # type: ignore[assignment]
        "adasid",
        description="RQ-VAE with adaptive repulsion and co-engaged pairs",
    )
    repulsion: Repulsion | None = Field(Adaptive(kind="adaptive"), description="repulsion of items whose SIDs overlap")
    contrast: Contrast | None = Field(
        Contrast(weight=(0.0, 0.1), progress=(0.1, 0.9)),
        description="contrastive loss on co-engaged pairs",
    )
