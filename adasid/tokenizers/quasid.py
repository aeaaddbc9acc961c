"""QuaSID is an RQ-VAE with other defaults, so it needs no class of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adasid.tokenizers.rq_vae import RqVaeSettings
from adasid.tokenizers.settings import Contrast, Hamr, Repulsion


class QuaSidSettings(RqVaeSettings):
    """QuaSID (arXiv 2603.00632): residual quantization, qualified repulsion, co-engaged pairs."""

    name: Literal["quasid"] = Field(  # type: ignore[assignment]
        "quasid", description="RQ-VAE with Hamming-guided repulsion and co-engaged pairs"
    )
    repulsion: Repulsion | None = Field(Hamr(kind="hamr"), description="repulsion of items whose SIDs overlap")
    contrast: Contrast | None = Field(Contrast(), description="contrastive loss on co-engaged pairs")
