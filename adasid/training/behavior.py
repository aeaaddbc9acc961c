"""Train the behaviour embeddings: SASRec with in-batch sampled softmax and lazy Adagrad (methods 7.4).

This is plain torch; the workers are passed in. An interrupted run resumes after the last complete epoch and gives the
same result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor, nn

from adasid import config
from adasid.data.sequences import Histories, epoch_batches
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location
from adasid.metrics.longtail import spearman
from adasid.metrics.retrieval import recall_ndcg, target_ranks
from adasid.recommenders.sasrec import SASRec, sampled_softmax
from adasid.training.checkpoint import Checkpoint, read_tensors, write_tensors
from adasid.training.loop import Report, Row, TrainingLoop, best, silent

_SPEARMAN_SAMPLE = 1_000_000
_SCORES = 1 << 26


@dataclass
class BehaviorData:
    """``BehaviorData`` is the training data of one worker. ``train`` and the held-out splits have this worker's users;
    ``counts`` [M]: training events of every item."""

    train: Histories
    validation: Histories
    test: Histories
    counts: NDArray[np.int64]
    version: str


@dataclass
class BehaviorResult:
    """``BehaviorResult`` is the result of a training run: ``embeddings`` [M, width] of the best validation epoch;
    ``norms`` [M] of the checkpoint that measures richness; ``summary``: JSON."""

    embeddings: Tensor
    norms: Tensor
    summary: dict[str, Any]


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
        model = SASRec(len(data.counts), s.width, s.blocks, s.heads, s.max_length, s.dropout, device).to(device)
        self.table = nn.Parameter(model.table, requires_grad=True)
        self.dense = torch.optim.Adam(model.parameters(), lr=s.lr, betas=(0.9, 0.98))
        self.lazy = torch.optim.Adagrad([self.table], lr=s.table_lr)
        self.log_q = torch.from_numpy(np.log(np.maximum(data.counts, 1) / max(1, data.counts.sum()))).float().to(device)
        optimizers = {"dense": self.dense, "lazy": self.lazy}
        super().__init__(model, optimizers, s.epochs, folder, workers, device, data.version, s.patience)

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

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the embedding table."""
        return {"table": self.table}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the embedding table."""
        self.table.data.copy_(checkpoint.tensors["table"])

    def save_results(self, rows: list[Row]) -> None:
        """Save the best embeddings, and the norms of the early epoch with the highest Spearman correlation."""
        if self.improved(rows):
            write_tensors(self.folder / "best.safetensors", {"embeddings": self.table})
        early = len(rows) <= self.settings.early_epochs
        if early and best(rows, "spearman") in (None, len(rows) - 1):
            write_tensors(self.folder / "early.safetensors", {"norms": self.table.detach().norm(dim=1)})

    def _train_epoch(self, epoch: int) -> float:
        """Return the mean loss over all workers."""
        torch.manual_seed(self.seed + 1_000_003 * epoch + 7919 * self.workers.rank)
        self.model.train()
        total = torch.zeros(2, device=self.device)
        s = self.settings
        for step, events in enumerate(
            epoch_batches(self.data.train, s.batch_users, s.max_length + 1, self.seed, epoch, self.workers, self.device)
        ):
            total += torch.tensor([self._step(events, epoch, step), 1.0], device=self.device)
        total = self.workers.sum(total)
        return float(total[0] / total[1])

    def _step(self, events: NDArray[np.int64], epoch: int, step: int) -> float:
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
        rows = self.table.detach()[distinct].requires_grad_()
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
        where = f"epoch {epoch}, step {step} (this worker: {loss.item()})"
        self.backward(loss, where, "lower behavior.lr or behavior.table_lr")
        self.dense.step()
        self._update_table(distinct, rows.grad)
        return float(loss.detach())

    def _update_table(self, ids: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None
        ids, gradient = self.workers.gather_ragged(ids), self.workers.gather_ragged(gradient)
        self.table.grad = torch.sparse_coo_tensor(
            ids[None], gradient / self.workers.world, self.table.shape, check_invariants=False
        ).coalesce()
        self.lazy.step()
        self.table.grad = None

    @torch.inference_mode()
    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        row: dict[str, float] = {}
        for split, histories in (("validation", self.data.validation), ("test", self.data.test)):
            scores = recall_ndcg(self._ranks(histories))
            row.update({f"{split}_{name}": value for name, value in scores.items()})
        if self.workers.rank == 0:
            row["spearman"] = self._spearman(self.table.norm(dim=1))
        shared = torch.tensor([row.pop("spearman", 0.0)], dtype=torch.float64, device=self.device)
        spearman = float(self.workers.broadcast(shared))
        return {**row, "spearman": spearman} if np.isfinite(spearman) else row

    def _ranks(self, histories: Histories) -> Tensor:
        """Return the 1-based ranks of the targets of all workers' users, over the full catalogue including the
        history."""
        users = self._scored(histories)
        ranks = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        chunk = max(1, min(256, _SCORES // len(self.table)))
        for part in np.array_split(users, max(1, -(-len(users) // chunk))):
            if not len(part):
                continue
            ids = torch.from_numpy(histories.last(part, self.settings.max_length)).to(self.device)
            states = self.model(self.table[ids.clamp(min=0)])
            state = states[torch.arange(len(part)), (ids >= 0).sum(1) - 1]
            ranks.append(target_ranks(state @ self.table.T, torch.from_numpy(histories.targets[part]).to(self.device)))
        return self.workers.gather_ragged(torch.cat(ranks))

    def _scored(self, histories: Histories) -> NDArray[np.int64]:
        """Return this worker's users to evaluate: its share of ``eval_users``."""
        return histories.sample(-(-self.settings.eval_users // self.workers.world))

    def _spearman(self, norms: Tensor) -> float:
        """Compute Spearman(norm, count) over items that occur in training, or a fixed sample of them if there are very
        many."""
        known = np.flatnonzero(self.data.counts)
        if len(known) > _SPEARMAN_SAMPLE:
            known = np.random.default_rng(self.seed).choice(known, _SPEARMAN_SAMPLE, replace=False)
        return spearman(norms.cpu().numpy()[known].astype(np.float64), self.data.counts[known].astype(np.float64))

    def _result(self, rows: list[Row]) -> BehaviorResult:
        (chosen, note), early_rows = self.best_row(rows), rows[: self.settings.early_epochs]
        index = best(early_rows, "spearman")
        early = early_rows[-1 if index is None else index]
        embeddings = read_tensors(self.folder / "best.safetensors")["embeddings"]
        use_early = self.settings.norm_checkpoint == "early"
        norms = read_tensors(self.folder / "early.safetensors")["norms"] if use_early else embeddings.norm(dim=1)
        unseen = torch.from_numpy(self.data.counts == 0)
        if (~unseen).any():
            norms = torch.where(unseen, norms[~unseen].min(), norms)
        users = int(self.workers.sum(torch.tensor([len(self._scored(self.data.test))], device=self.device)))
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
        return BehaviorResult(embeddings, norms, summary)
