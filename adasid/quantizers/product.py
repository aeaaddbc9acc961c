"""Fit optimised product quantization (Ge et al., CVPR 2013; methods 6.2): principal components, a rotation, and one
k-means for each sub-space."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from adasid.errors import InputError
from adasid.quantizers.kmeans import kmeans, lloyd_round, nearest_euclidean
from adasid.sid import PreviousCodes


class Components(NamedTuple):
    """``Components`` contains principal components: ``mean`` [D], ``basis`` [D, w] with orthonormal columns,
    ``deviation`` [w] by which components are divided (1: not whitened)."""

    mean: Tensor
    basis: Tensor
    deviation: Tensor

    def project(self, x: Tensor) -> Tensor:
        """Project vectors to components: [n, D] -> [n, w]."""
        return (x - self.mean) @ self.basis / self.deviation

    def restore(self, y: Tensor) -> Tensor:
        """Map components back to vectors: [n, w] -> [n, D]."""
        return y * self.deviation @ self.basis.T + self.mean


class ProductQuantizer(NamedTuple):
    """A product quantizer has ``rotation`` R [w, w] with R R^T = I and ``centroids`` [L, K, w / L] of the sub-spaces of
    x R."""

    rotation: Tensor
    centroids: Tensor

    def codes(self, x: Tensor, previous: PreviousCodes | None = None) -> Tensor:
        """Encode vectors: [n, w] -> [n, L]; ``previous``: codes [n, L]."""
        parts = (x @ self.rotation).chunk(len(self.centroids), dim=1)
        pairs = enumerate(zip(parts, self.centroids))
        return torch.stack(
            [nearest_euclidean(part, words, previous.of(slot) if previous else None) for slot, (part, words) in pairs],
            dim=1,
        )

    def words(self, codes: Tensor) -> Tensor:
        """Return the codewords in the rotated space: [n, L] -> [n, w]."""
        return torch.cat([words[column] for column, words in zip(codes.T, self.centroids)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes: [n, L] -> [n, w]."""
        return self.words(codes) @ self.rotation.T


def principal_components(x: Tensor, width: int, whiten: bool) -> Components:
    """Compute the ``width`` <= D components of ``x`` [n, D] with the largest variance, in descending order. A component
    without variance is not whitened."""
    mean = x.double().mean(0)
    centred = x - mean.to(x)
    variance, basis = torch.linalg.eigh((centred.T @ centred).double() / len(x))
    variance, basis = variance.flip(0)[:width], basis.flip(1)[:, :width]
    deviation = (
        torch.where(variance > 1e-7 * variance[0], variance.clamp(min=0).sqrt(), 1.0)
        if whiten
        else torch.ones_like(variance)
    )
    return Components(mean.to(x), basis.to(x), deviation.to(x))


def fit_opq(
    x: Tensor,
    parts: int,
    k: int,
    rounds: int,
    momentum: float,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> tuple[ProductQuantizer, list[float]]:
    """Alternate a round of k-means in each of ``parts`` sub-spaces of x R, from the centroids before, and R = U V^T of
    svd(x^T x_q) = U S V^T, both for the same assignment. R is extrapolated in the direction of its last step by
    ``momentum``, which needs far fewer rounds; if this overshoots and the error rises, a round without momentum
    follows.

    ``x`` [n, w], w a multiple of ``parts``; R starts at random. Returns the quantizer and, before the step of R in each
    of ``rounds`` >= 1 rounds, the mean squared error of a row; ``weights`` [n] > 0: how much each row counts in k-means
    and in R."""
    rotation = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator))[0].to(x)
    centroids = torch.stack(
        [kmeans(space, k, 0, generator, weights=weights) for space in (x @ rotation).chunk(parts, dim=1)]
    )
    return refine_opq(x, ProductQuantizer(rotation, centroids), rounds, momentum, weights)


def refine_opq(
    x: Tensor, start: ProductQuantizer, rounds: int, momentum: float, weights: Tensor | None = None
) -> tuple[ProductQuantizer, list[float]]:
    """Continue the rounds of :func:`fit_opq` from ``start``."""
    rotation, centroids = start
    before, turned, errors = rotation, x @ rotation, list[float]()
    for last in reversed(range(rounds)):
        rotated = [
            lloyd_round(space.contiguous(), words, weights=weights)
            for space, words in zip(turned.chunk(len(centroids), dim=1), centroids)
        ]
        centroids = torch.stack([words for words, _ in rotated])
        decoded = torch.cat([nnf.embedding(codes, words) for words, codes in rotated], dim=1)
        distances = (turned - decoded).square().sum(1)
        errors.append(float(distances.mean() if weights is None else (distances * weights).sum() / weights.sum()))
        now = procrustes(x if weights is None else x * weights[:, None], decoded)
        onward = momentum * (now - before) if last and errors[-1] == min(errors) else torch.zeros_like(now)
        before, rotation = now, orthogonal(now + onward)
        turned = x @ rotation
    return ProductQuantizer(rotation, centroids), errors


def fit_opq_faiss(x: Tensor, parts: int, k: int, rounds: int) -> ProductQuantizer:
    """Fit the quantizer with faiss; ``k`` is a power of two. Raises InputError without faiss, or for fewer rows than
    ``k``."""
    try:
        faiss: Any = importlib.import_module("faiss")
    except ImportError:
        raise InputError(
            "tokenizer.engine is 'faiss', which is not installed: pip install faiss-cpu, or use tokenizer.engine: own"
        ) from None
    if len(x) < k:
        raise InputError(
            f"tokenizer.engine 'faiss' needs at least codebook_size {k} items and got {len(x)}: use tokenizer.engine: "
            "own"
        )
    width = x.shape[1]
    quantizer, turn = faiss.ProductQuantizer(width, parts, k.bit_length() - 1), faiss.OPQMatrix(width, parts)
    quantizer.cp.min_points_per_centroid = 1
    turn.niter, turn.pq = rounds, quantizer
    turn.train(x.cpu().contiguous().numpy())
    rotation = torch.from_numpy(faiss.vector_to_array(turn.A).reshape(width, width)).T.to(x)
    quantizer.train((x @ rotation).cpu().contiguous().numpy())
    centroids = torch.from_numpy(faiss.vector_to_array(quantizer.centroids).reshape(parts, k, width // parts))
    return ProductQuantizer(rotation, centroids.to(x))


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """Return the orthogonal R that minimises the distance of x R from y (Schoenemann, Psychometrika 1966); [n, w] each
    -> [w, w]."""
    return orthogonal(x.T @ y)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to ``matrix`` [w, w]."""
    u, _, vt = torch.linalg.svd(matrix.double())
    rotation: Tensor = u @ vt
    return rotation.to(matrix)
