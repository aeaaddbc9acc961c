"""Regulation of SIDs that overlap: QuaSID's Hamming-guided repulsion (arXiv 2603.00632), AdaSID's adaptive one (arXiv 2604.23522),
and the contrast of co-engaged pairs that both are trained with (methods 4 and 5).

``z`` [B, d]: latents before quantization; ``codes`` [B, L] int64; ``index`` [B]: item of a row; ``paired`` [B/2] bool: whether rows i and
i + B/2 are a co-engaged pair, None where there are no such pairs. A slot with PAD on either side, or on both, never matches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from adasid import config
from adasid.tables import PAD

CALIBRATED = 100
"""Batches with overlaps from which AdaSID's full load is taken."""


def repulsion(settings: config.Repulsion | None, slots: int) -> HammingRepulsion | AdaptiveRepulsion | None:
    """The repulsion that the config asks for."""
    if settings is None:
        return None
    return HammingRepulsion(settings, slots) if isinstance(settings, config.Hamr) else AdaptiveRepulsion(settings, slots)


def moved(weight: tuple[float, float], window: tuple[float, float], progress: float) -> float:
    """From the first weight to the second while progress runs through the window (AdaSID's rebalancing, methods 5.4)."""
    (first, last), (start, end) = weight, window
    return first + (last - first) * min(max((progress - start) / (end - start), 0.0), 1.0)


def same_codes(codes: Tensor) -> Iterator[Tensor]:
    """For each slot [B, B] bool: rows that have the same code."""
    for slot in codes.T:
        yield slot[:, None] == slot.masked_fill(slot == PAD, PAD - 1)


def qualified(index: Tensor, paired: Tensor | None) -> Tensor:
    """[B, B] bool: rows of different items that are not a constructed positive (QuaSID eq 8)."""
    mask = index[:, None] != index[None, :]
    if paired is not None:
        for offset in (len(paired), -len(paired)):
            mask.diagonal(offset).logical_and_(~paired)
    return mask


class HammingRepulsion(nn.Module):
    """QuaSID eqs 9 to 13: a hinge on the cosine distance of overlapping pairs, wider and heavier for a full overlap.

    The Hamming distance is L - matching slots. An overlap has a matching slot. It is full where every slot in which either item has a
    code matches (so two items that lack the same modality can overlap fully), else partial up to a distance of ``radius``.
    """

    def __init__(self, settings: config.Hamr, slots: int) -> None:
        super().__init__()
        self.settings = settings
        self.radius = settings.radius or max(1, round(slots / 3))

    def forward(self, z: Tensor, codes: Tensor, index: Tensor, paired: Tensor | None, progress: float) -> tuple[Tensor, dict[str, float]]:
        """The weighted loss, and the number of full and partial overlaps (each pair once); ``progress`` has no effect."""
        s, slots = self.settings, codes.shape[1]
        matching, absent = codes.new_zeros(len(codes), len(codes), dtype=torch.int16), (codes == PAD).float()
        for same in same_codes(codes):
            matching += same
        overlap = qualified(index, paired) & (matching > 0)
        full = overlap & (matching == slots - absent @ absent.T)
        partial = overlap & ~full & (slots - matching <= self.radius)
        distance = 1 - _cosines(z)
        loss = s.full_weight * _mean(nnf.relu(s.full_margin - distance), full) + s.partial_weight * _mean(
            nnf.relu(s.partial_margin - distance), partial
        )
        return loss, {"full_overlaps": float(full.sum()) / 2, "partial_overlaps": float(partial.sum()) / 2}


