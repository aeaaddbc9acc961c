"""Spherical k-means: the initialisation of cosine codebooks (methods 9.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

_CHUNK = 65_536


def spherical_kmeans(x: Tensor, k: int, rounds: int, generator: torch.Generator) -> Tensor:
    """``k`` unit centroids that maximise the mean cosine to the nearest one. ``x`` [n, d], n >= 1 -> [k, d].

    Seeds by greedy k-means++ on squared chordal distance; an empty cluster restarts at the point that its centroid serves worst.
    With fewer points than ``k`` the surplus centroids are points with a little noise.
    """
    x = nnf.normalize(x, dim=1)
    if len(x) < k:
        extra = x[torch.arange(k - len(x), device=x.device) % len(x)]
        noise = torch.randn(extra.shape, generator=generator).to(x) * 0.05
        return nnf.normalize(torch.cat([x, extra + noise]), dim=1)
    centroids = _seed(x, k, generator)
    for _ in range(rounds):
        cosine, assigned = nearest(x, centroids)
        counts = torch.bincount(assigned, minlength=k)
        sums = torch.zeros_like(centroids).index_add_(0, assigned, x)
        empty = torch.nonzero(counts == 0).flatten()
        sums[empty] = x[cosine.argsort()[: len(empty)]]
        centroids = nnf.normalize(sums, dim=1)
    return centroids


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine and its index for unit vectors ``x`` [n, d] and ``centroids`` [k, d] -> [n], [n]."""
    best = [(part @ centroids.T).max(dim=1) for part in x.split(_CHUNK)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def _seed(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: of a few candidates, drawn with probability proportional to their distance from the seeds so far, the best."""
    trials = 2 + int(math.log(k))
    seeds = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
    distance = (1 - x @ seeds[0]).clamp(min=0)
    for _ in range(k - 1):
        mass = distance.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(x.device) * mass[-1]
        candidates = x[torch.searchsorted(mass, draws).clamp(max=len(x) - 1)]
        distances = torch.minimum(distance[:, None], (1 - x @ candidates.T).clamp(min=0))
        best = int(distances.sum(0).argmin())
        seeds, distance = torch.cat([seeds, candidates[best : best + 1]]), distances[:, best]
    return seeds
