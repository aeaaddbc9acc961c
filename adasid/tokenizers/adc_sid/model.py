"""ADC-SID (arXiv 2510.25622 v3) combines a mixture of quantization with shared and modality-specific experts, alignment
whose strength follows richness, and a dynamic behaviour gate.

Equation numbers are the paper's; methods 1 lists the corrections and additions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.experts import Trunk, mlp
from adasid.losses.alignment import alignment_weight, calibrated_beta, info_nce
from adasid.losses.routing import SparsityController, item_sparsity_loss, sparsity_loss
from adasid.quantizers.experts import ExpertCodebooks, Quantized, codebook_loss
from adasid.sid import Codes, PreviousCodes, slots_of
from adasid.tables import BEHAVIOR, PAD
from adasid.tokenizers.adc_sid import AdcSidSettings
from adasid.tokenizers.adc_sid.axes import Axes
from adasid.tokenizers.base import Losses, sampled
from adasid.tokenizers.settings import SHARED
from adasid.tokenizers.trained import TrainedTokenizer

_BINS = 10_000


class AdcSid(TrainedTokenizer):
    """ADC-SID reads ``widths``: width of each content modality of ``settings.content_experts`` and of ``behavior``.

    Slots: shared, content in config order, behaviour (methods 1.10). Shapes: B items, L slots, d latent width, h
    projector width.
    """

    settings: AdcSidSettings

    def __init__(self, settings: AdcSidSettings, widths: Mapping[str, int]) -> None:
        s = settings
        experts = {"shared": s.shared_experts, **s.content_experts, BEHAVIOR: s.behavior_experts}
        super().__init__(s, widths, slots_of(experts, s.codebook_size))
        self.modalities = s.inputs
        self.gated = s.router.gate != "equal"
        self.trunks, self.axes = nn.ModuleDict(), Axes(self.widths, s) if s.start == "axes" else None
        width, trained = self.axes.width if self.axes else s.latent_width, s.experts == "trained"
        for m in self.modalities:
            gate = [(s.router.hidden, experts[m])] if (self.gated if m == BEHAVIOR else experts[m] > 1) else []
            heads = [(s.projector_width, s.projector_width), *gate]
            self.trunks[m] = Trunk(self.widths[m], experts[m] if trained else 0, s.hidden, width, heads)
        if self.gated:
            with torch.no_grad():
                self.trunks[BEHAVIOR].get_parameter("heads.1.bias").fill_(1.0)  # the gate starts dense (ReMoE, stage I)
        joint = len(self.modalities) * s.projector_width
        self.shared = Trunk(joint, s.shared_experts, s.hidden, width) if trained else None
        if self.axes and self.shared:
            for trunk in self._all_trunks():  # the networks begin at zero, experts as the axes
                trunk.start_at_zero()
        kinds = [slot.kind for slot in self.slots]
        before = torch.tensor(
            [[j < i and kinds[j] in (SHARED, kind) for j in range(len(kinds))] for i, kind in enumerate(kinds)]
        )
        reads = torch.stack([self.axes.reads(kind) for kind in kinds]) if self.axes else None
        self.codebooks = ExpertCodebooks(len(self.slots), s.codebook_size, width, s.distance, s.damping, before, reads)
        self.unfreeze()
        self.decoder = mlp([width, *s.decoder_hidden, sum(self.widths.values())])
        self.sparsity = SparsityController(s.router.lambda_start, s.router.lambda_step)
        self.register_buffer(
            "beta",
            torch.tensor(0.0 if s.controller.beta == "calibrated" else float(s.controller.beta), dtype=torch.float64),
        )
        self.register_buffer("theta", torch.zeros((), dtype=torch.float64))
        self.beta: Tensor
        self.theta: Tensor
        self._last: tuple[Tensor, Tensor] | None = None

    def unfreeze(self) -> None:
        """Let all parameters be trained; not the codebooks where ``codebooks`` is ``fixed``."""
        self.requires_grad_(True)
        self.codebooks.weight.requires_grad_(self.settings.codebooks == "trained")

    def learning_rates(self) -> Mapping[nn.Parameter, float]:
        """Return ``expert_lr`` for the codebooks and the experts, but for their first layers where gates and projectors
        share these."""
        slow = [*self.codebooks.parameters(), *(p for trunk in self._all_trunks() for p in trunk.rest.parameters())]
        slow += self.shared.first.parameters() if self.shared else ()
        return dict.fromkeys(slow, self.settings.expert_lr)

    def _all_trunks(self) -> list[Trunk]:
        return [trunk for trunk in (*self.trunks.values(), self.shared) if isinstance(trunk, Trunk)]

    def _experts(self, x: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return latents [L, B, d] (eqs 4, 6), gate weights [L, B] (eqs 12, 13, 22; 0 where the modality is absent) and
        projections [B, h] (eq 2)."""
        latents, weights, projections = {}, {}, {}
        for m in self.modalities:
            present = batch.present[m][:, None].to(x[m].dtype)
            latents[m], heads = self.trunks[m](x[m])
            projections[m] = heads[0] * present
            if len(heads) == 1:
                gates = torch.ones_like(present).expand(-1, sum(slot.kind == m for slot in self.slots))
            elif m == BEHAVIOR:
                gates = self._scale(batch.richness)[:, None] * torch.relu(heads[1])
            else:
                gates = torch.softmax(heads[1], dim=1)
            weights[m] = (gates * present).T
        if self.shared:
            z, _ = self.shared(torch.cat([projections[m] for m in self.modalities], dim=1))
            latents = {SHARED: z, **latents}
        if self.axes:
            starts = self.axes(x)
            latents = {kind: starts[kind] + latents[kind] for kind in starts} if self.shared else starts
        counts = Counter(slot.kind for slot in self.slots)
        latents = {kind: z.expand(counts[kind], -1, -1) for kind, z in latents.items()}
        ones = torch.ones(counts[SHARED], len(batch), dtype=batch.richness.dtype, device=batch.richness.device)
        return torch.cat(list(latents.values())), torch.cat([ones, *weights.values()]), projections

    def _scale(self, richness: Tensor) -> Tensor:
        """Compute s(e_b) of the behaviour gate (eq 22): sigmoid(richness), or the alignment weight."""
        return torch.sigmoid(richness) if self.settings.router.scale == "sigmoid" else self._strength(richness)

    def _strength(self, richness: Tensor) -> Tensor:
        c = self.settings.controller
        return alignment_weight(richness, c.alpha, float(self.beta)) if c.enabled else torch.ones_like(richness)

    def _fuse(self, quantized: Quantized, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Compute z and z_q (eqs 10, 11), [B, d] each, from latents and codewords. With ``router.gate:
        switch`` an active behaviour slot has weight 1 in the sum, and its gate weight, clipped at 1, receives the
        gradient."""
        if self.settings.router.gate == "switch":
            straight = weights.clamp(max=1)
            weights = torch.where(
                self._content_slots()[:, None],
                weights,
                (weights > 0).to(weights.dtype) + straight - straight.detach(),
            )
        w = weights[:, :, None]
        return (w * quantized.latents).sum(0), (w * quantized.codewords).sum(0)

    def _straight_through(self, quantized: Quantized, weights: Tensor) -> Tensor:
        """Compute z_q [B, d] with a straight-through gradient (eq 14) per slot or for their sum; with the latter the
        gates also learn from the latents."""
        codes, latents, codewords = quantized
        if self.settings.straight_through == "sum":
            z, z_q = self._fuse(quantized, weights)
            return z + (z_q - z).detach()
        return self._fuse(Quantized(codes, latents, latents + (codewords - latents).detach()), weights)[1]

    @torch.no_grad()
    def prepare(self, shard: Shard, workers: Workers) -> None:
        """Compute the scales of the inputs, theta (methods 1.7) and, if configured, beta (methods 10 #14) from the
        richness of items with behaviour."""
        self.inputs.fit(shard, workers)
        if self.axes:
            self.axes.fit(self.inputs, shard, workers)
        histogram = torch.zeros(_BINS + 1, dtype=torch.float64)
        for batch in shard.scan():
            known = batch.richness[batch.present[BEHAVIOR]].double()
            histogram += torch.bincount((known * _BINS).round().long(), minlength=_BINS + 1)
        histogram = workers.sum(histogram.to(self.theta.device)).cpu()
        grid = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)
        self.theta.fill_(
            (self.settings.router.sparsity or 0.0) / max(1e-6, float((histogram * (1 - grid)).sum() / histogram.sum())),
        )
        c = self.settings.controller
        if c.beta == "calibrated":
            index = torch.searchsorted(histogram.cumsum(0), c.calibrated_share * histogram.sum())
            quantile = grid[index.clamp(max=_BINS)]
            self.beta.fill_(calibrated_beta(float(quantile), c.alpha))

    @torch.no_grad()
    def start_quantizing(self, shard: Shard, workers: Workers, generator: torch.Generator) -> None:
        """Initialise the codebooks by k-means on latents (methods 9.3): of slots of a modality on a fixed sample of all
        workers' items that have it, of shared slots on one of all items."""
        size, device = self.settings.kmeans_samples, self.theta.device
        drawn = {kind: sampled(shard, workers, size, kind) for kind in (SHARED, *self.modalities)}
        rows, parts = np.unique(np.concatenate(list(drawn.values()))), list[tuple[Tensor, Tensor, Tensor, Tensor]]()
        for start in range(0, len(rows), 4096):
            part = rows[start : start + 4096]
            within = {kind: torch.from_numpy(np.isin(part, of_kind)).to(device) for kind, of_kind in drawn.items()}
            batch = shard.take(part).to(device)
            assert batch.counts is not None
            active = self._present(batch).T & torch.stack([within[slot.kind] for slot in self.slots], dim=1)
            latents = self._experts(self.inputs(batch), batch)[0].transpose(0, 1)
            parts.append((latents, active, self.previous_codes(batch), batch.counts))
        latents, active, previous, counts = (workers.gather_ragged(torch.cat(part)) for part in zip(*parts))
        power = self.settings.count_power
        weights = ((counts + 1).double() ** power).to(latents.dtype) if power else None
        self.codebooks.initialise(
            latents.transpose(0, 1), active.T, self.settings.kmeans_rounds, generator, previous.T, weights
        )
        workers.broadcast(self.codebooks.weight.data)
        self.quantizing.fill_(True)

    def keep_codes(self, previous: Tensor) -> None:
        """Exclude the ``previous`` codes from revival."""
        self.codebooks.kept = previous

    def _present(self, batch: Batch) -> Tensor:
        """Return whether the item has the slot's modality, [L, B] bool."""
        present = {"shared": torch.ones_like(batch.richness, dtype=torch.bool), **batch.present}
        return torch.stack([present[slot.kind] for slot in self.slots])

    def losses(self, batch: Batch, workers: Workers, progress: float) -> Losses:
        """Compute the total objective (methods 1.8): reconstruction + codebook + alignment + sparsity. Before
        ``start_quantizing`` latents are not quantized."""
        s = self.settings
        x = self.inputs(batch)
        latents, weights, projections = self._experts(x, batch)
        active = self._present(batch) & ((weights > 0) | self._content_slots()[:, None])
        quantized = self.codebooks(latents, self._previous(batch)) if self.quantizing else self.codebooks.exact(latents)
        z, _ = self._fuse(quantized, weights)
        decoded = self.decoder(self._straight_through(quantized, weights) if self.quantizing else z)
        reconstruction = self._reconstruction(decoded, x, batch)
        total, parts = s.reconstruction_weight * reconstruction, {"reconstruction": float(reconstruction.detach())}
        if s.alignment_weight and s.experts == "trained":
            alignment = self._alignment(projections, batch, workers)
            total, parts["alignment"] = total + s.alignment_weight * alignment, float(alignment.detach())
        extra = [
            self.repelled(z, quantized.codes.masked_fill(~active, PAD).T, batch, workers, progress),
            self.contrasted(z, batch, workers, progress),
        ]
        if self.gated:
            extra.append(self._routing(weights[-s.behavior_experts :].T, batch, workers))
        for loss, figures in extra:
            total, parts = total + loss, {**parts, **figures}
        if self.quantizing:
            scale = float(s.latent_width) if s.distance == "euclidean" else 1.0
            codebook = codebook_loss(quantized, active, s.commitment, scale)
            total = total + s.codebook_weight * codebook
            parts["codebook"] = float(codebook.detach())
            self.codebooks.used += workers.sum(self.codebooks.counts(quantized.codes, active))
            self._last = (quantized.latents.detach(), active)
        return Losses(total, {"loss": float(total.detach()), **parts})

    def _content_slots(self) -> Tensor:
        return torch.tensor([slot.kind != BEHAVIOR for slot in self.slots], device=self.theta.device)

    def _reconstruction(self, decoded: Tensor, x: dict[str, Tensor], batch: Batch) -> Tensor:
        """Compute the reconstruction loss (eq 14), the mean over the dimensions of each modality (inputs have unit
        variance, so 1 is as bad as the mean); absent modalities do not count."""
        parts = self.inputs.split(decoded).items()
        return torch.stack([(((y - x[m]) ** 2).mean(1) * batch.present[m]).mean() for m, y in parts]).sum()

    def _alignment(self, h: dict[str, Tensor], batch: Batch, workers: Workers) -> Tensor:
        """Compute the alignment loss (eqs 18 to 21): content pairs both ways; each content modality (anchor) against
        behaviour, weighted by the item's alignment strength."""
        strength = self._strength(batch.richness)
        one_way = self._contrast(h, {m: batch.present[m] for m in h}, batch.index, workers)
        return torch.stack(
            [*self._content_pairs(one_way), *(one_way(m, BEHAVIOR, strength) for m in self.settings.content)],
        ).sum()

    def _content_pairs(self, one_way: Callable[[str, str, Tensor | float], Tensor]) -> list[Tensor]:
        content = self.settings.content
        return [(one_way(a, b, 1.0) + one_way(b, a, 1.0)) / 2 for i, a in enumerate(content) for b in content[i + 1 :]]

    def _contrast(
        self, h: dict[str, Tensor], there: dict[str, Tensor], index: Tensor, workers: Workers
    ) -> Callable[[str, str, Tensor | float], Tensor]:
        """Return a function that computes the weighted InfoNCE of anchor and target projections [B, h]. Negatives are
        the other items of the batch on all workers; items that lack either modality do not count."""
        everyone = {m: workers.gather_with_gradient(value) for m, value in h.items()}
        valid = {m: workers.gather(value.to(torch.uint8)).bool() for m, value in there.items()}
        items = (index, workers.gather(index))

        def one_way(anchor: str, target: str, weight: Tensor | float) -> Tensor:
            positives = torch.arange(len(h[anchor]), device=h[anchor].device) + workers.rank * len(h[anchor])
            loss = info_nce(h[anchor], everyone[target], positives, self.settings.temperature, valid[target], items)
            return (loss * weight * (there[anchor] & there[target])).mean()

        return one_way

    def _routing(self, weights: Tensor, batch: Batch, workers: Workers) -> tuple[Tensor, dict[str, float]]:
        """Compute the sparsity loss (methods 1.7) for items with behaviour, and update the controller by the sparsity
        of all workers' items."""
        router, present = self.settings.router, batch.present[BEHAVIOR]
        gates, richness = weights[present], batch.richness[present].double()
        scalars = torch.stack([(1 - richness).sum(), richness.new_tensor(float(len(gates)))])
        total = workers.sum(torch.cat([(gates > 0).double().sum(0), scalars]))
        count = total[-1].clamp(min=1)
        share = (total[:-2] / count).to(gates.dtype)
        current = 1 - float(share.mean())
        if router.sparsity is None:
            return gates.new_zeros(()), {"sparsity": current, "least_active": float(share.min())}
        target = min(max(float(self.theta * total[-2] / count), 0.0), 0.99)
        weight = float(self.sparsity.weight)
        loss = weight * sparsity_loss(gates, share, target)
        if router.item_weight:
            wanted = (self.theta * (1 - richness)).clamp(0, 0.99).to(gates.dtype)
            loss = loss + router.item_weight * item_sparsity_loss(gates, wanted)
        if self.training:
            self.sparsity.update(current, target)
        return loss, {
            "routing": float(loss.detach()),
            "sparsity": current,
            "sparsity_target": target,
            "lambda": weight,
            "least_active": float(share.min()),
        }

    @torch.no_grad()
    def after_step(
        self,
        step: int,
        progress: float,
        workers: Workers,
        generator: torch.Generator,
    ) -> dict[nn.Parameter, Tensor]:
        """Revive dead codes every ``revival.every`` steps, from the latents of all workers' last batch."""
        if self._last is None or self.settings.codebooks == "fixed" or not self.revival_due(step, progress):
            return {}
        latents, active = self._last
        latents = workers.gather(latents.transpose(0, 1)).transpose(0, 1)
        active = workers.gather(active.T.to(torch.uint8)).T.bool()
        dead = self.codebooks.revive(latents, active, self.settings.revival.min_share, generator)
        return {self.codebooks.weight: dead[:, :, None].expand_as(self.codebooks.weight)}

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Codes:
        """Encode a batch. Codes of all slots (PAD where the modality is absent); weights: 1, or R(e_b) for behaviour
        slots; active: weight > 0."""
        latents, weights, _ = self._experts(self.inputs(batch), batch)
        present = self._present(batch)
        codes = self.codebooks.codes(latents, self._previous(batch)).masked_fill(~present, PAD)
        weights = torch.where(self._content_slots()[:, None], present.to(weights.dtype), weights)
        return Codes(codes.T.int(), weights.T.float(), (weights > 0).T)

    def _previous(self, batch: Batch) -> PreviousCodes | None:
        return PreviousCodes(batch.previous.codes.T, batch.previous.slack) if batch.previous else None

    @torch.inference_mode()
    def reconstruct(self, batch: Batch) -> dict[str, Tensor]:
        """Decode z_q to the scale of the inputs."""
        latents, weights, _ = self._experts(self.inputs(batch), batch)
        decoded = self.decoder(self._fuse(self.codebooks(latents, self._previous(batch)), weights)[1])
        return {m: self.inputs.restore(m, y) for m, y in self.inputs.split(decoded).items()}

    def facts(self) -> Mapping[str, Any]:
        """Return the alignment controller as used, and theta of the sparsity target."""
        c = self.settings.controller
        return {
            "controller": {"alpha": c.alpha, "beta": float(self.beta), "enabled": c.enabled},
            "theta": float(self.theta),
        }
