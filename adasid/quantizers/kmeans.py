"""Fit k-means, spherical for cosine codebooks (methods 9.3), Euclidean and balanced (methods 9.6) for residual and
product quantization (methods 6.2, 6.3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

from adasid.sid import PreviousCodes

_CHUNK = 4096
"""Rows whose products with all centroids are computed at a time, so that they are still in the cache for the search."""
_SEEDED, _SAMPLED = (16, 4096), (64, 16_384)
"""Sample sizes for the seeds and for the first three quarters of the rounds: points per cluster, and minimum."""


def spherical_kmeans(
    x: Tensor, k: int, rounds: int, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """Fit ``k`` unit centroids that maximise the mean cosine to the nearest one, weighted by ``weights`` [n] > 0.
    ``x`` [n, d], n >= 1 -> [k, d].

    Seeds by greedy k-means++ on squared chordal distance; an empty cluster restarts at the point that its centroid
    serves worst. With fewer points than ``k`` the surplus centroids are points with a little noise."""
    x = nnf.normalize(x, dim=1)
    if len(x) < k:
        return nnf.normalize(_surplus(x, k, 0.05, generator), dim=1)
    centroids = _seed(x, k, generator, lambda some, points: (1 - some @ points.T).clamp(min=0), weights)
    for _ in range(rounds):
        cosine, assigned = nearest(x, centroids)
        counts, sums = _totals(x, assigned, k, weights)
        empty = torch.nonzero(counts == 0).flatten()
        sums[empty] = x[cosine.argsort()[: len(empty)]]
        centroids = nnf.normalize(sums, dim=1)
    return centroids


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine and its index for unit vectors ``x`` [n, d] and ``centroids`` [k, d] -> [n], [n]."""
    best = [(part @ centroids.T).max(dim=1) for part in x.split(_CHUNK)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def kmeans(
    x: Tensor, k: int, rounds: int, generator: torch.Generator, balanced: bool = False, weights: Tensor | None = None
) -> Tensor:
    """Fit ``k`` centroids that give a small squared distance to the nearest one, of which each point counts with its
    weight. ``x`` [n, d], n >= 1, ``weights`` [n] > 0 -> [k, d].

    Seeds by greedy k-means++, then rounds of Lloyd's algorithm: three quarters of them on a sample if there are many
    points per cluster (balanced clusters use all points), fewer if the assignment converges. With fewer points than
    ``k`` the surplus centroids are points with a little noise."""
    if len(x) < k:
        return _surplus(x, k, 0.05 * float(x.square().mean().sqrt()), generator)
    centroids, first = _seed(x, k, generator, squared_distances, weights), 3 * rounds // 4
    some = max(_SAMPLED[0] * k, _SAMPLED[1])
    if balanced or len(x) <= some:
        return _lloyd(x, centroids, rounds, balanced, weights)
    points, their_weights = _sample(x, some, generator, weights)
    return _lloyd(x, _lloyd(points, centroids, first, weights=their_weights), rounds - first, weights=weights)


def lloyd_round(
    x: Tensor, centroids: Tensor, balanced: bool = False, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Assign ``x`` [n, d] to ``centroids`` [k, d]; return the means of the clusters [k, d], in which a point counts
    with its weight (``weights`` [n] > 0, default 1), and the assignment [n].

    ``balanced``: clusters of at most ceil(n / k) points, by :func:`balanced_assignment`. An empty cluster restarts at
    the point that its centroid serves worst, by weight times squared distance. If there are more empty clusters than
    points, the last ones are unchanged."""
    k = len(centroids)
    if balanced:
        costs = squared_distances(x, centroids)
        assigned = balanced_assignment(costs, -(-len(x) // k))
        score = costs.gather(1, assigned[:, None])[:, 0] - x.square().sum(1)
    else:
        score, assigned = _lowest(x, centroids)
    counts, sums = _totals(x, assigned, k, weights)
    means, empty = sums / torch.where(counts > 0, counts, 1)[:, None], torch.nonzero(counts == 0).flatten()
    if len(empty):
        distance = score + x.square().sum(1)
        distance = distance if weights is None else distance * weights
        worst = distance.argsort(descending=True, stable=True)[: len(empty)]
        means[empty] = centroids[empty]  # more clusters than points: the surplus ones are unchanged
        means[empty[: len(worst)]] = x[worst]
    return means, assigned


def _lloyd(x: Tensor, centroids: Tensor, rounds: int, balanced: bool = False, weights: Tensor | None = None) -> Tensor:
    """Run at most ``rounds`` rounds, fewer if the assignment converges."""
    before = None
    for _ in range(rounds):
        updated, assigned = lloyd_round(x, centroids, balanced, weights)
        if before is not None and torch.equal(assigned, before):
            break
        centroids, before = updated, assigned
    return centroids


def nearest_euclidean(x: Tensor, centroids: Tensor, previous: PreviousCodes | None = None) -> Tensor:
    """Return the index of the centroid at the smallest distance, the lowest of equals. ``x`` [n, d], ``centroids`` [k,
    d] -> [n].
    ``previous``: as in :func:`previous_or_nearest`; all distances are then in memory.

    Distances are compared in float32: with float64 input the order of additions, which follows the batch's size, does
    not decide near ties."""
    return (
        previous_or_nearest(squared_distances(x, centroids).float(), previous) if previous else _lowest(x, centroids)[1]
    )


def previous_or_nearest(distances: Tensor, previous: PreviousCodes | None) -> Tensor:
    """Return the index of the smallest of the squared ``distances`` [..., K], or the ``previous`` code (codes [...],
    negative: none) if its distance is at most 1 + slack times the smallest, so that small moves of a vector do not
    change its code (methods 9.8)."""
    least, code = distances.min(dim=-1)
    if previous is None:
        return code
    codes, slack = previous
    previous_distance = distances.gather(-1, codes.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where((codes >= 0) & (previous_distance <= (1 + slack) * least), codes, code)


def means_of(x: Tensor, codes: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return ``centroids`` [k, d] in which each code that rows of ``x`` [n, d] have (``codes`` [n], negative: none) is
    replaced by the mean of these rows, weighted by ``weights`` [n]."""
    assigned = codes >= 0
    weights = None if weights is None else weights[assigned]
    counts, sums = _totals(x[assigned], codes[assigned], len(centroids), weights)
    return torch.where(counts[:, None] > 0, sums / torch.where(counts > 0, counts, 1)[:, None], centroids)


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """Compute squared distances: ``x`` [n, d], ``centroids`` [k, d] -> [n, k]."""
    return (x.square().sum(1, keepdim=True) + centroids.square().sum(1) - 2 * (x @ centroids.T)).clamp(min=0)


def balanced_assignment(costs: Tensor, capacity: int) -> Tensor:
    """Assign each point to a cluster, at most ``capacity`` points each, by deferred acceptance (Gale and Shapley,
    1962).

    Free points propose to the cheapest cluster that would still take them; a cluster retains its cheapest ones. The
    result is a stable matching. ``costs`` [n, k] with k * capacity >= n -> [n]."""
    n, k = costs.shape
    taken = torch.zeros(n, dtype=torch.int64, device=costs.device)
    limit = costs.new_full((k,), math.inf)
    free = torch.arange(n, device=costs.device)
    while len(free):
        offers = costs[free]
        taken[free] = offers.masked_fill(offers >= limit, math.inf).argmin(1)
        asked = torch.zeros(k, dtype=torch.bool, device=costs.device).index_fill_(0, taken[free], True)
        rows = torch.nonzero(asked[taken]).flatten()
        price = costs[rows, taken[rows]]
        order = price.argsort(stable=True)
        order = order[taken[rows[order]].argsort(stable=True)]
        rows, price = rows[order], price[order]
        counts = torch.bincount(taken[rows], minlength=k)
        position = torch.arange(len(rows), device=costs.device) - (counts.cumsum(0) - counts)[taken[rows]]
        last = position == capacity - 1
        limit[taken[rows[last]]] = price[last]
        free = rows[position >= capacity]
    return taken


def _lowest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest squared distance minus ``|x|^2``, and its index."""
    squares = centroids.square().sum(1)
    best = [torch.addmm(squares, part, centroids.T, alpha=-2).float().min(dim=1) for part in x.split(_CHUNK)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def _totals(x: Tensor, assigned: Tensor, k: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum the weights (default 1) and the weighted points of each cluster: [k], [k, d]."""
    if weights is not None:
        counts = x.new_zeros(k).index_add_(0, assigned, weights)
        return counts, x.new_zeros(k, x.shape[1]).index_add_(0, assigned, x * weights[:, None])
    return torch.bincount(assigned, minlength=k), x.new_zeros(k, x.shape[1]).index_add_(0, assigned, x)


def _surplus(x: Tensor, k: int, scale: float, generator: torch.Generator) -> Tensor:
    extra = x[torch.arange(k - len(x), device=x.device) % len(x)]
    noise = torch.randn(extra.shape, generator=generator).to(x) * scale
    return torch.cat([x, extra + noise])


def _seed(
    x: Tensor,
    k: int,
    generator: torch.Generator,
    distances: Callable[[Tensor, Tensor], Tensor],
    weights: Tensor | None = None,
) -> Tensor:
    """Choose seeds by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007): of a few candidates, drawn with
    probability proportional to their distance from the seeds so far times their weight, the best. ``distances``: from
    points [n, d] to seeds [c, d] -> [n, c]."""
    x, weights = _sample(x, max(_SEEDED[0] * k, _SEEDED[1]), generator, weights)
    trials = 2 + int(math.log(k))
    seeds = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
    factor = 1.0 if weights is None else weights[:, None]
    distance = (distances(x, seeds) * factor)[:, 0]
    for _ in range(k - 1):
        mass = distance.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(x.device) * mass[-1]
        candidates = x[torch.searchsorted(mass, draws).clamp(max=len(x) - 1)]
        nearer = torch.minimum(distance[:, None], distances(x, candidates) * factor)
        best = int(nearer.sum(0).argmin())
        seeds, distance = torch.cat([seeds, candidates[best : best + 1]]), nearer[:, best]
    return seeds


def _sample(
    x: Tensor, number: int, generator: torch.Generator, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Draw ``number`` rows at random, or return all if there are fewer, and their weights."""
    if len(x) <= number:
        return x, weights
    rows = torch.randperm(len(x), generator=generator)[:number].to(x.device)
    return x[rows], None if weights is None else weights[rows]
