"""PPNet (PEPNet, arXiv 2302.01115, as FuxiCTR builds it; methods 7.5, 7.6) predicts clicks with hidden layers that are
scaled for each user and item. Semantic IDs, if used, replace item ids also in the prior and the history, so that the
model sees no item id."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adasid import config
from adasid.recommenders.ngrams import hashed, hashed_index
from adasid.recommenders.tokens import ItemTokens, embedded_ngrams

_SPARSE = 1 << 17
"""Rows from which the gradients of a table of items are sparse: one that has a row an item, or many hashed n-grams."""


class ItemVectors(nn.Module):
    """``ItemVectors`` computes vectors of items from their tokens: ``concat`` (a narrow embedding of each token),
    ``sum``, or ``prefix`` (one hashed embedding for each prefix of the SID; for residual SIDs, methods 7.6); to the
    first two the embeddings of the n-grams are added. ``width``: of the vectors (concat: ``settings.width`` rounded
    up)."""

    def __init__(self, settings: config.Ranking, catalogue: ItemTokens) -> None:
        super().__init__()
        s, slots = settings, len(catalogue.sizes)
        self.settings, self.slots = s, slots
        self.width = -(-s.width // slots) * slots if s.items == "concat" else s.width
        rows = catalogue.rows
        if s.items == "prefix":
            prefixes = [range(length + 1) for length in range(slots)]
            rows = hashed(catalogue.codes, prefixes, s.ngram_rows, pad_lacks=False)
        size = s.ngram_rows if s.items == "prefix" else sum(catalogue.sizes)
        self.table = nn.Embedding(size, self.width // slots if s.items == "concat" else s.width, sparse=size >= _SPARSE)
        nn.init.normal_(self.table.weight, std=0.01)
        self.rows, self.catalogue = rows, catalogue
        self.ngrams: nn.Parameter | None = None
        self.sparse_ngrams = catalogue.ngram_rows >= _SPARSE
        if catalogue.ngram_rows and s.items != "prefix":
            self.ngrams = nn.Parameter(torch.zeros(catalogue.ngram_rows + 1, self.width))

    def sparse_tables(self) -> list[nn.Parameter]:
        """Return the tables whose gradients are sparse."""
        tables: list[Tensor | None] = [self.table.weight if self.table.sparse else None]
        tables += [self.ngrams if self.sparse_ngrams else None]
        return [table for table in tables if isinstance(table, nn.Parameter)]

    def forward(self, items: Tensor) -> Tensor:
        """Return the vectors of items: item_index [...] -> [..., width]. With ``weights`` a token's embedding is scaled
        by the tokenizer's weight of the token."""
        tokens = self.table(self.rows[items].long())
        if self.settings.weights:
            tokens = tokens * self.catalogue.weights[items][..., None]
        vectors: Tensor = tokens.flatten(-2) if self.settings.items == "concat" else tokens.sum(-2)
        if self.ngrams is not None:
            added = embedded_ngrams(self.catalogue, self.ngrams, items.reshape(-1), self.sparse_ngrams)
            vectors = vectors + added.view(vectors.shape)
        return vectors


class Gate(nn.Module):
    """``Gate`` is GateNU: ``2 sigmoid(relu(x W + b) W' + b')``, about 1 at the start."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return the gate values: [B, inputs] -> [B, outputs], each in (0, 2)."""
        return 2 * self.layers(x)  # type: ignore[no-any-return]


class PPNet(nn.Module):
    """``PPNet`` computes the logit of a click from the user, the mean of the history, and the item. The gates read the
    prior (other embeddings of user and item) and all features without gradient, and scale each hidden layer's output
    after its activation. More than ``settings.user_rows`` users share so many rows of the users' table, whose gradients
    are sparse."""

    def __init__(self, settings: config.Ranking, catalogue: ItemTokens, users: int) -> None:
        super().__init__()
        s = settings
        self.items, self.prior_items = ItemVectors(s, catalogue), ItemVectors(s, catalogue)
        self.rows = min(users, s.user_rows)
        self.hashed = users > self.rows
        self.users = nn.Embedding(self.rows, 2 * s.width, sparse=True)  # a user's feature beside its prior
        nn.init.normal_(self.users.weight, std=0.01)
        self.gated = list(catalogue.behavior) if s.weights else []
        self.weights = catalogue.weights
        features = s.width + 2 * self.items.width + len(self.gated)
        prior = s.width + self.prior_items.width + features
        sizes = (features, *s.hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.gates = nn.ModuleList(Gate(prior, s.gate_hidden, b) for b in s.hidden)
        self.dropout, self.out = nn.Dropout(s.dropout), nn.Linear(sizes[-1], 1)

    def sparse_tables(self) -> list[nn.Parameter]:
        """Return the tables whose gradients are sparse."""
        return [*self.users.parameters(), *self.items.sparse_tables(), *self.prior_items.sparse_tables()]

    def forward(self, users: Tensor, histories: Tensor, items: Tensor) -> Tensor:
        """Return logits [B]. ``users`` [B] user_index, ``items`` [B], ``histories`` [B / n, T] item_index padded with
        -1, each for n consecutive users and items."""
        users = hashed_index(users, self.rows) if self.hashed else users
        mask = (histories >= 0).to(self.out.weight.dtype)[..., None]
        vectors = self.items(torch.cat([histories.clamp(min=0).flatten(), items]))
        past, chosen = vectors.split([histories.numel(), len(items)])
        past = (past.view(*histories.shape, -1) * mask).sum(1) / mask.sum(1).clamp(min=1)
        past = past.repeat_interleave(len(items) // len(histories), dim=0)
        user, prior_user = self.users(users).chunk(2, dim=1)
        features = torch.cat([user, past, chosen, self.weights[items][:, self.gated]], dim=1)
        prior = torch.cat([prior_user, self.prior_items(items), features.detach()], dim=1)
        x = features
        for layer, gate in zip(self.layers, self.gates):
            x = self.dropout(torch.relu(layer(x)) * gate(prior))
        return self.out(x)[:, 0]  # type: ignore[no-any-return]
