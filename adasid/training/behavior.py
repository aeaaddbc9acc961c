"""Train the behaviour embeddings: SASRec with in-batch sampled softmax and lazy Adagrad (methods 7.4).

This is plain torch; the workers are passed in. An interrupted run resumes after the last complete epoch and gives the
same result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from adasid import config
from adasid.errors import InputError, TrainingError
from adasid.metrics.longtail import spearman
from adasid.metrics.retrieval import recall_ndcg, target_ranks
from adasid.recommenders.sasrec import SASRec, sampled_softmax
from adasid.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from adasid.training.epochs import best, unchosen
from adasid.training.sequences import Histories
from adasid.training.sequences import epoch as epochs
from adasid.training.workers import Workers

_WATCHED = "validation_ndcg@10"
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


class BehaviorTraining:
    """``BehaviorTraining`` is one training run of SASRec on one worker; all workers have the same model."""

    def __init__(
        self,
        settings: config.Behavior,
        data: BehaviorData,
        folder: Path,
        seed: int,
        workers: Workers,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.data, self.folder, self.seed, self.workers, self.device = (
            settings,
            data,
            folder,
            seed,
            workers,
            torch.device(device),
        )
        torch.manual_seed(seed)
        s = settings
        self.model = SASRec(len(data.counts), s.width, s.blocks, s.heads, s.max_length, s.dropout, self.device).to(
            self.device
        )
        self.table = torch.nn.Parameter(self.model.table, requires_grad=True)
        self.dense = torch.optim.Adam(self.model.parameters(), lr=s.lr, betas=(0.9, 0.98))
        self.lazy = torch.optim.Adagrad([self.table], lr=s.table_lr)
        self.log_q = (
            torch.from_numpy(np.log(np.maximum(data.counts, 1) / max(1, data.counts.sum()))).float().to(self.device)
        )
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def run(self, report: Callable[[list[dict[str, float]]], None] = lambda rows: None) -> BehaviorResult:
        """Train to early stopping. ``report`` gets all rows of metrics so far after each epoch, on every worker."""
        if not int(self.workers.sum(torch.tensor([len(self.data.train)], device=self.device))):
            raise InputError(f"behaviour: {self.data.version} has no user to train on: bring more events")
        first, rows = self._resume()
        for epoch in range(first, self.settings.epochs + 1):
            if self._stop(rows):
                break
            started = time.monotonic()
            loss = self._epoch(epoch)
            row = {"epoch": float(epoch), "loss": loss, **self._evaluate()}
            row["seconds"] = time.monotonic() - started
            rows.append(row)
            self._keep(epoch, rows)
            report(rows)
        return self._result(rows)

    def _resume(self) -> tuple[int, list[dict[str, float]]]:
        found = self.checkpoints.latest(self.workers)
        if found is None:
            return 1, []
        self.model.load_state_dict(found.under("model"))
        self.table.data.copy_(found.tensors["table"])
        restore_optimizer(self.dense, found.under("dense"))
        restore_optimizer(self.lazy, found.under("lazy"))
        return int(found.state["epoch"]) + 1, list(found.state["rows"])

    def _stop(self, rows: list[dict[str, float]]) -> bool:
        chosen = best(rows, _WATCHED)
        return chosen is not None and len(rows) - 1 - chosen >= self.settings.patience

    def _epoch(self, epoch: int) -> float:
        """Train on all users once and return the mean loss over all workers."""
        torch.manual_seed(self.seed + 1_000_003 * epoch + 7919 * self.workers.rank)
        self.model.train()
        total = torch.zeros(2, device=self.device)
        s = self.settings
        for step, events in enumerate(
            epochs(self.data.train, s.batch_users, s.max_length + 1, self.seed, epoch, self.workers, self.device)
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
        distinct, place = torch.unique(
            torch.cat([inputs.clamp(min=0).reshape(-1), positive, negative]), return_inverse=True
        )
        rows = self.table.detach()[distinct].requires_grad_()
        vectors = nnf.embedding(
            place, rows
        )  # deterministic: the gradient of plain indexing is accumulated atomically, in any order
        history, own, others = vectors.split([inputs.numel(), len(positive), len(negative)])
        states = self.model(history.view(*inputs.shape, -1))[valid]
        loss = sampled_softmax(
            states, own, others, self.log_q[positive], self.log_q[negative], positive[:, None] == negative[None, :]
        )
        if not self.workers.agree(bool(torch.isfinite(loss)), self.device):
            where = f"epoch {epoch}, step {step} (this worker: {loss.item()}), input {self.data.version}"
            raise TrainingError(f"behaviour: loss is not finite at {where}; lower behavior.lr or behavior.table_lr")
        self.dense.zero_grad(set_to_none=True)
        loss.backward()
        self.workers.average_gradients(self.model.parameters())
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
        found = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        chunk = max(1, min(256, _SCORES // len(self.table)))
        for part in np.array_split(users, max(1, -(-len(users) // chunk))):
            if not len(part):
                continue
            ids = torch.from_numpy(histories.last(part, self.settings.max_length)).to(self.device)
            states = self.model(self.table[ids.clamp(min=0)])
            state = states[torch.arange(len(part)), (ids >= 0).sum(1) - 1]
            found.append(target_ranks(state @ self.table.T, torch.from_numpy(histories.targets[part]).to(self.device)))
        return self.workers.gather_ragged(torch.cat(found))

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

    def _keep(self, epoch: int, rows: list[dict[str, float]]) -> None:
        """Save best embeddings, early norms and then the checkpoint, which commits the epoch; rank 0 writes, all
        wait."""
        if self.workers.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if best(rows, _WATCHED) in (None, len(rows) - 1):
                _replace(self.folder / "best.safetensors", {"embeddings": self.table.detach().cpu()})
            early = rows[: self.settings.early_epochs]
            if epoch <= self.settings.early_epochs and best(early, "spearman") in (None, len(rows) - 1):
                _replace(self.folder / "early.safetensors", {"norms": self.table.detach().norm(dim=1).cpu()})
            tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()} | {"table": self.table}
            tensors |= {f"dense.{k}": v for k, v in optimizer_tensors(self.dense).items()} | {
                f"lazy.{k}": v for k, v in optimizer_tensors(self.lazy).items()
            }
            self.checkpoints.save(epoch, tensors, {"epoch": epoch, "rows": rows})
        self.workers.agree(True, self.device)

    def _result(self, rows: list[dict[str, float]]) -> BehaviorResult:
        chosen, first = best(rows, _WATCHED), rows[: self.settings.early_epochs]
        found, earlier = rows[-1 if chosen is None else chosen], best(first, "spearman")
        early = first[-1 if earlier is None else earlier]
        embeddings = load_file(self.folder / "best.safetensors")["embeddings"]
        use_early = self.settings.norm_checkpoint == "early"
        norms = load_file(self.folder / "early.safetensors")["norms"] if use_early else embeddings.norm(dim=1)
        unseen = torch.from_numpy(self.data.counts == 0)
        if (~unseen).any():
            norms = torch.where(unseen, norms[~unseen].min(), norms)
        users = int(self.workers.sum(torch.tensor([len(self._scored(self.data.test))], device=self.device)))
        summary = {
            "best_epoch": int(found["epoch"]),
            **(unchosen("behaviour", _WATCHED) if chosen is None else {}),
            "early_epoch": int(early["epoch"]),
            "norm_checkpoint": self.settings.norm_checkpoint,
            "spearman": (early if use_early else found).get("spearman"),
            "epochs": len(rows),
            "users": users,
            **{
                split: {name.removeprefix(split + "_"): v for name, v in found.items() if name.startswith(split + "_")}
                for split in ("validation", "test")
            },
        }
        return BehaviorResult(embeddings, norms, summary)


def _replace(path: Path, tensors: dict[str, Tensor]) -> None:
    draft = path.with_suffix(".draft")
    save_file(tensors, draft)
    draft.replace(path)
