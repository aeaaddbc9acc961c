"""Training and scoring of a retriever over semantic IDs. Plain torch; the workers are passed in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid import config
from adasid.errors import InputError
from adasid.metrics.retrieval import averages, gains, intervals, rank_histogram, shared_gains
from adasid.ragged import runs
from adasid.recommenders import retriever
from adasid.recommenders.tokens import ItemTokens
from adasid.tables import SPLITS, STRATA
from adasid.training.epochs import EpochTraining
from adasid.training.sequences import Histories, epoch
from adasid.training.workers import Workers

_SCORES = 1 << 26
_DRAWS = 1000


@dataclass
class RetrievalData:
    """What one worker trains and scores on: its users' histories; ``counts`` [M]: training events of every item; ``strata`` [M]: place of
    every item's stratum in ``tables.STRATA``; ``version`` names the input in errors."""

    train: Histories
    validation: Histories
    test: Histories
    counts: NDArray[np.int64]
    strata: NDArray[np.int64]
    version: str


@dataclass
class Ranked:
    """Targets by stratum and rank, ``targets`` [strata, ranks]; by stratum, size of the SID and rank of its first item, ``groups`` [strata, S, ranks]
    (:func:`adasid.metrics.retrieval.rank_histogram`); ``sizes`` [S]: items that share a SID."""

    targets: Tensor
    groups: Tensor
    sizes: Tensor

    @staticmethod
    def none(sizes: Tensor) -> Ranked:
        """Nothing ranked yet."""
        empty = torch.zeros(0, dtype=torch.int64)
        kinds, ranks = rank_histogram(empty, empty, len(STRATA)), rank_histogram(empty, empty, len(STRATA) * len(sizes))
        return Ranked(kinds, ranks.view(len(STRATA), len(sizes), -1), sizes)

    def add(self, ranks: Tensor, firsts: Tensor, kinds: Tensor, size: Tensor) -> None:
        """Targets [B] with their rank, that of the first item of their SID, their stratum, and the place of their SID's size in ``sizes``."""
        self.targets += rank_histogram(ranks, kinds, len(STRATA))
        self.groups += rank_histogram(firsts, kinds * len(self.sizes) + size, len(STRATA) * len(self.sizes)).view_as(self.groups)


