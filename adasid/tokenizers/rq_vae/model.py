"""RQ-VAE (TIGER, arXiv 2305.05065) and RQ-VAE++ (a baseline of arXiv 2510.25622 v1) quantize an encoder's latent
residually (methods 6.1, 6.7).

QuaSID and AdaSID are RQ-VAEs with ``repulsion`` and ``contrast`` set (methods 4, 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.experts import mlp
from adasid.quantizers.residual import Residual, ResidualCodebooks, residual_loss
from adasid.sid import Codes, slots_of
from adasid.tables import PAD
from adasid.tokenizers.base import Losses, sample
from adasid.tokenizers.rq_vae import RqVaePlusSettings, RqVaeSettings
from adasid.tokenizers.settings import ResidualSettings
from adasid.tokenizers.trained import TrainedTokenizer


class Tower(nn.Module):
    """A tower is the encoder, residual codebooks and decoder of the concatenated modalities ``reads``."""

    def __init__(self, settings: ResidualSettings, reads: tuple[str, ...], width: int, levels: int) -> None:
        super().__init__()
        self.reads = reads
        self.encoder = mlp([width, *settings.hidden, settings.latent_width])
        self.codebooks = ResidualCodebooks(levels, settings.codebook_size, settings.latent_width)
        self.decoder = mlp([settings.latent_width, *reversed(settings.hidden), width])


class Passed(NamedTuple):
    """``Passed`` contains the outputs of a tower for a batch: ``z`` [B, d], ``quantized``, ``straight`` [B, d]
    (straight-through: z in the gradient, z_q in value), ``there`` [B] bool (whether the item has the modality)."""

    z: Tensor
    quantized: Residual
    straight: Tensor
    there: Tensor


class _Residual(TrainedTokenizer):
    """A residual tokenizer has one tower or several, each with its own levels."""

    settings: ResidualSettings
    towers: nn.ModuleDict

    def __init__(
        self,
        settings: ResidualSettings,
        widths: Mapping[str, int],
        plan: Mapping[str, tuple[tuple[str, ...], int]],
    ) -> None:
        """Initialise the towers. ``plan``: name of a tower -> (modalities, levels); the name is the kind of its
        slots."""
        numbers = {kind: levels for kind, (_, levels) in plan.items()}
        super().__init__(settings, widths, slots_of(numbers, settings.codebook_size))
        self.towers = nn.ModuleDict()
        for kind, (reads, levels) in plan.items():
            self.towers[kind] = Tower(settings, reads, sum(self.widths[m] for m in reads), levels)
        self._last: dict[str, Passed] = {}

    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Compute the scales of the inputs."""
        self.inputs.fit(shard, workers)

    def tower(self, kind: str) -> Tower:
        """Return the tower with the name ``kind``."""
        tower = self.towers[kind]
        assert isinstance(tower, Tower)
        return tower

    def passed(
        self,
        x: dict[str, Tensor],
        batch: Batch,
        balanced: tuple[float, int] | None = None,
    ) -> dict[str, Passed]:
        """Compute every tower's latents and codes."""
        result, first = {}, 0
        for kind in self.towers:
            tower = self.tower(kind)
            previous = batch.previous.of(slice(first, first + len(tower.codebooks.weight))) if batch.previous else None
            first += len(tower.codebooks.weight)
            z = tower.encoder(torch.cat([x[m] for m in tower.reads], dim=1))
            quantized = tower.codebooks(z, balanced, previous)
            present = (
                batch.present[kind] if kind in batch.present else torch.ones_like(batch.richness, dtype=torch.bool)
            )
            result[kind] = Passed(
                z, quantized, z + (quantized.quantized - z).detach() if self.quantizing else z, present
            )
        return result

    def keep_codes(self, previous: Tensor) -> None:
        """Exclude the ``previous`` codes from revival."""
        for kind in self.towers:
            self.tower(kind).codebooks.kept = previous[[slot.kind == kind for slot in self.slots]]

    @torch.no_grad()
    def start_quantizing(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Initialise every level by k-means on the latents of a fixed sample of all workers' items (methods 9.3)."""
        for kind in self.towers:
            books, parts = self.tower(kind).codebooks, list[tuple[Tensor, Tensor]]()
            for part in sample(shard, workers, self.settings.kmeans_samples, kind):
                batch = part.to(self.quantizing.device)
                p = self.passed(self.inputs(batch), batch)[kind]
                previous = self.previous_codes(batch)[:, [slot.kind == kind for slot in self.slots]]
                parts.append((p.z[p.there], previous[p.there]))
            latents, previous = (workers.gather_ragged(torch.cat(part)) for part in zip(*parts))
            books.initialise(latents, self.settings.kmeans_rounds, generator, previous)
            workers.broadcast(books.weight.data)
        self.quantizing.fill_(True)

    def losses(self, batch: Batch, workers: Workers, progress: float) -> Losses:
        """Compute reconstruction + residual quantization + the terms of the subclass and the config."""
        s, x = self.settings, self.inputs(batch)
        passed = self.passed(x, batch, self.balanced() if self.quantizing else None)
        reconstruction = self.reconstruction(passed, x, batch)
        total, parts = s.reconstruction_weight * reconstruction, {"reconstruction": float(reconstruction.detach())}
        codes = self.codes_of(passed)
        z = torch.cat([p.z for p in passed.values()], dim=1)
        extra = (
            self.repelled(z, codes, batch, workers, progress),
            self.contrasted(self.paired_view(passed), batch, workers, progress),
            self.added(passed, x, batch, workers),
        )
        for loss, figures in extra:
            total, parts = total + loss, {**parts, **figures}
        if self.quantizing:
            codebook = self.quantization(passed)
            total = total + s.codebook_weight * codebook
            parts["codebook"] = float(codebook.detach())
            for kind, p in passed.items():
                books = self.tower(kind).codebooks
                books.used += workers.sum(books.counts(p.quantized.codes.T, p.there.expand(len(books.used), -1)))
            self._last = passed
        return Losses(total, {"loss": float(total.detach()), **parts})

    def quantization(self, passed: dict[str, Passed]) -> Tensor:
        """Compute L_rq of all towers."""
        return torch.stack(
            [residual_loss(p.quantized, p.there, self.settings.commitment) for p in passed.values()],
        ).sum()

    def balanced(self) -> tuple[float, int] | None:
        """Return the settings of the Sinkhorn assignment of the last level in training, or None."""
        return None

    def paired_view(self, passed: dict[str, Passed]) -> Tensor:
        """Return the vectors on which co-engaged pairs are contrasted: the latents before quantization."""
        return torch.cat([p.z for p in passed.values()], dim=1)

    def added(
        self,
        passed: dict[str, Passed],
        x: dict[str, Tensor],
        batch: Batch,
        workers: Workers,
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute further losses of a method."""
        return batch.richness.new_zeros(()), {}

    def reconstruction(self, passed: dict[str, Passed], x: dict[str, Tensor], batch: Batch) -> Tensor:
        """Compute the squared error, the mean over the dimensions of each modality (inputs have unit variance, so 1 is
        as bad as the mean); absent modalities do not count."""
        decoded = self.decoded({kind: p.straight for kind, p in passed.items()})
        return torch.stack([(((y - x[m]) ** 2).mean(1) * batch.present[m]).mean() for m, y in decoded.items()]).sum()

    def decoded(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decode each tower's latents to scaled vectors by modality."""
        result: dict[str, Tensor] = {}
        for kind, latent in latents.items():
            tower = self.tower(kind)
            result |= dict(zip(tower.reads, tower.decoder(latent).split([self.widths[m] for m in tower.reads], dim=1)))
        return result

    def codes_of(self, passed: dict[str, Passed]) -> Tensor:
        """Return the codes [B, L] int64; PAD where a tower's modality is absent."""
        return torch.cat([p.quantized.codes.masked_fill(~p.there[:, None], PAD) for p in passed.values()], dim=1)

    @torch.no_grad()
    def after_step(
        self,
        step: int,
        progress: float,
        workers: Workers,
        generator: torch.Generator,
    ) -> dict[nn.Parameter, Tensor]:
        """Revive dead codes every ``revival.every`` steps, from the residuals of all workers' last batch."""
        if not self.revival_due(step, progress):
            return {}
        replaced: dict[nn.Parameter, Tensor] = {}
        for kind, p in self._last.items():
            books = self.tower(kind).codebooks
            residuals = workers.gather(p.quantized.residuals.transpose(0, 1)).transpose(0, 1)
            present = workers.gather(p.there.to(torch.uint8)).bool().expand(len(residuals), -1)
            dead = books.revive(residuals, present, self.settings.revival.min_share, generator)
            replaced[books.weight] = dead[:, :, None].expand_as(books.weight)
        return replaced

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """Encode all levels; the weight is 1 where there is a code."""
        codes = self.codes_of(self.passed(self.inputs(batch), batch))
        return Codes(codes.int(), (codes != PAD).float(), codes != PAD)

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decode z_q to the scale of the inputs."""
        passed = self.passed(self.inputs(batch), batch)
        decoded = self.decoded({kind: p.quantized.quantized for kind, p in passed.items()})
        return {m: self.inputs.restore(m, y) for m, y in decoded.items()}


class RqVae(_Residual):
    """RQ-VAE has one tower over all content modalities; every item gets a SID."""

    settings: RqVaeSettings

    def __init__(self, settings: RqVaeSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths, {"shared": (settings.content, settings.levels)})


class RqVaePlus(_Residual):
    """RQ-VAE++ has a tower for each modality, including behaviour."""

    settings: RqVaePlusSettings

    def __init__(self, settings: RqVaePlusSettings, widths: Mapping[str, int]) -> None:
        super().__init__(settings, widths, {m: ((m,), levels) for m, levels in settings.levels.items()})
