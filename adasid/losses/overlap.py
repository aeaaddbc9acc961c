"""Regulate overlapping SIDs: QuaSID's Hamming-guided repulsion (arXiv 2603.00632), AdaSID's adaptive one (arXiv
2604.23522), and the contrast of co-engaged pairs that both use (methods 4 and 5).

``z`` [B, d]: latents before quantization; ``codes`` [B, L] int64; ``index`` [B]: item of a row; ``paired`` [B/2] bool:
whether rows i and i + B/2 are a co-engaged pair, None where there are no such pairs. A slot with PAD on either side, or
on both, never matches. The losses are sums over the pairs that overlap, a small part of all; no matrix is of size B x
B."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from adasid import config
from adasid.ragged import runs
from adasid.tables import PAD

CALIBRATED = 100
"""Batches with overlaps from which AdaSID estimates the full load."""
_BLOCK = 512
"""Rows whose products with all later ones are in memory at a time."""


def repulsion(settings: config.Repulsion | None, slots: int) -> HammingRepulsion | AdaptiveRepulsion | None:
    """Build the repulsion of the config."""
    if settings is None:
        return None
    return (
        HammingRepulsion(settings, slots) if isinstance(settings, config.Hamr) else AdaptiveRepulsion(settings, slots)
    )


def moved(weight: tuple[float, float], window: tuple[float, float], progress: float) -> float:
    """Interpolate from the first weight to the second while progress passes through the window (AdaSID's rebalancing,
    methods 5.4)."""
    (first, last), (start, end) = weight, window
    return first + (last - first) * min(max((progress - start) / (end - start), 0.0), 1.0)


class Overlaps(NamedTuple):
    """``Overlaps`` lists the P pairs of rows i < j with a matching slot, each once: ``key`` [P] int64 is i * ``rows`` +
    j, ascending; ``pattern`` [P] int64: bit l is set where slot l matches; ``matching`` [P] int64: matching slots
    (o_ij)."""

    rows: int
    key: Tensor
    pattern: Tensor
    matching: Tensor

    @property
    def first(self) -> Tensor:
        """Return i of each pair [P]."""
        return self.key.div(self.rows, rounding_mode="floor")

    @property
    def second(self) -> Tensor:
        """Return j of each pair [P]."""
        return self.key % self.rows

    def where(self, chosen: Tensor) -> Overlaps:
        """Return the pairs selected by the mask ``chosen`` [P]."""
        return (
            self if chosen.all() else Overlaps(self.rows, self.key[chosen], self.pattern[chosen], self.matching[chosen])
        )

    @torch.no_grad()
    def cosines(self, unit: Tensor) -> Tensor:
        """Compute u_i . u_j of unit vectors [B, d] -> [P], without gradient, in blocks of the upper triangle that fit
        in the cache."""
        cosines = [self.key.new_zeros(0).to(unit)]
        starts = list(range(0, self.rows, _BLOCK))
        ends = torch.searchsorted(
            self.key, torch.tensor([(start + _BLOCK) * self.rows for start in starts], device=unit.device)
        ).tolist()
        for start, begin, end in zip(starts, [0, *ends], ends):
            if end > begin:
                products, key = unit[start : start + _BLOCK] @ unit[start:].T, self.key[begin:end]
                # blocks have no columns before their first row
                cosines.append(
                    products.view(-1)[
                        key - start * (self.rows + 1) - (key.div(self.rows, rounding_mode="floor") - start) * start
                    ]
                )
        return torch.cat(cosines)

    def push(self, unit: Tensor, weights: Tensor) -> Tensor:
        """Compute ``sum_p weights_p u_i . u_j``, with gradient to ``unit`` but not to ``weights`` [P]."""
        some = self.where(weights != 0)
        pairs, weights = torch.stack([some.first, some.second]), weights[weights != 0].to(unit)
        both = torch.sparse_coo_tensor(
            torch.cat([pairs, pairs.flip(0)], dim=1), weights.repeat(2), (self.rows, self.rows), check_invariants=False
        )
        twice = (
            unit * (both @ unit.detach())
        ).sum()  # counts each pair from both sides: the gradient is right, the value is twice the sum
        return twice - twice.detach() / 2


@torch.no_grad()
def overlaps(codes: Tensor, index: Tensor, paired: Tensor | None) -> Overlaps:
    """Return the qualified pairs (QuaSID eq 8, methods 4.2: of different items, and not a constructed positive) that
    have the same code in a slot. Only matching pairs are enumerated: each slot is sorted, and the rows of each run of
    one code are paired."""
    size, keys, bits = len(codes), [], []
    for slot, column in enumerate(codes.T):
        order = column.argsort(stable=True)
        order = order[column[order] != PAD]
        position = runs(column[order].unique_consecutive(return_counts=True)[1])[1]
        later, nth = runs(position)  # each row of a run with all rows before it
        keys.append(order[later - position[later] + nth] * size + order[later])
        bits.append(torch.full_like(keys[-1], 1 << slot))
    key, where, matching = torch.cat(keys).unique(return_inverse=True, return_counts=True)
    pattern = torch.zeros_like(key).index_add_(0, where, torch.cat(bits))
    result = Overlaps(size, key, pattern, matching)
    first, second = result.first, result.second
    allowed = index[first] != index[second]
    if paired is not None:
        allowed &= ~((second - first == len(paired)) & paired[first % len(paired)])
    return result.where(allowed)


@torch.no_grad()
def loads(overlapping: Overlaps, codes: Tensor, by_code: bool) -> Tensor:
    """Return c_ij of each pair [P] int64, the number of ordered pairs of its kind. Two pairs are of one kind if they
    match in the same slots (kappa, methods 5.3) and, with ``by_code``, in the same codes, which are compared by 64-bit
    hashes."""
    key = overlapping.pattern
    if by_code:
        factors = (
            torch.randint(-(2**62), 2**62, (codes.shape[1],), generator=torch.Generator().manual_seed(0)).to(
                codes.device
            )
            * 2
            + 1
        )
        hashes = (factors * (codes + 1))[overlapping.first]
        key = torch.stack([((key >> slot) & 1) * number for slot, number in enumerate(hashes.T)]).sum(0)
    _, kind, pairs = key.unique(return_inverse=True, return_counts=True)
    load: Tensor = 2 * pairs[kind]
    return load


class HammingRepulsion(nn.Module):
    """``HammingRepulsion`` is QuaSID's loss (eqs 9 to 13), a hinge on the cosine distance of overlapping pairs, with a
    larger margin and weight for a full overlap (methods 4.3).

    The Hamming distance is L - matching slots. An overlap has a matching slot. It is full if every slot in which either
    item has a code matches (so two items that lack the same modality can overlap fully), else partial up to a distance
    of ``radius``."""

    def __init__(self, settings: config.Hamr, slots: int) -> None:
        super().__init__()
        self.settings = settings
        self.radius = settings.radius or max(1, round(slots / 3))

    def forward(
        self, z: Tensor, codes: Tensor, index: Tensor, paired: Tensor | None, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted loss, and the number of full and partial overlaps (each pair once); ``progress`` has no
        effect."""
        s, slots, absent = self.settings, codes.shape[1], codes == PAD
        pairs, unit = overlaps(codes, index, paired), nnf.normalize(z, dim=1)
        pairs = pairs.where(
            (slots - pairs.matching <= self.radius) | (pairs.matching == slots - absent.sum(1)[pairs.first])
        )
        full = pairs.matching == slots - (absent[pairs.first] & absent[pairs.second]).sum(1)
        partial = ~full & (slots - pairs.matching <= self.radius)
        distance, loss = 1 - pairs.cosines(unit), z.new_zeros(())
        for group, margin, weight in (
            (full, s.full_margin, s.full_weight),
            (partial, s.partial_margin, s.partial_weight),
        ):
            active = (group & (distance < margin)).to(z) * weight / group.sum().clamp(min=1)
            loss = loss + (margin - 1) * active.sum() + pairs.push(unit, active)
        return loss, {"full_overlaps": float(full.sum()), "partial_overlaps": float(partial.sum())}


