"""Train and score the click-through model over semantic IDs. This is plain torch; the workers are passed in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid import config, files
from adasid.data.events import Events
from adasid.data.samples import Sample
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location
from adasid.metrics.ranking import auc, ranking_metrics
from adasid.recommenders.ppnet import PPNet
from adasid.recommenders.tokens import ItemTokens
from adasid.tables import RANKING_SCORES, SPLITS, STRATA
from adasid.training.downstream import DownstreamTraining

_DRAWS = 200
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RankingData:
    """``RankingData`` is the training and evaluation data of one worker: the ``events`` of its users; ``counts``
    [M]: training events of every item; ``strata`` [M] as in ``RetrievalData``; ``version``: name of the input in
    errors."""

    events: Events
    counts: Ints
    strata: NDArray[np.int8]
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
        users = workers.gather(torch.tensor([int(data.events.ids.max(initial=-1)) + 1], device=device))
        model = PPNet(settings, catalogue.to(device), int(users.max())).to(device)
        self.tables = model.sparse_tables()
        dense = [p for p in model.parameters() if all(p is not table for table in self.tables)]
        optimizers = {
            "adam": torch.optim.Adam(dense, lr=settings.lr, weight_decay=settings.weight_decay, fused=True),
            "table": torch.optim.Adagrad(self.tables, lr=settings.table_lr),
        }
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
        self.cdf, self.drawable = np.cumsum(popularity), int((popularity > 0).sum())
        self.cdf /= max(self.cdf[-1], 1e-12)
        label = 1 if self.labels == "sampled" else None
        self.parts = {split: self.events.chosen(index, label) for index, split in enumerate(SPLITS)}
        self.parts["validation"] = self._evaluated(self.parts["validation"])
        self.drawn = settings.negatives if self.labels == "sampled" else 0

    def _evaluated(self, events: NDArray[Any]) -> NDArray[Any]:
        """Return those of ``events`` [n] whose user is one of ``eval_users`` users of all workers."""
        users, index = np.unique(self.events.users[events], return_inverse=True)
        sample = Sample(self.settings.eval_users, self.workers, self.device)
        return events[sample.chosen(self.events.ids[users])[index]]

    def check(self) -> None:
        """Check that every worker has training samples, and that validation and test have both classes."""
        for split in SPLITS:
            mine = self.events.labels[self.parts[split]]
            drawn = 0 if split == "train" else len(mine) * self.drawn
            if not self.workers.agree(bool(len(mine)) or split != "train", self.device):
                raise InputError(
                    f"ranking: {self.version} has no training sample for one of {self.workers.world} workers: lower "
                    "ray.workers, or raise features.user_buckets and run jobs/build_features.py again"
                )
            classes = self.workers.sum(
                torch.tensor([int(mine.sum()), int((mine == 0).sum()) + drawn], device=self.device)
            ).tolist()
            if drawn and self.drawable < 2:
                raise InputError(
                    f"ranking: {self.version} has training events of {self.drawable} item alone: no other item can be "
                    "drawn as a negative; bring events of more items, or ratings"
                )
            if split != "train" and not all(classes):
                raise InputError(
                    f"ranking: split {split!r} of {self.version} has {classes[0]} positive and {classes[1]} negative "
                    "samples: needs both"
                )

    def _labels(self) -> str:
        """Return the kind of labels, ``ratings`` or ``sampled``."""
        negatives = not self.workers.agree(not (self.events.labels == 0).any(), self.device)
        if self.settings.labels == "ratings" and not negatives:
            raise InputError(
                f"ranking.labels is 'ratings' but {self.version} has no negative event: set ranking.labels: sampled, "
                "or bring ratings"
            )
        return self.settings.labels if self.settings.labels != "auto" else ("ratings" if negatives else "sampled")

    def _negatives(self, events: Ints) -> Ints:
        """Return the sampled negatives of held-out events [B, negatives], equal for every seed, model and number of
        workers."""
        return self._draw(self.events.uniform(events, self.drawn), self.events.items[events])

    def _draw(self, uniform: NDArray[np.float64], positive: NDArray[np.int32]) -> Ints:
        """Return the items at ``uniform`` numbers [B, n] in the distribution of all items but the ``positive`` [B]."""
        low, high = np.where(positive > 0, self.cdf[positive - 1], 0.0)[:, None], self.cdf[positive][:, None]
        at = uniform * (1.0 - (high - low))
        below, above = np.minimum(at, np.nextafter(low, 0.0)), np.maximum(at + (high - low), high)
        at = np.where((at < low) | (high >= 1.0), below, np.minimum(above, np.nextafter(1.0, 0.0)))  # rounding is cut
        return np.searchsorted(self.cdf, at, side="right").astype(np.int64)

    def backward(
        self, loss: Tensor, where: str, fix: str, parameters: Iterable[torch.nn.Parameter] | None = None
    ) -> None:
        """Compute gradients as the loop does; weight decay of a table is of the rows of the batch alone."""
        super().backward(loss, where, fix, parameters)
        for table in self.tables:
            if table.grad is not None:
                gradient = table.grad.coalesce()
                rows = gradient.indices()[0]
                values = gradient.values() + self.settings.weight_decay * table.detach()[rows]
                table.grad = torch.sparse_coo_tensor(
                    rows[None], values, table.shape, is_coalesced=True, check_invariants=False
                )

    def train_epoch(self, number: int) -> float:
        """Train on the training events once, each with its sampled negatives."""
        rng = np.random.default_rng([self.seed, number, self.workers.rank])
        mine = self.parts["train"]
        share = max(1, self.settings.batch // self.workers.world // (1 + self.drawn))
        largest = int(self.workers.gather(torch.tensor([len(mine)], device=self.device)).max())
        order = rng.permutation(mine)
        total = torch.zeros(2, device=self.device)
        for step, start in enumerate(self.tracked(range(0, largest, share), f"epoch {number}/{self.epochs}")):
            events = order.take(np.arange(start, start + share), mode="wrap").astype(np.int64)
            drawn = self._draw(rng.random((len(events), self.drawn)), self.events.items[events])
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
            np.repeat(self.events.ids[self.events.users[events]], times),
            self.events.histories(events, self.settings.max_length),
            items,
            labels,
        )
        users, histories, items_, labels_ = (
            torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays
        )
        return (users, histories, items_), labels_.float()

    def _scored(self, split: str) -> Iterator[Tensor]:
        """Yield (user_index, item, label, score) of this worker's held-out samples [n, 4], in chunks."""
        for part in self.tracked(np.array_split(self.parts[split], max(1, len(self.parts[split]) // 2048)), split):
            if len(part):
                events = part.astype(np.int64)
                (users, histories, items), labels = self._batch(events, self._negatives(events))
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

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Compute the AUC of all workers' samples, of which only labels and scores are gathered."""
        mine = [rows[:, 2:].float() for rows in self._scored("validation")]
        rows = self.workers.gather_ragged(torch.cat([torch.zeros(0, 2, device=self.device), *mine])).cpu().numpy()
        return {"auc": auc(rows[:, 1], rows[:, 0].astype(np.int64))}

    def test(self) -> dict[str, Any]:
        """Compute AUC and GAUC of all test samples and by stratum of the item; for many samples return ``scores``
        instead, the names of the files that have them."""
        mine = torch.tensor(len(self.parts["test"]) * (1 + self.drawn), device=self.device)
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
