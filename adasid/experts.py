"""Compute experts of one shape as one batched matrix product, which is faster than a loop over experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """``GroupedLinear`` applies ``groups`` linear layers of one shape as one batched product: [G, B, inputs] -> [G, B,
    outputs]."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(groups, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Apply layer g to ``x[g]``."""
        return torch.baddbmm(self.bias, x, self.weight)


class Trunk(nn.Module):
    """A ``Trunk`` contains all MLPs and heads that read one input; their first layers are one matrix product.

    There are ``experts`` MLPs, possibly none, and any number of two-layer heads. ``forward``: [B, width] -> latents
    [experts, B, latent] and one [B, outputs] per head, in the order of ``heads`` = (hidden, outputs) pairs."""

    def __init__(
        self, width: int, experts: int, hidden: Sequence[int], latent: int, heads: Sequence[tuple[int, int]] = ()
    ) -> None:
        super().__init__()
        self.experts, self.sizes = experts, [experts * hidden[0], *(size for size, _ in heads)]
        self.first = nn.Linear(width, sum(self.sizes))
        layers = zip(hidden, [*hidden[1:], latent]) if experts else ()
        self.rest = nn.ModuleList(GroupedLinear(experts, a, b) for a, b in layers)
        self.heads = nn.ModuleList(nn.Linear(size, outputs) for size, outputs in heads)

    def start_at_zero(self) -> None:
        """Let all latents be zero before training."""
        for parameter in self.rest[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the latents and the outputs of the heads."""
        hidden, *heads = torch.relu_(self.first(x)).split(self.sizes, dim=1)
        latents = hidden.view(len(x), self.experts, self.sizes[0] // max(1, self.experts)).transpose(0, 1)
        for index, layer in enumerate(self.rest):
            latents = layer(torch.relu(latents) if index else latents)
        return latents, [head(part) for head, part in zip(self.heads, heads)]


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Build linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