class AdaptiveRepulsion(nn.Module):
    """``AdaptiveRepulsion`` is AdaSID's loss: overlaps of similar items are spared, those with a high load are repelled
    harder, and the weight changes with progress (methods 5.1 to 5.5).

    The full load, at which strength is maximal, is the mean, over the first ``CALIBRATED`` batches, of the quantile of
    a batch's loads."""

    def __init__(self, settings: config.Adaptive, slots: int) -> None:
        super().__init__()
        if slots > 31:
            raise ValueError(
                f"repulsion of kind 'adaptive' tells at most 31 slots apart, the tokenizer has {slots}: use fewer, or "
                "kind hamr"
            )
        self.settings = settings
        self.register_buffer("thresholds", torch.linspace(*settings.thresholds, slots), persistent=False)
        self.register_buffer("full_load", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.float64))
        self.thresholds: Tensor
        self.full_load: Tensor
        self.batches: Tensor

    def forward(
        self, z: Tensor, codes: Tensor, index: Tensor, paired: Tensor | None, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss times its weight at ``progress``, and the number of overlaps (each pair once), the share of
        spared ones, their mean strength, and the weight."""
        s, weight, unit = self.settings, self.weight(progress), nnf.normalize(z, dim=1)
        pairs = overlaps(codes, index, paired)
        cosine, load = pairs.cosines(unit), loads(pairs, codes, s.load == "code")
        strength, spared = self._strength(load), cosine >= self.thresholds[pairs.matching - 1]
        active = (strength * (~spared & (cosine > 1 - s.margin))).to(z)
        loss = weight * ((s.margin - 1) * active.sum() + pairs.push(unit, active)) / max(1, len(spared))
        shares = {
            "spared": float(spared.sum()) / max(1, len(spared)),
            "strength": float(strength.sum()) / max(1, len(spared)),
        }
        return loss, {"overlaps": float(len(spared)), **shares, "repulsion_weight": weight}

    def weight(self, progress: float) -> float:
        """Return ``lam_col``, which changes from ``settings.weight[0]`` to ``[1]`` while progress passes through
        ``settings.progress`` (methods 5.4)."""
        return moved(self.settings.weight, self.settings.progress, progress)

    @torch.no_grad()
    def agree(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Average the estimate of the full load over workers, so that all have the same state."""
        total, batches = mean(torch.stack([self.full_load * self.batches, self.batches]))
        self.batches.copy_(batches)
        self.full_load.copy_(total / batches.clamp(min=torch.finfo(batches.dtype).tiny))

    @torch.no_grad()
    def _strength(self, load: Tensor) -> Tensor:
        """Compute ``a_ij`` of overlaps with these loads [P] (methods 5.3)."""
        s = self.settings
        if self.training and len(load) and self.batches < CALIBRATED:
            ordered = load.sort().values
            quantile = ordered[math.ceil(s.load_quantile * len(ordered)) - 1 if s.load_quantile else 0]
            self.batches += 1
            self.full_load += (quantile - self.full_load) / self.batches
        low, high = s.load_gain
        return (low + (high - low) * (load / self.full_load.clamp(min=1)).clamp(max=1) ** s.load_power).float()


def pair_contrast(
    z: Tensor, index: Tensor, paired: Tensor, temperature: float, z_all: Tensor, index_all: Tensor, offset: int
) -> Tensor:
    """Compute the symmetric InfoNCE of the pairs (i, i + B/2) by cosine, mean over this worker's pairs; 0 if there are
    none (methods 4.4).

    ``z_all`` [W B, d], ``index_all`` [W B]: the rows of all workers, B of each; this worker's begin at ``offset``. The
    candidates of a first row are all second rows, and the reverse. Excluded as false negatives (methods 4.2) are other
    candidates of the positive's or the anchor's item, and those whose own first (second) row is the anchor's item."""
    half = len(paired)
    items, vectors = index_all.view(-1, 2, half), z_all.view(-1, 2, half, z_all.shape[1])
    rows = paired.nonzero().squeeze(1)
    positive = offset // 2 + rows
    total = z.new_zeros(())
    for side in (0, 1):
        candidates, anchor = items[:, 1 - side].reshape(-1), index[side * half + rows, None]
        false = (
            (candidates == candidates[positive, None]) | (candidates == anchor) | (items[:, side].reshape(-1) == anchor)
        )
        false[torch.arange(len(rows), device=z.device), positive] = False
        anchors, others = (
            nnf.normalize(z[side * half + rows], dim=1),
            nnf.normalize(vectors[:, 1 - side].reshape(-1, z.shape[1]), dim=1),
        )
        logits = (anchors @ others.T / temperature).masked_fill(false, -torch.inf)
        total = total + nnf.cross_entropy(logits, positive, reduction="sum")
    return total / (2 * max(1, len(rows)))