class AdaptiveRepulsion(nn.Module):
    """AdaSID: overlaps of similar items are spared, crowded ones repelled harder, all of them less as training goes on (methods 5.1 to 5.5).

    The load at which strength is full is the mean, over the first ``CALIBRATED`` batches, of the quantile of a batch's loads.
    """

    def __init__(self, settings: config.Adaptive, slots: int) -> None:
        super().__init__()
        if slots > 31:
            raise ValueError(f"repulsion of kind 'adaptive' tells at most 31 slots apart, the tokenizer has {slots}: use fewer, or kind hamr")
        self.settings = settings
        self.register_buffer("thresholds", torch.linspace(*settings.thresholds, slots), persistent=False)
        self.register_buffer("full_load", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.float64))
        self.thresholds: Tensor
        self.full_load: Tensor
        self.batches: Tensor

    def forward(self, z: Tensor, codes: Tensor, index: Tensor, paired: Tensor | None, progress: float) -> tuple[Tensor, dict[str, float]]:
        """The loss times its weight at ``progress``; the number of overlaps (each pair once), the share of them that is spared, their mean
        strength, and the weight."""
        weight, cosine = self.weight(progress), _cosines(z)
        found = overlaps(codes, qualified(index, paired), self.settings.load == "code")
        strength = self._strength(found.load)[found.kind]
        spared = cosine.detach()[found.where] >= self.thresholds[found.matching - 1]
        push = torch.zeros_like(cosine).masked_scatter(found.where, (strength * ~spared).to(cosine))
        loss = weight * (push * nnf.relu(self.settings.margin - 1 + cosine)).sum() / max(1, len(spared))
        shares = {"spared": float(spared.sum()) / max(1, len(spared)), "strength": float(strength.sum()) / max(1, len(spared))}
        return loss, {"overlaps": float(len(spared)), **shares, "repulsion_weight": weight}

    def weight(self, progress: float) -> float:
        """``lam_col``: from ``settings.weight[0]`` to ``[1]`` while progress runs through ``settings.progress`` (methods 5.4)."""
        return moved(self.settings.weight, self.settings.progress, progress)

    @torch.no_grad()
    def agree(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Take the mean over workers of what they have learned about loads, so that all hold the same state."""
        total, batches = mean(torch.stack([self.full_load * self.batches, self.batches]))
        self.batches.copy_(batches)
        self.full_load.copy_(total / batches.clamp(min=torch.finfo(batches.dtype).tiny))

    @torch.no_grad()
    def _strength(self, load: Tensor) -> Tensor:
        """``a`` of each kind of overlap, from its load [kinds] (methods 5.3)."""
        s = self.settings
        if self.training and len(load) and self.batches < CALIBRATED:
            ordered = load.sort().values
            pairs = ordered.cumsum(0).double()  # a kind of load c has c pairs
            quantile = ordered[torch.searchsorted(pairs, s.load_quantile * pairs[-1])]
            self.batches += 1
            self.full_load += (quantile - self.full_load) / self.batches
        low, high = s.load_gain
        return (low + (high - low) * (load / self.full_load.clamp(min=1)).clamp(max=1) ** s.load_power).float()


class Overlaps(NamedTuple):
    """``where`` [B, B] bool: the P overlapping pairs, each once (i < j); ``matching`` [P]: their matching slots (o_ij); ``kind`` [P];
    ``load`` [kinds] int64: ordered pairs of a kind, so that c_ij is ``load[kind]``."""

    where: Tensor
    matching: Tensor
    kind: Tensor
    load: Tensor


@torch.no_grad()
def overlaps(codes: Tensor, allowed: Tensor, by_code: bool) -> Overlaps:
    """Pairs among ``allowed`` [B, B] with a matching slot. Two are of one kind where they match in the same slots (kappa, methods 5.3) and,
    with ``by_code``, in the same codes, which are told apart by 64-bit hashes."""
    pattern = torch.zeros_like(allowed, dtype=torch.int32)
    for slot, same in enumerate(same_codes(codes)):
        pattern.add_(same, alpha=1 << slot)
    where = (allowed & (pattern != 0)).triu(1)
    key = pattern[where]
    bits = [(key >> slot) & 1 for slot in range(codes.shape[1])]
    if by_code:
        factors = torch.randint(-(2**62), 2**62, (codes.shape[1],), generator=torch.Generator().manual_seed(0)).to(codes.device) * 2 + 1
        first, hashes = where.nonzero()[:, 0], factors * (codes + 1)
        key = torch.stack([bit * number[first] for bit, number in zip(bits, hashes.T)]).sum(0)
    _, kind, pairs = key.unique(return_inverse=True, return_counts=True)
    return Overlaps(where, torch.stack(bits).sum(0), kind, 2 * pairs)


def pair_contrast(z: Tensor, index: Tensor, paired: Tensor, temperature: float, z_all: Tensor, index_all: Tensor, offset: int) -> Tensor:
    """Symmetric InfoNCE of the pairs (i, i + B/2) by cosine, mean over this worker's pairs; 0 where there are none (methods 4.4).

    ``z_all`` [W B, d], ``index_all`` [W B]: the rows of all workers, B of each; this worker's begin at ``offset``. The candidates of a first
    row are all second rows, and the reverse. Left out as false negatives (methods 4.2) are other candidates of the positive's or the
    anchor's item, and those whose own first (second) row is the anchor's item.
    """
    half = len(paired)
    items, vectors = index_all.view(-1, 2, half), z_all.view(-1, 2, half, z_all.shape[1])
    rows = paired.nonzero().squeeze(1)
    positive = offset // 2 + rows
    total = z.new_zeros(())
    for side in (0, 1):
        candidates, anchor = items[:, 1 - side].reshape(-1), index[side * half + rows, None]
        false = (candidates == candidates[positive, None]) | (candidates == anchor) | (items[:, side].reshape(-1) == anchor)
        false[torch.arange(len(rows), device=z.device), positive] = False
        anchors, others = nnf.normalize(z[side * half + rows], dim=1), nnf.normalize(vectors[:, 1 - side].reshape(-1, z.shape[1]), dim=1)
        logits = (anchors @ others.T / temperature).masked_fill(false, -torch.inf)
        total = total + nnf.cross_entropy(logits, positive, reduction="sum")
    return total / (2 * max(1, len(rows)))


def _cosines(z: Tensor) -> Tensor:
    unit = nnf.normalize(z, dim=1)
    return unit @ unit.T


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of ``values`` over ``where``; 0 where that is empty."""
    return (values * where).sum() / where.sum().clamp(min=1)