class RetrievalTraining(EpochTraining):
    """One training run on one worker; validation NDCG@10 chooses the epoch."""

    watched = "validation_ndcg@10"
    name = "retrieval"
    model: retriever.Retriever

    def __init__(
        self,
        settings: config.Retrieval,
        catalogue: ItemTokens,
        data: RetrievalData,
        folder: Path,
        seed: int,
        workers: Workers,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.data = settings, data
        torch.manual_seed(seed)
        model = retriever.build(settings, catalogue.to(device)).to(device)
        dense = [p for p in model.parameters() if p is not model.table]
        optimizers = {
            "dense": torch.optim.Adam(dense, lr=settings.lr, betas=(0.9, 0.98)),
            "table": torch.optim.Adagrad([model.table], lr=settings.table_lr),
        }
        limits = (settings.epochs, settings.patience)
        super().__init__(model, optimizers, limits, folder, seed, workers, torch.device(device), data.version, settings.average)
        self.log_q = torch.from_numpy(np.log(np.maximum(data.counts, 1) / max(1, data.counts.sum()))).float().to(device)

    def check(self) -> None:
        """Every split needs users."""
        users = [len(self.data.train), len(self.data.validation), len(self.data.test)]
        for split, total in zip(SPLITS, self.workers.sum(torch.tensor(users, device=self.device)).tolist()):
            if not total:
                raise InputError(f"retrieval: {self.version} has no user in split {split!r}: bring more events, or change features.split")

    def train_epoch(self, number: int) -> float:
        """One pass over the users."""
        total, length = torch.zeros(2, device=self.device), self.settings.max_length + 1
        for step, events in enumerate(epoch(self.data.train, self.settings.batch_users, length, self.seed, number, self.workers, self.device)):
            ids = torch.from_numpy(events).to(self.device)
            generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + number) * 1_000_003 + step) % 2**63)
            self.lap("data")
            loss = self._loss(ids, generator)
            self.step(loss, number, step)
            total += torch.stack([loss.detach(), torch.ones((), device=self.device)])
        total = self.workers.sum(total)
        return float(total[0] / total[1])

    def _loss(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        ids = ids[(ids >= 0).sum(1).argsort(stable=True)]
        inputs, targets = ids[:, :-1], ids[:, 1:]
        valid = targets >= 0
        states = self.model.outputs(inputs, valid)
        pool = self.workers.gather_ragged(targets[valid])
        negatives = pool[torch.randint(len(pool), (self.settings.negatives,), generator=generator).to(self.device)]
        return self.model.loss(states, targets[valid], negatives, self.log_q)

    def validate(self) -> dict[str, float]:
        """Recall and NDCG of the first ``eval_users`` users by user_id."""
        return averages(self._ranked(self.data.validation, self.settings.validation_beam, self.settings.eval_users).targets.numpy(), gains())

    def test(self) -> dict[str, Any]:
        """Recall and NDCG of all users, by stratum of the target."""
        started = time.monotonic()
        found = self._ranked(self.data.test, self.settings.beam)
        seconds = time.monotonic() - started
        return {
            "test": averages(found.targets.numpy(), gains()),
            "strata": by_stratum(found, self.seed),
            "test_users_per_second": float(found.targets.sum()) / max(seconds, 1e-9),
        }

    @torch.inference_mode()
    def _ranked(self, histories: Histories, beam: int, users: int | None = None) -> Ranked:
        """Where the targets of all workers' users (the first ``users``, if given) stand."""
        mine = np.arange(len(histories) if users is None else min(len(histories), -(-users // self.workers.world)))
        group = self.model.catalogue.group
        strata = torch.from_numpy(self.data.strata).to(self.device)
        sizes, size = torch.unique(torch.bincount(group), return_inverse=True)
        order = group.argsort(stable=True)
        place = torch.empty_like(order)  # of an item among those of its SID
        place[order] = runs(torch.bincount(group))[1]
        found = Ranked.none(sizes.cpu())
        for states, targets in self._states(histories, mine, beam):
            ranks, kinds = self.model.ranks(states, targets, beam), strata[targets]
            found.add(ranks, ranks - place[targets], kinds, size[group[targets]])
        targets, groups = (self.workers.sum(counts.to(self.device)).cpu() for counts in (found.targets, found.groups))
        return Ranked(targets, groups, found.sizes)

    def _states(self, histories: Histories, users: NDArray[np.int64], beam: int) -> Iterator[tuple[Tensor, Tensor]]:
        """State after the history and target of ``users``, some at a time, those of short histories first."""
        chunk = max(1, min(256, _SCORES // self.model.scores_a_user(beam)))
        users = users[np.diff(histories.starts)[users].argsort(kind="stable")]
        for part in np.array_split(users, max(1, -(-len(users) // chunk))):
            if len(part):
                ids = torch.from_numpy(histories.last(part, self.settings.max_length)).to(self.device)
                last = (ids >= 0).sum(1) - 1
                yield self.model.states(ids)[torch.arange(len(part)), last], torch.from_numpy(histories.targets[part]).to(self.device)


def by_stratum(found: Ranked, seed: int) -> dict[str, dict[str, Any]]:
    """Metrics of all targets and of each stratum that has some: ``corrected_*`` is what a random order of the items that share a SID would give
    on average (methods 8.6); ``intervals`` are 95 % bootstrap intervals over users, of both."""
    metrics, targets, groups = dict[str, dict[str, Any]](), found.targets.numpy(), found.groups.numpy()
    plain, shared = gains(), shared_gains(found.sizes.numpy())
    for name, rows in {"all": slice(None), **{stratum: slice(i, i + 1) for i, stratum in enumerate(STRATA)}}.items():
        own, together = targets[rows].sum(0), groups[rows].sum(0)
        if own.sum():
            spread = intervals(own, plain, _DRAWS, seed) | intervals(together, shared, _DRAWS, seed)
            metrics[name] = {"users": int(own.sum()), **averages(own, plain), **averages(together, shared)}
            metrics[name]["intervals"] = {key: list(ends) for key, ends in spread.items()}
    return metrics
