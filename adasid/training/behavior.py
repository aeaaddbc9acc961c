"""Train the behaviour embeddings: SASRec with in-batch sampled softmax and row-wise Adagrad (methods 7.4).

The item table is divided among the workers. This is plain torch; the workers are passed in. An interrupted run resumes
after the last complete epoch and gives the same result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from adasid import config, files
from adasid.data.sequences import Histories, epoch_users, log_q
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location
from adasid.metrics.blocks import Scores, blocked_ranks
from adasid.metrics.longtail import spearman
from adasid.metrics.retrieval import item_order, recall_ndcg
from adasid.recommenders.sasrec import SASRec, sampled_softmax
from adasid.tables import BEHAVIOR_SHARD
from adasid.training.checkpoint import Checkpoint, read_rows, restore_rows, write_rows
from adasid.training.item_table import ItemTable
from adasid.training.loop import Report, Row, TrainingLoop, best, silent

_SPEARMAN_SAMPLE = 1_000_000
_CHUNK, _ROUND = 256, 1 << 16
"""Users whose histories are encoded at a time, and users of all workers that are ranked at a time."""
_ROWS = 50_000
"""Rows of a Parquet file that are converted at a time."""


@dataclass
class BehaviorData:
    """``BehaviorData`` is the training data of one worker: the histories of its users, of validation and test those
    that are evaluated; ``counts`` [M]: training events of every item."""

    train: Histories
    validation: Histories
    test: Histories
    counts: NDArray[np.integer]
    version: str


@dataclass
class BehaviorResult:
    """``BehaviorResult`` is this worker's part of the result of a training run, all of it where there is one worker:
    ``index`` [own]: the item_index of each row, ascending; ``embeddings`` [own, width] of the best validation epoch;
    ``norms`` [own] of the checkpoint that measures richness; ``learned`` [own]: False where no event that was trained
    on has the item, so that its row has its random start; ``summary``: JSON, the same on all workers."""

    index: Tensor
    embeddings: Tensor
    norms: Tensor
    learned: Tensor
    summary: dict[str, Any]

    def write(self, path: Location) -> None:
        """Write the learned rows to a Parquet file with the schema ``tables.BEHAVIOR_SHARD``."""
        width = self.embeddings.shape[1]
        with files.replacing(path) as draft, pq.ParquetWriter(draft, BEHAVIOR_SHARD) as file:
            columns = self.index, self.embeddings, self.norms, self.learned
            for *parts, learned in zip(*(column.split(_ROWS) for column in columns)):
                index, rows, norms = (part[learned] for part in parts)
                offsets = np.arange(0, rows.numel() + 1, width, dtype=np.int32)
                vectors = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1).numpy()))
                arrays = [pa.array(index.numpy()), vectors, pa.array(norms.numpy())]
                file.write_batch(pa.RecordBatch.from_arrays(arrays, schema=BEHAVIOR_SHARD))


class BehaviorTraining(TrainingLoop):
    """``BehaviorTraining`` is one training run of SASRec on one worker; validation NDCG@10 selects the epoch."""

    name = "behaviour"
    monitor = "validation_ndcg@10"

    def __init__(
        self,
        settings: config.Behavior,
        data: BehaviorData,
        folder: Location,
        seed: int,
        workers: Workers,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        self.settings, self.data, self.seed = settings, data, seed
        torch.manual_seed(seed)
        s = settings
        model = SASRec(s.width, s.blocks, s.heads, s.max_length, s.dropout).to(device)
        self.table = ItemTable(len(data.counts), s.width, seed, s.table_lr, workers, device)
        self.dense = torch.optim.Adam(model.parameters(), lr=s.lr, betas=(0.9, 0.98))
        visited, targets = data.train.counts(len(data.counts), s.max_length)
        self.learned = workers.sum(visited.to(device).int()) > 0
        self.log_q = log_q(targets, len(data.train), workers, device)
        del targets
        super().__init__(model, {"dense": self.dense}, s.epochs, folder, workers, device, data.version, s.patience)

    def run(self, report: Report = silent) -> BehaviorResult:
        """Train to early stopping. Raises InputError if no user has training events."""
        if not int(self.workers.sum(torch.tensor([len(self.data.train)], device=self.device))):
            raise InputError(f"behaviour: {self.data.version} has no user to train on: bring more events")
        return self._result(self.run_epochs(report))

    def epoch(self, number: int) -> Row:
        """Train on all users once; compute the metrics of validation and test, and Spearman(norm, count)."""
        started = time.monotonic()
        row = {"epoch": float(number), "loss": self._train_epoch(number), **self._evaluate()}
        return {**row, "seconds": time.monotonic() - started}

    def divided_rows(self) -> dict[str, Tensor]:
        """Return this worker's rows of the item table and their accumulators."""
        return {"table": self.table.rows, "squares": self.table.squares}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore both."""
        self.checkpoints.restore_rows(checkpoint.step, self.divided_rows(), self.workers)

    def save_divided_results(self, rows: list[Row]) -> None:
        """Save this worker's rows of the best embeddings, and the norms of the early epoch with the highest Spearman
        correlation, in folders by epoch: the last checkpoint may need the ones before."""
        if self.improved(rows):
            self._save_rows("best", rows, self.monitor, {"embeddings": self.table.rows})
        early = len(rows) <= self.settings.early_epochs
        if early and best(rows, "spearman") in (None, len(rows) - 1):
            self._save_rows("early", rows, "spearman", {"norms": self.table.rows.norm(dim=1)})

    def _save_rows(self, kind: str, rows: list[Row], metric: str, tensors: dict[str, Tensor]) -> None:
        target, before = self._folder(kind, rows[-1]), rows[:-1]
        if self.workers.rank == 0:
            index = best(before, metric)
            kept = [self._folder(kind, before[-1 if index is None else index])] if before else []
            for folder in files.children(self.folder / kind):
                if folder not in kept:
                    files.remove(folder)
        self.workers.agree(True, self.device)  # all wait for rank 0
        write_rows(target, tensors, self.workers)

    def _folder(self, kind: str, row: Row) -> Location:
        return self.folder / kind / f"epoch-{int(row['epoch']):06d}"

    def _train_epoch(self, epoch: int) -> float:
        """Return the mean loss over all workers."""
        torch.manual_seed(self.seed + 1_000_003 * epoch + 7919 * self.workers.rank)
        self.model.train()
        total = torch.zeros(2, device=self.device)
        s = self.settings
        order = epoch_users(self.data.train, s.batch_users, self.seed, epoch, self.workers, self.device)
        for step in self.tracked(range(len(order)), f"epoch {epoch}/{self.epochs}"):
            events = self.data.train.last(order[step], s.max_length + 1)
            total += torch.stack([self._step(events, epoch, step), torch.ones((), device=self.device)])
        total = self.workers.sum(total)
        return float(total[0] / total[1])

    def _step(self, events: NDArray[np.int64], epoch: int, step: int) -> Tensor:
        ids = torch.from_numpy(events).to(self.device)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        valid = targets >= 0
        positive = targets[valid]
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + epoch) * 1_000_003 + step) % 2**63)
        pool = self.workers.gather_ragged(positive)
        negative = pool[torch.randint(len(pool), (self.settings.negatives,), generator=generator).to(self.device)]
        distinct, inverse = torch.unique(
            torch.cat([inputs.clamp(min=0).reshape(-1), positive, negative]), return_inverse=True
        )
        rows, request = self.table.fetch(distinct)
        rows.requires_grad_()
        vectors = nnf.embedding(
            inverse, rows
        )  # deterministic: the gradient of plain indexing is accumulated atomically, in any order
        history, positive_rows, negative_rows = vectors.split([inputs.numel(), len(positive), len(negative)])
        states = self.model(history.view(*inputs.shape, -1))[valid]
        loss = sampled_softmax(
            states,
            positive_rows,
            negative_rows,
            self.log_q[positive],
            self.log_q[negative],
            positive[:, None] == negative[None, :],
        )
        self.backward(loss, f"epoch {epoch}, step {step}", "lower behavior.lr or behavior.table_lr")
        self.dense.step()
        assert rows.grad is not None
        self.table.update(request, rows.grad)
        return loss.detach()

    @torch.inference_mode()
    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        row: dict[str, float] = {}
        for split in ("validation", "test"):
            scores = recall_ndcg(self._ranks(split))
            row.update({f"{split}_{name}": value for name, value in scores.items()})
        spearman = self._spearman()
        return {**row, "spearman": spearman} if np.isfinite(spearman) else row

    def _ranks(self, split: str) -> Tensor:
        """Return the 1-based ranks of the targets of all workers' users, over the full catalogue including the
        history, the same on all workers. Each worker scores all users against its own rows of the table."""
        histories: Histories = getattr(self.data, split)
        users = np.arange(len(histories))
        largest = int(self.workers.gather(torch.tensor([len(users)], device=self.device)).max())
        ranks = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        share = max(1, _ROUND // self.workers.world)
        for first in self.tracked(range(0, largest, share), split):
            last = min(first + share, largest)
            chunks = [
                self._states(histories, users[start : min(start + _CHUNK, last)])
                for start in range(first, last, _CHUNK)
            ]
            targets = torch.from_numpy(histories.targets[users[first:last]]).to(self.device)
            ranks.append(self._ranked(*map(self.workers.gather_ragged, (torch.cat(chunks), targets))))
        return torch.cat(ranks)

    def _states(self, histories: Histories, users: NDArray[np.int64]) -> Tensor:
        """Return the states after the histories of ``users`` [n], which may be none: [n, width]. All workers call it
        together."""
        ids = torch.from_numpy(histories.last(users, self.settings.max_length)).to(self.device)
        distinct, inverse = torch.unique(ids.clamp(min=0), return_inverse=True)
        rows = self.table.fetch(distinct)[0]
        if not len(users):
            return rows.new_zeros(0, rows.shape[1])
        states: Tensor = self.model(nnf.embedding(inverse, rows))
        return states[torch.arange(len(users)), (ids >= 0).sum(1) - 1]

    def _ranked(self, states: Tensor, targets: Tensor) -> Tensor:
        def block(first: int, last: int) -> Scores:
            return lambda users: states[users] @ self.table.rows[first:last].T

        return blocked_ranks(block, targets, self.table.items, self._places, workers=self.workers)[0]

    def _places(self) -> Tensor:
        return self._tie_order

    @cached_property
    def _tie_order(self) -> Tensor:
        """Order of items of equal scores [M], computed where there are such."""
        return item_order(self.table.items, self.device)

    def _spearman(self) -> float:
        """Compute Spearman(norm, count) over items that are trained on, where there are very many over those of every
        n-th item_index; the same on all workers."""
        every = -(-self.table.items // _SPEARMAN_SAMPLE) or 1
        known = every * np.flatnonzero(self.learned[::every].cpu().numpy())
        norms = self.table.norms(torch.from_numpy(known).to(self.device)).cpu().numpy()
        return spearman(norms.astype(np.float64), self.data.counts[known].astype(np.float64))

    def _result(self, rows: list[Row]) -> BehaviorResult:
        (chosen, note), early_rows = self.best_row(rows), rows[: self.settings.early_epochs]
        index = best(early_rows, "spearman")
        early, own = early_rows[-1 if index is None else index], self.table.index()
        embeddings = self.table.rows  # read in its place: two tables would be twice the memory
        restore_rows(self._folder("best", chosen), {"embeddings": embeddings}, self.workers)
        embeddings = embeddings.cpu()
        use_early = self.settings.norm_checkpoint == "early"
        norms = read_rows(self._folder("early", early), self.workers)["norms"] if use_early else embeddings.norm(dim=1)
        users = int(self.workers.sum(torch.tensor([len(self.data.test)], device=self.device)))
        summary = {
            "best_epoch": int(chosen["epoch"]),
            **note,
            "early_epoch": int(early["epoch"]),
            "norm_checkpoint": self.settings.norm_checkpoint,
            "spearman": (early if use_early else chosen).get("spearman"),
            "epochs": len(rows),
            "users": users,
            **{
                split: {name.removeprefix(split + "_"): v for name, v in chosen.items() if name.startswith(split + "_")}
                for split in ("validation", "test")
            },
        }
        return BehaviorResult(own, embeddings, norms, self.learned.cpu()[own], summary)
