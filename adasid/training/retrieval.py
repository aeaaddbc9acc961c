"""Training and scoring of a retriever over semantic IDs. Plain torch; the workers are passed in. A run that is killed resumes at the last
complete epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from adasid import config
from adasid.errors import TrainingError
from adasid.metrics.retrieval import intervals, of_histogram, rank_histogram
from adasid.recommenders import retriever
from adasid.recommenders.tokens import ItemTokens
from adasid.tables import STRATA
from adasid.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
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


class RetrievalTraining:
    """One training run on one worker; all workers hold the same model."""

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
        self.settings, self.data, self.folder, self.seed, self.workers = settings, data, folder, seed, workers
        self.device = torch.device(device)
        torch.manual_seed(seed)
        self.model = retriever.build(settings, catalogue.to(device)).to(device)
        dense = [p for p in self.model.parameters() if p is not self.model.table]
        self.optimizers = {
            "dense": torch.optim.Adam(dense, lr=settings.lr, betas=(0.9, 0.98)),
            "table": torch.optim.Adagrad([self.model.table], lr=settings.table_lr),
        }
        self.log_q = torch.from_numpy(np.log(np.maximum(data.counts, 1) / max(1, data.counts.sum()))).float().to(device)
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def run(self, report: Callable[[list[dict[str, float]]], None] = lambda rows: None) -> dict[str, Any]:
        """Train to early stopping on validation NDCG@10, then score the test users with the best epoch's model. Returns JSON data, the same on
        all workers. ``report`` gets all rows of metrics so far after each epoch, on every worker."""
        first, rows = self._resume()
        for number in range(first, self.settings.epochs + 1):
            if self._stop(rows):
                break
            row = {"epoch": float(number), **self._epoch(number)}
            started = time.monotonic()
            row |= {f"validation_{name}": value for name, value in self._scored(self.data.validation, self.settings.eval_users)[0].items()}
            row["validation_seconds"] = time.monotonic() - started
            rows.append(row)
            self._keep(number, rows)
            report(rows)
        return self._result(rows)

    def _resume(self) -> tuple[int, list[dict[str, float]]]:
        found = self.checkpoints.latest(self.workers)
        if found is None:
            return 1, []
        self.model.load_state_dict(found.under("model"))
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, found.under(name))
        return int(found.state["epoch"]) + 1, list(found.state["rows"])

    def _stop(self, rows: list[dict[str, float]]) -> bool:
        best = int(np.argmax([row["validation_ndcg@10"] for row in rows])) if rows else 0
        return len(rows) - 1 - best >= self.settings.patience

    def _epoch(self, number: int) -> dict[str, float]:
        """One pass over the users: mean loss over all workers, and the seconds of its parts."""
        torch.manual_seed(self.seed + 1_000_003 * number + 7919 * self.workers.rank)
        self.model.train()
        spent, clock = dict.fromkeys(("data", "forward", "backward"), 0.0), time.monotonic()

        def lap(part: str) -> None:
            nonlocal clock
            now = time.monotonic()
            spent[part] += now - clock
            clock = now

        total = torch.zeros(2, device=self.device)
        length = self.settings.max_length + 1
        for step, events in enumerate(epoch(self.data.train, self.settings.batch_users, length, self.seed, number, self.workers, self.device)):
            ids = torch.from_numpy(events).to(self.device)
            generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + number) * 1_000_003 + step) % 2**63)
            lap("data")
            loss = self._loss(ids, generator)
            if not self.workers.agree(bool(torch.isfinite(loss)), self.device):
                where = f"epoch {number}, step {step} (this worker: {loss.item()}), input {self.data.version}"
                raise TrainingError(f"retrieval: loss is not finite at {where}; lower retrieval.lr or retrieval.table_lr")
            lap("forward")
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.workers.average_gradients(self.model.parameters())
            for optimizer in self.optimizers.values():
                optimizer.step()
            total += torch.stack([loss.detach(), torch.ones((), device=self.device)])
            lap("backward")
        total = self.workers.sum(total)
        return {"loss": float(total[0] / total[1]), "seconds": sum(spent.values()), **{f"{part}_seconds": value for part, value in spent.items()}}

    def _loss(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        inputs, targets = ids[:, :-1], ids[:, 1:]
        valid = targets >= 0
        pool = self.workers.gather_ragged(targets[valid])
        negatives = pool[torch.randint(len(pool), (self.settings.negatives,), generator=generator).to(self.device)]
        return self.model.loss(self.model.states(inputs)[valid], targets[valid], negatives, self.log_q)

    def _states(self, histories: Histories, users: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        """State after the history and target of ``users``, some at a time."""
        chunk = max(1, min(256, _SCORES // len(self.data.counts)))
        for part in np.array_split(users, max(1, -(-len(users) // chunk))):
            if len(part):
                ids = torch.from_numpy(histories.last(part, self.settings.max_length)).to(self.device)
                last = (ids >= 0).sum(1) - 1
                yield self.model.states(ids)[torch.arange(len(part)), last], torch.from_numpy(histories.targets[part]).to(self.device)

    @torch.inference_mode()
    def _scored(self, histories: Histories, users: int | None = None) -> tuple[dict[str, float], Tensor, Tensor]:
        """Metrics of all workers' users (the first ``users`` by user_id, if given); histograms by stratum, of targets and of credit."""
        self.model.eval()
        mine = np.arange(len(histories) if users is None else min(len(histories), -(-users // self.workers.world)))
        group = self.model.catalogue.group
        sizes, strata = torch.bincount(group)[group], torch.from_numpy(self.data.strata).to(self.device)
        found = torch.zeros(2, len(STRATA), rank_histogram(group[:0], group[:0], 1).shape[1], dtype=torch.float64)
        for states, targets in self._states(histories, mine):
            ranks = self.model.ranks(states, targets)
            found[0] += rank_histogram(ranks, strata[targets], len(STRATA))
            found[1] += rank_histogram(ranks, strata[targets], len(STRATA), 1 / sizes[targets])
        targets_, credit = self.workers.sum(found.to(self.device)).cpu()
        return of_histogram(targets_.numpy()), targets_, credit

    def _keep(self, number: int, rows: list[dict[str, float]]) -> None:
        """The best model, then the checkpoint that makes it count; rank 0 writes, all wait."""
        if self.workers.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if max((row["validation_ndcg@10"] for row in rows[:-1]), default=-1.0) < rows[-1]["validation_ndcg@10"]:
                draft = self.folder / "best.draft"
                save_file({name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}, draft)
                draft.replace(self.folder / "best.safetensors")
            tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
            for name, optimizer in self.optimizers.items():
                tensors |= {f"{name}.{k}": v for k, v in optimizer_tensors(optimizer).items()}
            self.checkpoints.save(number, tensors, {"epoch": number, "rows": rows})
        self.workers.agree(True, self.device)

    def _result(self, rows: list[dict[str, float]]) -> dict[str, Any]:
        best = max(rows, key=lambda row: row["validation_ndcg@10"])
        self.model.load_state_dict(load_file(self.folder / "best.safetensors"))
        started = time.monotonic()
        test, targets, credit = self._scored(self.data.test)
        seconds = time.monotonic() - started
        return {
            "best_epoch": int(best["epoch"]),
            "epochs": len(rows),
            "validation": {k.removeprefix("validation_"): v for k, v in best.items() if k.startswith("validation_") and "@" in k},
            "test": test,
            "strata": by_stratum(targets.numpy(), credit.numpy(), self.seed),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epoch_seconds": float(np.mean([row["seconds"] for row in rows])),
            "parts": {part: float(np.mean([row[f"{part}_seconds"] for row in rows])) for part in ("data", "forward", "backward")},
            "test_users_per_second": len(self.data.test) / max(seconds, 1e-9),
        }


def by_stratum(targets: NDArray[np.float64], credit: NDArray[np.float64], seed: int) -> dict[str, dict[str, Any]]:
    """Metrics of all targets and of each stratum that has some, from the histograms of targets and of credit (each [strata, ranks]):
    ``corrected_*`` counts a hit on one of n items that share a SID as 1 / n (methods 8.6); ``intervals`` are 95 % bootstrap intervals over users."""
    found = {}
    for name, rows in {"all": slice(None), **{stratum: slice(i, i + 1) for i, stratum in enumerate(STRATA)}}.items():
        own, users = targets[rows].sum(0), float(targets[rows].sum())
        if users:
            corrected = {f"corrected_{k}": v for k, v in of_histogram(credit[rows], users=users).items()}
            spread = {k: list(v) for k, v in intervals(own, _DRAWS, seed).items()}
            found[name] = {"users": int(users), **of_histogram(own), **corrected, "intervals": spread}
    return found
