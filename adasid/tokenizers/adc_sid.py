"""ADC-SID (arXiv 2510.25622 v3): mixture of quantization with shared and modality-specific experts, alignment whose strength
follows richness, and a dynamic behaviour gate. Equation numbers are the paper's; methods 1 says what is corrected and added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adasid import config
from adasid.experts import Trunk, mlp
from adasid.losses.alignment import alignment_weight, calibrated_beta, info_nce
from adasid.losses.routing import SparsityController, sparsity_loss
from adasid.quantizers.cosine import CosineCodebooks, Quantized, codebook_loss
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers.base import Codes, Losses, Slot, Tokenizer
from adasid.training.shards import Batch, Shard
from adasid.training.workers import Workers

_BINS = 10_000


class AdcSid(Tokenizer):
    """``widths``: width of each content modality of ``settings.content_experts`` and of ``behavior``.

    Slots: shared, content in config order, behaviour (methods 1.10). Shapes: B items, L slots, d latent width, h projector width.
    """

    def __init__(self, settings: config.AdcSid, widths: Mapping[str, int]) -> None:
        super().__init__()
        s = self.settings = settings
        self.modalities = (*s.content, BEHAVIOR)
        self.widths = {m: int(widths[m]) for m in self.modalities}
        experts = {"shared": s.shared_experts, **s.content_experts, BEHAVIOR: s.behavior_experts}
        letters = _letters(s.content)
        self.slots = tuple(Slot(f"{letters[kind]}{i}", kind, s.codebook_size) for kind, number in experts.items() for i in range(number))
        self.trunks = nn.ModuleDict()
        for m in self.modalities:
            gate = [(s.router.hidden, experts[m])] if m == BEHAVIOR or experts[m] > 1 else []
            self.trunks[m] = trunk = Trunk(self.widths[m], experts[m], s.hidden, s.latent_width, [(s.projector_width, s.projector_width), *gate])
        with torch.no_grad():
            trunk.get_parameter("heads.1.bias").fill_(1.0)  # the last trunk is behaviour's: its gate starts dense (ReMoE, stage I)
        self.shared = Trunk(len(self.modalities) * s.projector_width, s.shared_experts, s.hidden, s.latent_width)
        self.codebooks = CosineCodebooks(len(self.slots), s.codebook_size, s.latent_width)
        self.decoder = mlp([s.latent_width, *s.decoder_hidden, sum(self.widths.values())])
        self.sparsity = SparsityController(s.router.lambda_start, s.router.lambda_step)
        for m, width in self.widths.items():
            self.register_buffer(f"mean_{m}", torch.zeros(width))
            self.register_buffer(f"scale_{m}", torch.ones(()))
        self.register_buffer("beta", torch.tensor(0.0 if s.controller.beta == "calibrated" else float(s.controller.beta), dtype=torch.float64))
        self.register_buffer("theta", torch.zeros((), dtype=torch.float64))
        self.register_buffer("quantizing", torch.tensor(False))
        self.beta: Tensor
        self.theta: Tensor
        self.quantizing: Tensor
        self._last: tuple[Tensor, Tensor] | None = None

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Centred inputs of unit mean variance per dimension (one scalar a modality, so that norms keep their order); 0 where absent."""
        scaled = {}
        for m in self.modalities:
            x = (batch.vectors[m] - getattr(self, f"mean_{m}")) * getattr(self, f"scale_{m}")
            scaled[m] = x * batch.present[m][:, None]
        return scaled

    def _experts(self, x: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents [L, B, d] (eqs 4, 6), gate weights [L, B] (eqs 12, 13, 22; 0 where the modality is absent), projections [B, h] (eq 2)."""
        latents, weights, projections = {}, {}, {}
        for m in self.modalities:
            there = batch.present[m][:, None].to(x[m].dtype)
            latents[m], heads = self.trunks[m](x[m])
            projections[m] = heads[0] * there
            if m == BEHAVIOR:
                gates = self._scale(batch.richness)[:, None] * torch.relu(heads[1])
            else:
                gates = torch.softmax(heads[1], dim=1) if len(heads) > 1 else torch.ones_like(there)
            weights[m] = (gates * there).T
        z, _ = self.shared(torch.cat([projections[m] for m in self.modalities], dim=1))
        ones = torch.ones(z.shape[:2], dtype=z.dtype, device=z.device)
        return torch.cat([z, *latents.values()]), torch.cat([ones, *weights.values()]), projections

    def _scale(self, richness: Tensor) -> Tensor:
        """s(e_b) of the behaviour gate (eq 22): sigmoid(richness), or the alignment weight."""
        return torch.sigmoid(richness) if self.settings.router.scale == "sigmoid" else self._strength(richness)

    def _strength(self, richness: Tensor) -> Tensor:
        c = self.settings.controller
        return alignment_weight(richness, c.alpha, float(self.beta)) if c.enabled else torch.ones_like(richness)

    def _fuse(self, quantized: Quantized, weights: Tensor) -> tuple[Tensor, Tensor]:
        """z and z_q (eqs 10, 11) from unit-norm latents and codewords; [B, d] each."""
        w = weights[:, :, None]
        return (w * quantized.latents).sum(0), (w * quantized.codewords).sum(0)

    @torch.no_grad()
    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Means and scales of the inputs; theta (methods 1.7) and, if asked for, beta (methods 10 #14) from the richness of items with behaviour."""
        device = self.theta.device
        sums = {m: torch.zeros(width + 2, dtype=torch.float64) for m, width in self.widths.items()}
        histogram = torch.zeros(_BINS + 1, dtype=torch.float64)
        for batch in shard.scan():
            for m in self.modalities:
                x = batch.vectors[m].double()
                sums[m] += torch.cat([x.sum(0), (x * x).sum().reshape(1), batch.present[m].sum().double().reshape(1)])
            known = batch.richness[batch.present[BEHAVIOR]].double()
            histogram += torch.bincount((known * _BINS).round().long(), minlength=_BINS + 1)
        for m, width in self.widths.items():
            total = workers.sum(sums[m].to(device))
            mean = total[:width] / total[-1]
            variance = (total[width] / total[-1] - (mean * mean).sum()) / width
            getattr(self, f"mean_{m}").copy_(mean)
            getattr(self, f"scale_{m}").copy_(variance.clamp(min=1e-12).rsqrt())
        histogram = workers.sum(histogram.to(device)).cpu()
        grid = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)
        self.theta.fill_(self.settings.router.sparsity / max(1e-6, float((histogram * (1 - grid)).sum() / histogram.sum())))
        c = self.settings.controller
        if c.beta == "calibrated":
            quantile = grid[torch.searchsorted(histogram.cumsum(0), c.calibrated_share * histogram.sum()).clamp(max=_BINS)]
            self.beta.fill_(calibrated_beta(float(quantile), c.alpha))

    @torch.no_grad()
    def start_quantizing(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """k-means on the latents of a fixed sample of all workers' items (methods 9.3)."""
        share = -(-self.settings.kmeans_samples // workers.world)
        rows = np.unique(np.linspace(0, len(shard) - 1, min(share, len(shard))).round().astype(np.int64))
        found = [self._sample(shard.take(rows[start : start + 4096]).to(self.theta.device)) for start in range(0, len(rows), 4096)]
        latents, active = (workers.gather_ragged(torch.cat(part)) for part in zip(*found))
        self.codebooks.initialise(latents.transpose(0, 1), active.T, self.settings.kmeans_rounds, generator)
        workers.broadcast(self.codebooks.weight.data)
        self.quantizing.fill_(True)

    def _sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        latents, _, _ = self._experts(self._inputs(batch), batch)
        return latents.transpose(0, 1), self._present(batch).T

    def _present(self, batch: Batch) -> Tensor:
        """[L, B] bool: whether the item has the slot's modality."""
        rows = [torch.ones_like(batch.richness, dtype=torch.bool) if slot.kind == "shared" else batch.present[slot.kind] for slot in self.slots]
        return torch.stack(rows)

    def losses(self, batch: Batch, workers: Workers) -> Losses:
        """Total objective (methods 1.8): reconstruction + codebook + alignment + sparsity. Before ``start_quantizing``, without codebooks."""
        s = self.settings
        x = self._inputs(batch)
        latents, weights, projections = self._experts(x, batch)
        active = self._present(batch) & ((weights > 0) | self._content_slots()[:, None])
        quantized = self.codebooks(latents)
        z, z_q = self._fuse(quantized, weights)
        decoded = self.decoder(z + (z_q - z).detach() if self.quantizing else z)
        reconstruction = self._reconstruction(decoded, x, batch)
        alignment = self._alignment(projections, batch, workers)
        gates = weights[-s.behavior_experts :].T[batch.present[BEHAVIOR]]
        routing, figures = self._routing(gates, batch, workers)
        total = s.reconstruction_weight * reconstruction + s.alignment_weight * alignment + routing
        parts = {
            "reconstruction": float(reconstruction.detach()),
            "alignment": float(alignment.detach()),
            "routing": float(routing.detach()),
            **figures,
        }
        if self.quantizing:
            codebook = codebook_loss(quantized, active, s.commitment)
            total = total + s.codebook_weight * codebook
            parts["codebook"] = float(codebook.detach())
            self.codebooks.used += workers.sum(self.codebooks.counts(quantized.codes, active))
            self._last = (quantized.latents.detach(), active)
        return Losses(total, {"loss": float(total.detach()), **parts})

    def _content_slots(self) -> Tensor:
        return torch.tensor([slot.kind != BEHAVIOR for slot in self.slots], device=self.theta.device)

    def _reconstruction(self, decoded: Tensor, x: dict[str, Tensor], batch: Batch) -> Tensor:
        """Eq 14, each modality by its mean over dimensions (inputs have unit variance: 1 is as bad as the mean), absent ones left out."""
        parts = zip(self.modalities, decoded.split(list(self.widths.values()), dim=1))
        return torch.stack([(((y - x[m]) ** 2).mean(1) * batch.present[m]).mean() for m, y in parts]).sum()

    def _alignment(self, h: dict[str, Tensor], batch: Batch, workers: Workers) -> Tensor:
        """Eqs 18 to 21: content pairs both ways; each content modality (anchor) against behaviour, times the item's strength.
        Negatives are the other items of the batch on all workers; items that lack either side of a pair do not count."""
        gathered = {m: workers.gather_with_gradient(value) for m, value in h.items()}
        there = {m: workers.gather(value.to(torch.uint8)).bool() for m, value in batch.present.items()}
        own = torch.arange(len(batch), device=self.theta.device) + workers.rank * len(batch)
        ones = torch.ones_like(batch.richness)

        def one_way(anchor: str, target: str, weight: Tensor) -> Tensor:
            both = batch.present[anchor] & batch.present[target]
            loss = info_nce(h[anchor], gathered[target], own, self.settings.temperature, there[target])
            return (loss * weight * both).mean()

        content = self.settings.content
        pairs = [(a, b) for i, a in enumerate(content) for b in content[i + 1 :]]
        strength = self._strength(batch.richness)
        terms = [(one_way(a, b, ones) + one_way(b, a, ones)) / 2 for a, b in pairs] + [one_way(m, BEHAVIOR, strength) for m in content]
        return torch.stack(terms).sum()

    def _routing(self, gates: Tensor, batch: Batch, workers: Workers) -> tuple[Tensor, dict[str, float]]:
        """Methods 1.7: the loss, and the controller's move on the sparsity of all workers' items."""
        richness = batch.richness[batch.present[BEHAVIOR]].double()
        local = torch.cat(
            [
                (gates > 0).double().sum(0),
                (1 - richness).sum().reshape(1),
                torch.tensor([len(gates)], device=gates.device, dtype=torch.float64),
            ]
        )
        total = workers.sum(local)
        count = total[-1].clamp(min=1)
        share = (total[:-2] / count).to(gates.dtype)
        current = 1 - float(share.mean())
        target = min(max(float(self.theta * total[-2] / count), 0.0), 0.99)
        weight = float(self.sparsity.weight)
        loss = weight * sparsity_loss(gates, share, target)
        if self.training:
            self.sparsity.update(current, target)
        return loss, {"sparsity": current, "sparsity_target": target, "lambda": weight}

    @torch.no_grad()
    def after_step(self, step: int, progress: float, workers: Workers, generator: torch.Generator) -> dict[nn.Parameter, Tensor]:
        """Revive dead codes every ``revival.every`` steps, from the latents of all workers' last batch."""
        r = self.settings.revival
        if self._last is None or step % r.every or progress > r.until:
            return {}
        latents, active = self._last
        latents, active = workers.gather(latents.transpose(0, 1)).transpose(0, 1), workers.gather(active.T.to(torch.uint8)).T.bool()
        dead = self.codebooks.revive(latents, active, r.min_share, generator)
        return {self.codebooks.weight: dead[:, :, None].expand_as(self.codebooks.weight)}

    def no_decay(self) -> set[nn.Parameter]:
        """Biases and codebooks."""
        return super().no_decay() | {self.codebooks.weight}

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """Codes of all slots (PAD where the modality is absent); weights: 1, or R(e_b) for behaviour slots; active: weight > 0."""
        latents, weights, _ = self._experts(self._inputs(batch), batch)
        present = self._present(batch)
        codes = self.codebooks.codes(latents).masked_fill(~present, PAD)
        weights = torch.where(self._content_slots()[:, None], present.to(weights.dtype), weights)
        return Codes(codes.T.int(), weights.T.float(), (weights > 0).T)

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decode z_q back to the inputs' own scale."""
        latents, weights, _ = self._experts(self._inputs(batch), batch)
        decoded = self.decoder(self._fuse(self.codebooks(latents), weights)[1])
        parts = zip(self.modalities, decoded.split(list(self.widths.values()), dim=1))
        return {m: y / getattr(self, f"scale_{m}") + getattr(self, f"mean_{m}") for m, y in parts}

    def facts(self) -> Mapping[str, Any]:
        """The controller as used, and theta of the sparsity target."""
        c = self.settings.controller
        return {"controller": {"alpha": c.alpha, "beta": float(self.beta), "enabled": c.enabled}, "theta": float(self.theta)}


def _letters(content: tuple[str, ...]) -> dict[str, str]:
    """Short prefixes of the slots' names: s, b and, for content, the shortest start of its name that is unique."""
    letters = {"shared": "s", BEHAVIOR: "b"}
    for m in content:
        letters[m] = next(
            (m[:n] for n in range(1, len(m)) if m[:n] not in letters.values() and not any(o != m and o.startswith(m[:n]) for o in content)),
            m,
        )
    return letters
