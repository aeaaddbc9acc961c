"""This module defines the codebooks of experts, one for each, searched by cosine or Euclidean distance (methods 1.2 to
1.4, 1.11, 9.4, 9.5)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from adasid.quantizers.codebooks import Codebooks
from adasid.quantizers.kmeans import kmeans, means_of, previous_or_nearest, spherical_kmeans, squared_distances
from adasid.sid import PreviousCodes

Distance = Literal["cosine", "euclidean"]


class Quantized(NamedTuple):
    """``Quantized`` is the result of quantization: ``codes`` [L, B]; ``latents`` and ``codewords`` [L, B, d], of unit
    norm if the distance is cosine. ``latents`` are what damped codewords of earlier slots leave."""

    codes: Tensor
    latents: Tensor
    codewords: Tensor


class ExpertCodebooks(Codebooks):
    """``ExpertCodebooks`` has ``slots`` codebooks of ``size`` codewords of ``width`` dimensions. If ``distance`` is
    cosine, only the direction of a codeword is used.

    With ``damping`` eta > 0, slot l quantizes ``E_l - eta * reads_l * sum of the codewords of slots before it``
    (methods 1.11). ``before`` [L, L] bool: which slots j precede slot l; ``reads`` [L, d] bool: the dimensions that
    slot l reads."""

    def __init__(
        self,
        slots: int,
        size: int,
        width: int,
        distance: Distance = "cosine",
        damping: float = 0.0,
        before: Tensor | None = None,
        reads: Tensor | None = None,
    ) -> None:
        super().__init__(nnf.normalize(torch.randn(slots, size, width), dim=2))
        self.distance, self.damping = distance, damping
        self.register_buffer("before", torch.zeros(slots, slots) if before is None else before.float(), False)
        self.register_buffer("reads", torch.ones(slots, width) if reads is None else reads.float(), False)
        self.before: Tensor
        self.reads: Tensor

    def codes(self, latents: Tensor, previous: PreviousCodes | None = None) -> Tensor:
        """Return the code of the nearest codeword: [L, B, d] -> [L, B]. With cosine the norm of a latent has no effect.
        ``previous``: codes [L, B]; the squared distance of unit vectors is 2 - 2 cos."""
        if self.damping:
            return self.forward(latents, previous).codes
        return self._nearest(latents, self._words(), previous)

    def forward(self, latents: Tensor, previous: PreviousCodes | None = None) -> Quantized:
        """Quantize latents [L, B, d]."""
        latents, words = self._scaled(latents), self._words()
        if not self.damping:
            with torch.no_grad():
                codes = self._nearest(latents, words, previous)
            return Quantized(codes, latents, _chosen(words, codes))
        parts = list[Quantized]()
        for slot in range(len(words)):
            rest, its = self._rest(latents[slot], parts, slot), slice(slot, slot + 1)
            with torch.no_grad():
                its_previous = PreviousCodes(previous.codes[its], previous.slack) if previous else None
                codes = self._nearest(rest, words[its], its_previous)
            parts.append(Quantized(codes, rest, _chosen(words[its], codes)))
        return Quantized(*(torch.cat(part) for part in zip(*parts)))

    def exact(self, latents: Tensor) -> Quantized:
        """Return the latents [L, B, d] as if each were a codeword: what training uses before codebooks exist."""
        latents = self._scaled(latents)
        return Quantized(torch.zeros(latents.shape[:2], dtype=torch.int64, device=latents.device), latents, latents)

    def _words(self) -> Tensor:
        return self._scaled(self.weight)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return nnf.normalize(vectors, dim=-1) if self.distance == "cosine" else vectors

    def _rest(self, latents: Tensor, parts: list[Quantized], slot: int) -> Tensor:
        """Return what the damped codewords of earlier slots leave of the latents of ``slot``: [B, d] -> [1, B, d]."""
        earlier = [parts[j].codewords[0] for j in torch.nonzero(self.before[slot]).flatten().tolist()]
        if not earlier or not self.damping:
            return latents[None]
        rest = latents - self.damping * self.reads[slot] * torch.stack(earlier).sum(0).detach()
        return self._scaled(rest)[None]

    def _nearest(self, latents: Tensor, words: Tensor, previous: PreviousCodes | None) -> Tensor:
        """Return the codes [l, B] of ``latents`` [l, B, d] among ``words`` [l, K, d]."""
        if previous is not None:
            return previous_or_nearest(self._distances(latents, words), previous)
        scores = torch.bmm(latents, words.transpose(1, 2))
        if self.distance == "euclidean":
            scores = scores - words.square().sum(2)[:, None] / 2
        return scores.argmax(dim=2)

    def _distances(self, latents: Tensor, words: Tensor) -> Tensor:
        """Return squared distances [l, B, K]."""
        if self.distance == "cosine":
            return (2 - 2 * torch.bmm(nnf.normalize(latents, dim=2), words.transpose(1, 2))).clamp(min=0)
        return torch.stack([squared_distances(x, book) for x, book in zip(latents, words)])

    @torch.no_grad()
    def initialise(
        self,
        latents: Tensor,
        active: Tensor,
        rounds: int,
        generator: torch.Generator,
        previous: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Initialise the codebooks by k-means on the active rows of each slot; a previous code becomes the mean of its
        rows. A slot is fitted to what earlier slots leave of its rows, whether or not these were fitted to them, as
        :meth:`forward` quantizes.

        ``latents`` [L, n, d], ``active`` [L, n] bool, ``previous`` [L, n]: codes (negative: none); ``weights``
        [n]: how much a row counts."""
        parts = list[Quantized]()
        for slot, keep in enumerate(active):
            own = self._scaled(latents[slot]) if self.damping else latents[slot]
            rest = self._rest(own, parts, slot)
            if keep.any():
                chosen = None if previous is None else previous[slot][keep]
                self._fit(slot, rest[0, keep], chosen, rounds, generator, None if weights is None else weights[keep])
            words = self._words()[slot : slot + 1]
            codes = self._nearest(rest, words, None)
            if previous is not None:
                codes = torch.where(previous[slot] >= 0, previous[slot], codes)
            parts.append(Quantized(codes, rest, _chosen(words, codes)))

    def _fit(
        self,
        slot: int,
        rows: Tensor,
        previous: Tensor | None,
        rounds: int,
        generator: torch.Generator,
        weights: Tensor | None,
    ) -> None:
        size = self.weight.shape[1]
        if self.distance == "euclidean":
            words = kmeans(rows, size, rounds, generator, weights=weights)
        else:
            words = spherical_kmeans(rows, size, rounds, generator, weights)
        if previous is not None:
            words = self._scaled(means_of(self._scaled(rows), previous, words, weights))
        self.weight[slot] = words

    @torch.no_grad()
    def revive(self, vectors: Tensor, active: Tensor, min_share: float, generator: torch.Generator) -> Tensor:
        """Replace dead codes by random active vectors, see :meth:`Codebooks.revive`; by their directions with
        cosine."""
        replaced = super().revive(vectors, active, min_share, generator)
        self.weight[replaced] = self._scaled(self.weight[replaced])
        return replaced


def _chosen(words: Tensor, codes: Tensor) -> Tensor:
    """Return the codewords of ``codes`` [l, B] in ``words`` [l, K, d]: [l, B, d]."""
    return words.gather(1, codes[:, :, None].expand(-1, -1, words.shape[2]))


def codebook_loss(quantized: Quantized, active: Tensor, commitment: float, scale: float = 1.0) -> Tensor:
    """Compute the codebook loss that the papers leave out (methods 1.4): sum over slots of the mean over the batch of
    ``||sg(z) - q||^2 + commitment ||z - sg(q)||^2`` (VQ-VAE, arXiv 1711.00937, eq 3), only where ``active`` [L, B];
    ``scale``: the squared length that counts as 1."""
    mask = active.to(quantized.latents.dtype) / scale
    codebook = ((quantized.latents.detach() - quantized.codewords) ** 2).sum(2)
    commit = ((quantized.latents - quantized.codewords.detach()) ** 2).sum(2)
    return ((codebook + commitment * commit) * mask).mean(1).sum()
