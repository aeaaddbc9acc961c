"""This module defines the base of tokenizers trained by gradients: the losses that all of them can use by config, and
the revival of dead codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adasid.data.shards import Batch
from adasid.distributed import Workers
from adasid.losses.overlap import AdaptiveRepulsion, moved, pair_contrast, repulsion
from adasid.sid import Slot
from adasid.tables import PAD
from adasid.tokenizers.base import Tokenizer
from adasid.tokenizers.inputs import Inputs
from adasid.tokenizers.settings import TrainedSettings


class TrainedTokenizer(Tokenizer):
    """``TrainedTokenizer`` has the scaled ``inputs``, the ``overlap`` regulation and the flag ``quantizing`` (whether
    codebooks are in use)."""

    settings: TrainedSettings

    def __init__(self, settings: TrainedSettings, widths: Mapping[str, int], slots: Sequence[Slot]) -> None:
        super().__init__(settings, widths, slots)
        self.inputs = Inputs(self.widths)
        self.overlap = repulsion(settings.repulsion, len(self.slots))
        self.register_buffer("quantizing", torch.tensor(False))
        self.quantizing: Tensor

    def previous_codes(self, batch: Batch) -> Tensor:
        """Return the previous codes [B, L] of the items, PAD where they have none."""
        return (
            batch.previous.codes
            if batch.previous
            else torch.full((len(batch), len(self.slots)), PAD, device=batch.index.device)
        )

    def repelled(
        self, z: Tensor, codes: Tensor, batch: Batch, workers: Workers, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the repulsion of overlapping SIDs among this worker's rows, or 0 if not configured. ``z`` [B, d]:
        latents before quantization; ``codes`` [B, L]."""
        if self.overlap is None or not self.quantizing:
            return z.new_zeros(()), {}
        loss, figures = self.overlap(z, codes, batch.index, batch.paired, progress)
        if isinstance(self.overlap, AdaptiveRepulsion) and workers.world > 1:
            self.overlap.agree(lambda learned: workers.sum(learned) / workers.world)
        return loss, {"repulsion": float(loss.detach()), **figures}

    def contrasted(self, z: Tensor, batch: Batch, workers: Workers, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Compute the InfoNCE of co-engaged pairs on ``z`` [B, d] against all workers' rows, or 0 if not configured."""
        contrast = self.settings.contrast
        if contrast is None or batch.paired is None:
            return z.new_zeros(()), {}
        everyone, index = workers.gather_with_gradient(z), workers.gather(batch.index)
        loss = pair_contrast(
            z, batch.index, batch.paired, contrast.temperature, everyone, index, workers.rank * len(batch)
        )
        return moved(contrast.weight, contrast.progress, progress) * loss, {"contrast": float(loss.detach())}

    def no_decay(self) -> set[nn.Parameter]:
        """Return biases and codebooks."""
        return super().no_decay() | {p for name, p in self.named_parameters() if "codebooks" in name}

    def revival_due(self, step: int, progress: float) -> bool:
        """Return whether dead codes are replaced after this step."""
        revival = self.settings.revival
        return bool(self.quantizing) and step % revival.every == 0 and progress <= revival.until
