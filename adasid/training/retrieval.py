"""Train and score a retriever over semantic IDs. This is plain torch; the workers are passed in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid import config
from adasid.data.sequences import Histories, epoch_users, log_q
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location
from adasid.metrics.retrieval import DEEPEST, averages, gains, intervals, rank_histogram, shared_gains
from adasid.ragged import runs
from adasid.recommenders import heads, retriever
from adasid.recommenders.tokens import ItemTokens
from adasid.tables import SPLITS, STRATA
from adasid.training.downstream import DownstreamTraining

_ENCODED = 256
"""Users whose histories are encoded at a time."""
_DRAWS = 1000


@dataclass
class RetrievalData:
    """``RetrievalData`` is the training and evaluation data of one worker: the histories of its users, of validation
    and test those that are evaluated; ``strata`` [M]: index of every item's stratum in ``tables.STRATA``; ``version``:
    name of the input in errors."""

    train: Histories
    validation: Histories
    test: Histories
    strata: NDArray[np.int8]
    version: str


@dataclass
class Ranked:
    """``Ranked`` contains rank histograms of targets: ``targets`` [strata, ranks] by stratum and rank; ``everywhere``
    [ranks] by rank in a list that includes the history; ``groups`` [strata, S, ranks] by stratum, size of the SID and
    rank of its first item (:func:`adasid.metrics.retrieval.rank_histogram`); ``sizes`` [S]: numbers of items in the
    list that share a SID, ascending."""

    targets: Tensor
    everywhere: Tensor
    groups: Tensor
    sizes: Tensor

    @staticmethod
    def of(ranks: Tensor, everywhere: Tensor, firsts: Tensor, kinds: Tensor, size: Tensor) -> Ranked:
        """Count targets [B] from their ranks, the rank of the first item of their SID, their stratum, and the size of
        their SID."""
        sizes, size_index = torch.unique(size, return_inverse=True)
        groups = rank_histogram(firsts, kinds * len(sizes) + size_index, len(STRATA) * len(sizes))
        total = rank_histogram(everywhere, torch.zeros_like(everywhere), 1)[0]
        return Ranked(
            rank_histogram(ranks, kinds, len(STRATA)),
            total,
            groups.view(len(STRATA), len(sizes), DEEPEST + 1),
            sizes.cpu(),
        )

    def over(self, sizes: Tensor) -> Ranked:
        """Return the same histograms over ``sizes``, ascending, which include all present sizes."""
        groups = self.groups.new_zeros(len(STRATA), len(sizes), self.groups.shape[2])
        groups[:, torch.searchsorted(sizes, self.sizes)] = self.groups
        return Ranked(self.targets, self.everywhere, groups, sizes)

    def __add__(self, other: Ranked) -> Ranked:
        sizes = torch.unique(torch.cat([self.sizes, other.sizes]))
        one, two = self.over(sizes), other.over(sizes)
        return Ranked(one.targets + two.targets, one.everywhere + two.everywhere, one.groups + two.groups, sizes)

    @staticmethod
    def none() -> Ranked:
        """Return empty histograms."""
        empty = torch.zeros(0, dtype=torch.int64)
        return Ranked.of(empty, empty, empty, empty, empty)


class RetrievalTraining(DownstreamTraining):
    """``RetrievalTraining`` is one training run on one worker; validation NDCG@10 selects the epoch."""

    monitor = "validation_ndcg@10"
    name = "retrieval"
    model: retriever.Retriever

    def __init__(
        self,
        settings: config.Retrieval,
        catalogue: ItemTokens,
        data: RetrievalData,
        folder: Location,
        seed: int,
        workers: Workers,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.data = settings, data
        torch.manual_seed(seed)
        model = heads.build(settings, catalogue.to(device)).to(device)
        dense = [p for p in model.parameters() if all(p is not table for table in model.tables)]
        optimizers = {
            "dense": torch.optim.Adam(dense, lr=settings.lr, betas=(0.9, 0.98)),
            "table": torch.optim.Adagrad(model.tables, lr=settings.table_lr),
        }
        limits = (settings.epochs, settings.patience)
        super().__init__(
            model, optimizers, limits, folder, seed, workers, torch.device(device), data.version, settings.average
        )
        self.log_q = torch.zeros(0, device=device)
        if isinstance(model, heads.ItemRetriever) and settings.negatives:
            targets = data.train.counts(len(data.strata), settings.max_length)[1]
            self.log_q = log_q(targets, len(data.train), workers, self.device)

    def check(self) -> None:
        """Check that every split has users."""
        users = [len(self.data.train), len(self.data.validation), len(self.data.test)]
        for split, total in zip(SPLITS, self.workers.sum(torch.tensor(users, device=self.device)).tolist()):
            if not total:
                raise InputError(
                    f"retrieval: {self.version} has no user in split {split!r}: bring more events, or change "
                    "features.split"
                )

    def train_epoch(self, number: int) -> float:
        """Train on all users once."""
        total, length = torch.zeros(2, device=self.device), self.settings.max_length + 1
        order = epoch_users(self.data.train, self.settings.batch_users, self.seed, number, self.workers, self.device)
        for step in self.tracked(range(len(order)), f"epoch {number}/{self.epochs}"):
            ids = torch.from_numpy(self.data.train.last(order[step], length)).to(self.device)
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
        """Compute Recall and NDCG of the users of validation."""
        ranked = self._ranked("validation", self.settings.validation_beam)
        return averages(ranked.targets.numpy(), gains())

    def test(self) -> dict[str, Any]:
        """Compute Recall and NDCG of the users of the test, by stratum of the target; ``test_users``: their number;
        ``test_repeatable``: with lists that include the history; ``repeats``: share of targets that are in the
        history."""
        started = time.monotonic()
        ranked = self._ranked("test", self.settings.beam)
        seconds, users = time.monotonic() - started, float(ranked.targets.sum())
        repeats = self.workers.sum(torch.tensor(repeated(self.data.test), device=self.device))
        return {
            "test": averages(ranked.targets.numpy(), gains()),
            "test_users": int(users),
            "test_repeatable": averages(ranked.everywhere.numpy(), gains()),
            "strata": by_stratum(ranked, self.seed),
            "repeats": float(repeats) / max(1.0, users),
            "test_users_per_second": users / max(seconds, 1e-9),
        }

    @torch.inference_mode()
    def _ranked(self, split: str, beam: int) -> Ranked:
        """Rank the targets of all workers' users."""
        histories: Histories = getattr(self.data, split)
        group, strata = self.model.catalogue.group, torch.from_numpy(self.data.strata).to(self.device)
        sizes, order = torch.bincount(group), group.argsort(stable=True)
        rank_in_sid = torch.empty_like(group)  # index of an item within its SID
        rank_in_sid[order] = runs(sizes)[1].int()
        del order
        ranked = Ranked.none()
        for part, states, targets in self._states(split, beam):
            last = None if self.settings.repeatable else torch.from_numpy(histories.last(part)).to(self.device)
            seen = None if last is None else distinct(last)
            ranks, everywhere = self.model.ranks(states, targets, beam, seen)
            before, size = rank_in_sid[targets], sizes[group[targets]]
            if seen is not None:  # items excluded from a list do not count in it
                mates = (seen >= 0) & (group[seen] == group[targets][:, None]) & (seen != targets[:, None])
                before, size = before - (mates & (seen < targets[:, None])).sum(1), size - mates.sum(1)
            ranked += Ranked.of(ranks, everywhere, ranks - before, strata[targets].long(), size)
        sizes = torch.unique(self.workers.gather_ragged(ranked.sizes.to(self.device)))
        ranked = ranked.over(sizes.cpu())
        targets, everywhere, groups = (
            self.workers.sum(part.to(self.device)).cpu() for part in (ranked.targets, ranked.everywhere, ranked.groups)
        )
        return Ranked(targets, everywhere, groups, ranked.sizes)

    def _states(self, split: str, beam: int) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
        """Yield this worker's users in batches, short histories first, with the state after their history and their
        target."""
        histories: Histories = getattr(self.data, split)
        lengths = np.diff(histories.starts)
        longer = 0 if self.settings.repeatable else int(lengths.max(initial=0))  # items that lists leave out
        size, users = self.model.users_at_once(beam + longer), lengths.argsort(kind="stable")
        for part in self.tracked(np.array_split(users, max(1, -(-len(users) // size))), split):
            if len(part):
                chunks = np.array_split(part, -(-len(part) // _ENCODED))
                states = torch.cat([self._last_states(histories, chunk) for chunk in chunks])
                yield part, states, torch.from_numpy(histories.targets[part]).to(self.device)

    def _last_states(self, histories: Histories, users: NDArray[np.int64]) -> Tensor:
        ids = torch.from_numpy(histories.last(users, self.settings.max_length)).to(self.device)
        return self.model.states(ids)[torch.arange(len(users)), (ids >= 0).sum(1) - 1]


def repeated(histories: Histories) -> int:
    """Count the users whose target is in their (truncated) history."""
    users = np.arange(len(histories))
    parts = np.array_split(users, -(-len(users) // retriever.RANKED)) if len(users) else []
    return sum(int((histories.last(part) == histories.targets[part, None]).any(1).sum()) for part in parts)


def distinct(items: Tensor) -> Tensor:
    """Replace repeated items in the rows of ``items`` [B, S] by -1; rows are sorted."""
    items = items.sort(dim=1).values
    items[:, 1:][items[:, 1:] == items[:, :-1]] = -1
    return items


def by_stratum(ranked: Ranked, seed: int) -> dict[str, dict[str, Any]]:
    """Compute the metrics of all targets and of each non-empty stratum: ``corrected_*`` is the expectation under a
    random order of the items that share a SID (methods 8.6); ``intervals`` are 95 % bootstrap intervals over users, of
    both."""
    metrics, targets, groups = dict[str, dict[str, Any]](), ranked.targets.numpy(), ranked.groups.numpy()
    plain, shared = gains(), shared_gains(ranked.sizes.numpy())
    for name, rows in {"all": slice(None), **{stratum: slice(i, i + 1) for i, stratum in enumerate(STRATA)}}.items():
        counts, shared_counts = targets[rows].sum(0), groups[rows].sum(0)
        if counts.sum():
            spread = intervals(counts, plain, _DRAWS, seed) | intervals(shared_counts, shared, _DRAWS, seed)
            metrics[name] = {"users": int(counts.sum()), **averages(counts, plain), **averages(shared_counts, shared)}
            metrics[name]["intervals"] = {key: list(ends) for key, ends in spread.items()}
    return metrics
