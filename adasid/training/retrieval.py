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
from adasid.metrics.retrieval import DEEPEST, intervals, of_histogram, rank_histogram
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
        inputs, targets = ids[:, :-1], ids[:, 1:]
        valid = targets >= 0
        states = self.model.states(inputs)[valid]
        pool = self.workers.gather_ragged(targets[valid])
        negatives = pool[torch.randint(len(pool), (self.settings.negatives,), generator=generator).to(self.device)]
        return self.model.loss(states, targets[valid], negatives, self.log_q)

    def validate(self) -> dict[str, float]:
        """Recall and NDCG of the first ``eval_users`` users by user_id."""
        return of_histogram(self._ranked(self.data.validation, self.settings.validation_beam, self.settings.eval_users)[0].numpy())

    def test(self) -> dict[str, Any]:
        """Recall and NDCG of all users, by stratum of the target."""
        started = time.monotonic()
        targets, credit = self._ranked(self.data.test, self.settings.beam)
        seconds = time.monotonic() - started
        return {
            "test": of_histogram(targets.numpy()),
            "strata": by_stratum(targets.numpy(), credit.numpy(), self.seed),
            "test_users_per_second": float(targets.sum()) / max(seconds, 1e-9),
        }

    @torch.inference_mode()
    def _ranked(self, histories: Histories, beam: int, users: int | None = None) -> Tensor:
        """Histograms by stratum of all workers' users (the first ``users``, if given): of ranks, and of the ranks that a random order of the
        items of each SID would give (methods 8.6), [2, strata, ranks]."""
        mine = np.arange(len(histories) if users is None else min(len(histories), -(-users // self.workers.world)))
        group = self.model.catalogue.group
        sizes, strata = torch.bincount(group)[group], torch.from_numpy(self.data.strata).to(self.device)
        order = group.argsort(stable=True)
        place = torch.empty_like(order)  # of an item among those of its SID
        place[order] = runs(torch.bincount(group))[1]
        found = torch.zeros(2, len(STRATA), rank_histogram(group[:0], group[:0], 1).shape[1], dtype=torch.float64)
        for states, targets in self._states(histories, mine, beam):
            ranks, kinds, number = self.model.ranks(states, targets, beam), strata[targets], sizes[targets]
            found[0] += rank_histogram(ranks, kinds, len(STRATA))
            owner, later = runs(number.clamp(max=DEEPEST))
            found[1] += rank_histogram((ranks - place[targets])[owner] + later, kinds[owner], len(STRATA), 1 / number[owner])
        return self.workers.sum(found.to(self.device)).cpu()

    def _states(self, histories: Histories, users: NDArray[np.int64], beam: int) -> Iterator[tuple[Tensor, Tensor]]:
        """State after the history and target of ``users``, some at a time."""
        chunk = max(1, min(256, _SCORES // self.model.scores_a_user(beam)))
        for part in np.array_split(users, max(1, -(-len(users) // chunk))):
            if len(part):
                ids = torch.from_numpy(histories.last(part, self.settings.max_length)).to(self.device)
                last = (ids >= 0).sum(1) - 1
                yield self.model.states(ids)[torch.arange(len(part)), last], torch.from_numpy(histories.targets[part]).to(self.device)


def by_stratum(targets: NDArray[np.float64], credit: NDArray[np.float64], seed: int) -> dict[str, dict[str, Any]]:
    """Metrics of all targets and of each stratum that has some, from the histograms of targets and of credit (each [strata, ranks]):
    ``corrected_*`` is what a random order of the items that share a SID would give on average (methods 8.6: no credit for the order in which
    they happen to stand); ``intervals`` are 95 % bootstrap intervals over users."""
    found = {}
    for name, rows in {"all": slice(None), **{stratum: slice(i, i + 1) for i, stratum in enumerate(STRATA)}}.items():
        own, users = targets[rows].sum(0), float(targets[rows].sum())
        if users:
            corrected = {f"corrected_{k}": v for k, v in of_histogram(credit[rows], users=users).items()}
            spread = {k: list(v) for k, v in intervals(own, _DRAWS, seed).items()}
            found[name] = {"users": int(users), **of_histogram(own), **corrected, "intervals": spread}
    return found
