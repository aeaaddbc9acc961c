"""Train and score the click-through model over semantic IDs. This is plain torch; the workers are passed in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid import config, files
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location
from adasid.metrics.ranking import auc, ranking_metrics
from adasid.recommenders.ppnet import PPNet
from adasid.recommenders.tokens import ItemTokens
from adasid.tables import RANKING_ONLY, RANKING_SCORES, SPLITS, STRATA
from adasid.training.downstream import DownstreamTraining

_DRAWS = 200
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Events:
    """``Events`` contains the events of all users, by user and time: ``users`` [n] (a dense index, in the order of
    user_id), ``items``, ``labels`` (0, 1, or -1 for none) and ``splits`` (index in ``tables.SPLITS``; ``RANKING_ONLY``
    counts as train), all [n].

    Items of the events that are in histories are ``visited`` [v], in the same order; each event comes after the first
    ``before`` [n] of them, and those of its user begin at ``first`` [n]."""

    users: Ints
    items: Ints
    labels: Ints
    splits: Ints
    visited: Ints
    before: Ints
    first: Ints

    @staticmethod
    def from_batches(batches: Iterable[pa.RecordBatch]) -> Events:
        """Build the events from batches with the columns user_id, position, item_index, label, in_history and split."""
        table = (
            pa.Table.from_batches(list(batches))
            .sort_by([("user_id", "ascending"), ("position", "ascending")])
            .combine_chunks()
        )
        names = table["user_id"].combine_chunks()
        opens = np.ones(len(names), bool)
        opens[1:] = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
        splits = pc.index_in(table["split"].combine_chunks(), pa.array([*SPLITS, RANKING_ONLY]))
        items, labels = (table[name].fill_null(-1).to_numpy().astype(np.int64) for name in ("item_index", "label"))
        visits = table["in_history"].to_numpy(zero_copy_only=False).astype(bool)
        users, before = np.cumsum(opens) - 1, np.cumsum(visits) - visits
        places = splits.to_numpy(zero_copy_only=False).astype(np.int64) % len(SPLITS)
        return Events(users, items, labels, places, items[visits], before, before[np.flatnonzero(opens)][users])

    def histories(self, events: Ints, length: int) -> Ints:
        """Return at most the latest ``length`` items before each event, padded at the end with -1: [B, longest]."""
        before = self.before[events]
        first = np.maximum(self.first[events], before - length)
        width = max(1, int((before - first).max(initial=1)))
        position = first[:, None] + np.arange(width)
        return np.where(position < before[:, None], self.visited[np.minimum(position, len(self.visited) - 1)], -1)


@dataclass(frozen=True)
class RankingData:
    """``RankingData`` is the training and evaluation data: the ``events`` of all users, of which a worker takes every
    ``world``-th; ``counts`` and ``strata`` [M] as in ``RetrievalData``; ``version``: name of the input in errors."""

    events: Events
    counts: Ints
    strata: Ints
    version: str


class RankingTraining(DownstreamTraining):
    """``RankingTraining`` is one training run on one worker; validation AUC selects the epoch. ``shards_from``: number
    of test samples of all workers from which scores are written to files."""

    monitor = "validation_auc"
    name = "ranking"
    model: PPNet

    def __init__(
        self,
        settings: config.Ranking,
        catalogue: ItemTokens,
        data: RankingData,
        folder: Location,
        seed: int,
        workers: Workers,
        device: torch.device | str = "cpu",
        shards_from: int | None = None,
    ) -> None:
        self.shards_from = shards_from
        self.settings, self.events, self.strata = settings, data.events, data.strata
        torch.manual_seed(seed)
        model = PPNet(settings, catalogue.to(device), int(data.events.users.max(initial=-1)) + 1).to(device)
        optimizers = {"adam": torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)}
        super().__init__(
            model,
            optimizers,
            (settings.epochs, settings.patience),
            folder,
            seed,
            workers,
            torch.device(device),
            data.version,
        )
        self.labels = self._labels()
        popularity = np.maximum(data.counts, 0).astype(np.float64) ** settings.negative_power * (data.counts > 0)
        self.cdf = np.cumsum(popularity) / max(popularity.sum(), 1e-12)
        self.parts = {split: self._part(index) for index, split in enumerate(SPLITS)}
        self.drawn = {split: self._negatives(split) for split in SPLITS[1:]}

    def check(self) -> None:
        """Check that every worker has training samples, and that validation and test have both classes."""
        for split in SPLITS:
            mine, drawn = self.events.labels[self.parts[split]], 0 if split == "train" else self.drawn[split].size
            if not self.workers.agree(bool(len(mine)) or split != "train", self.device):
                raise InputError(
                    f"ranking: {self.version} has no training sample for one of {self.workers.world} workers: lower "
                    "ray.workers"
                )
            classes = self.workers.sum(
                torch.tensor([int(mine.sum()), int((mine == 0).sum()) + drawn], device=self.device)
            ).tolist()
            if split != "train" and not all(classes):
                raise InputError(
                    f"ranking: split {split!r} of {self.version} has {classes[0]} positive and {classes[1]} negative "
                    "samples: needs both"
                )

    def _labels(self) -> str:
        """Return the kind of labels, ``ratings`` or ``sampled``."""
        negatives = bool((self.events.labels == 0).any())
        if self.settings.labels == "ratings" and not negatives:
            raise InputError(
                f"ranking.labels is 'ratings' but {self.version} has no negative event: set ranking.labels: sampled, "
                "or bring ratings"
            )
        return self.settings.labels if self.settings.labels != "auto" else ("ratings" if negatives else "sampled")

    def _part(self, place: int) -> Ints:
        """Return this worker's events of a split that are samples: those with a history and a label, and only positive
        ones if labels are sampled."""
        e = self.events
        chosen = (e.splits == place) & (e.users % self.workers.world == self.workers.rank) & (e.before > e.first)
        return np.flatnonzero(chosen & (e.labels == 1 if self.labels == "sampled" else e.labels >= 0))

    def _negatives(self, split: str) -> Ints:
        """Return the sampled negatives of every held-out event of this worker [n, negatives], equal for every seed,
        model and number of workers."""
        if self.labels == "ratings":
            return np.zeros((len(self.parts[split]), 0), np.int64)
        rows = np.flatnonzero(self.events.splits == SPLITS.index(split))
        uniform = np.random.default_rng([1, SPLITS.index(split)]).random((len(rows), self.settings.negatives))
        return self._draw(uniform[np.searchsorted(rows, self.parts[split])])

    def _draw(self, uniform: NDArray[np.float64]) -> Ints:
        return np.minimum(np.searchsorted(self.cdf, uniform, side="right"), len(self.cdf) - 1).astype(np.int64)

    def train_epoch(self, number: int) -> float:
        """Train on the training events once, each with its sampled negatives."""
        rng = np.random.default_rng([self.seed, number, self.workers.rank])
        mine, sampled = self.parts["train"], self.labels == "sampled"
        share = max(1, self.settings.batch // self.workers.world // (1 + self.settings.negatives * sampled))
        largest = int(self.workers.gather(torch.tensor([len(mine)], device=self.device)).max())
        order = np.resize(rng.permutation(mine), -(-largest // share) * share)
        total = torch.zeros(2, device=self.device)
        for step, start in enumerate(range(0, len(order), share)):
            events = order[start : start + share]
            drawn = self._draw(rng.random((len(events), self.settings.negatives * sampled)))
            batch, labels = self._batch(events, drawn)
            self.lap("data")
            loss = torch.nn.functional.binary_cross_entropy_with_logits(self.model(*batch), labels)
            self.step(loss, number, step)
            total += torch.stack([loss.detach(), torch.ones((), device=self.device)])
        total = self.workers.sum(total)
        return float(total[0] / total[1])

    def _batch(self, events: Ints, drawn: Ints) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return (users, histories, items) and labels of ``events`` and of their sampled negatives ``drawn`` [B, n]:
        event by event, the event's item first; histories are per event."""
        times = 1 + drawn.shape[1]
        items = np.concatenate([self.events.items[events][:, None], drawn], axis=1).reshape(-1)
        labels = np.concatenate([self.events.labels[events][:, None], np.zeros_like(drawn)], axis=1).reshape(-1)
        arrays = (
            np.repeat(self.events.users[events], times),
            self.events.histories(events, self.settings.max_length),
            items,
            labels,
        )
        users, histories, items_, labels_ = (
            torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays
        )
        return (users, histories, items_), labels_.float()

    def _scored(self, split: str) -> Iterator[Tensor]:
        """Yield (user, item, label, score) of this worker's held-out samples [n, 4], in chunks."""
        events, drawn = self.parts[split], self.drawn[split]
        for rows in np.array_split(np.arange(len(events)), max(1, len(events) // 2048)):
            if len(rows):
                (users, histories, items), labels = self._batch(events[rows], drawn[rows])
                yield torch.stack(
                    [users.double(), items.double(), labels.double(), self.model(users, histories, items).double()],
                    dim=1,
                )

    @torch.inference_mode()
    def _samples(self, split: str) -> tuple[Ints, Ints, Ints, NDArray[np.float64]]:
        """Return users, items, labels and scores of all workers' samples, in the order of the users."""
        mine = torch.cat([torch.zeros(0, 4, dtype=torch.float64, device=self.device), *self._scored(split)])
        rows = self.workers.gather_ragged(mine).cpu().numpy()
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        users, items, labels = rows[:, :3].astype(np.int64).T
        return users, items, labels, rows[:, 3]

    @torch.inference_mode()
    def _shards(self, split: str) -> list[str]:
        """Write this worker's samples in chunks to a file of ``scores``; return the names of all workers' files when
        they are complete."""
        folder, world = self.folder / "scores", self.workers.world
        names = [f"{rank}-of-{world}.parquet" for rank in range(world)]
        with (
            files.replacing(folder / names[self.workers.rank]) as draft,
            pq.ParquetWriter(draft, RANKING_SCORES) as file,
        ):
            for rows in self._scored(split):
                users, items, labels, scores = rows.cpu().numpy().T
                strata = pa.array(STRATA).take(pa.array(self.strata[items.astype(np.int64)]))
                columns = [
                    pa.array(users.astype(np.int64)),
                    strata,
                    pa.array(labels.astype(np.int32)),
                    pa.array(scores),
                ]
                file.write_batch(pa.record_batch(columns, schema=RANKING_SCORES))
        self.workers.agree(True, self.device)
        return names

    def validate(self) -> dict[str, float]:
        """Compute the AUC."""
        _, _, labels, scores = self._samples("validation")
        return {"auc": auc(scores, labels)}

    def test(self) -> dict[str, Any]:
        """Compute AUC and GAUC of all test samples and by stratum of the item; for many samples return ``scores``
        instead, the names of the files that have them."""
        mine = torch.tensor(len(self.parts["test"]) + self.drawn["test"].size, device=self.device)
        if self.shards_from is not None and int(self.workers.sum(mine)) >= self.shards_from:
            return {"labels": self.labels, "scores": self._shards("test")}
        users, items, labels, scores = self._samples("test")
        strata = {"all": ranking_metrics(users, scores, labels, _DRAWS, self.seed)}
        for index, stratum in enumerate(STRATA):
            mask = self.strata[items] == index
            if mask.any():
                strata[stratum] = ranking_metrics(users[mask], scores[mask], labels[mask], _DRAWS, self.seed)
        return {
            "labels": self.labels,
            "test": {key: strata["all"][key] for key in ("auc", "gauc") if key in strata["all"]},
            "strata": strata,
        }
