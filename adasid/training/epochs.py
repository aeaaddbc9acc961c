"""This module defines the training loop of the downstream models: early stopping on validation, selection of the best
model, and resuming after an interruption."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from adasid.errors import TrainingError
from adasid.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from adasid.training.workers import Workers


def best(rows: Sequence[Mapping[str, float]], key: str) -> int | None:
    """Return the index of the row with the highest ``key``, the first of equals, or None if no row defines it."""
    found = [(row[key], -place) for place, row in enumerate(rows) if np.isfinite(row.get(key, np.nan))]
    return -max(found)[1] if found else None


def unchosen(name: str, key: str) -> dict[str, str]:
    """Return the note for a result without an epoch that defines ``key``."""
    return {"note": f"{name}: {key} is defined for no epoch, so that none can be chosen: the last one is taken"}


class EpochTraining(ABC):
    """``EpochTraining`` trains until the validation metric stops improving. ``watched``: the metric of a row whose
    highest value is best; ``name``: name of the model in errors; ``version``: name of the input in errors; ``average``:
    decay per step of the exponential moving average of the weights that is validated, saved and tested (0: the weights
    themselves).

    All workers have the same model and call the same methods.
    """

    watched: str
    name: str

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        limits: tuple[int, int],
        folder: Path,
        seed: int,
        workers: Workers,
        device: torch.device,
        version: str,
        average: float = 0.0,
    ) -> None:
        self.model, self.optimizers, (self.epochs, self.patience) = model, optimizers, limits
        self.folder, self.seed, self.workers, self.device, self.version = folder, seed, workers, device, version
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.average, self.steps = average, 0
        self.averaged = {name: p.detach().clone() for name, p in model.named_parameters()} if average else {}
        self._clock, self._spent = 0.0, dict.fromkeys(("data", "forward", "backward"), 0.0)

    @abstractmethod
    def train_epoch(self, number: int) -> float:
        """Train on the training data once, a :meth:`step` per batch; return the mean loss over all workers."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Return validation metrics, without a prefix, the same on all workers."""

    @abstractmethod
    def test(self) -> dict[str, Any]:
        """Return the test part of the result as JSON data, the same on all workers. The best epoch's model is
        loaded."""

    @abstractmethod
    def check(self) -> None:
        """Check the data. Raises InputError, on all workers, if they cannot be used for training, validation or
        test."""

    def run(self, report: Callable[[list[dict[str, float]]], None] = lambda rows: None) -> dict[str, Any]:
        """Train, then test the best epoch's model. Returns JSON data, the same on all workers. ``report`` gets all rows
        of metrics so far after each epoch, on every worker."""
        self.check()
        first, rows = self._resume()
        for number in range(first, self.epochs + 1):
            if self._stop(rows):
                break
            torch.manual_seed(self.seed + 1_000_003 * number + 7919 * self.workers.rank)
            self.model.train()
            self._clock, self._spent = time.monotonic(), dict.fromkeys(self._spent, 0.0)
            row = {"epoch": float(number), "loss": self.train_epoch(number), "seconds": sum(self._spent.values())}
            if not self.workers.agree(all(bool(p.isfinite().all()) for p in self.model.parameters()), self.device):
                raise TrainingError(
                    f"{self.name}: parameters are not finite after epoch {number}, input {self.version}; lower the "
                    "learning rates"
                )
            row |= {f"{part}_seconds": value for part, value in self._spent.items()}
            started = time.monotonic()
            self.model.eval()
            with self._averaged():
                row |= {f"validation_{name}": value for name, value in self.validate().items()}
                row["validation_seconds"] = time.monotonic() - started
                rows.append(row)
                self._keep_best(rows)
            self._keep(number, rows)
            report(rows)
        chosen = best(rows, self.watched)
        found = rows[-1 if chosen is None else chosen]
        self.model.load_state_dict(load_file(self.folder / "best.safetensors"))
        self.model.eval()
        return {
            "best_epoch": int(found["epoch"]),
            **(unchosen(self.name, self.watched) if chosen is None else {}),
            "epochs": len(rows),
            "validation": {
                name.removeprefix("validation_"): value
                for name, value in found.items()
                if name.startswith("validation_") and name != "validation_seconds"
            },
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epoch_seconds": float(np.mean([row["seconds"] for row in rows])),
            "parts": {part: float(np.mean([row[f"{part}_seconds"] for row in rows])) for part in self._spent},
            **self.test(),
        }

    def lap(self, part: str) -> None:
        """Add the time since the last call to ``part`` of the epoch: data, forward or backward."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.monotonic()
        self._spent[part] += now - self._clock
        self._clock = now

    def step(self, loss: torch.Tensor, number: int, step: int) -> None:
        """Run the backward pass, average gradients over workers, and step each optimiser. Raises TrainingError, on all
        workers, if the loss is not finite on one of them."""
        if not self.workers.agree(bool(torch.isfinite(loss)), self.device):
            where = f"epoch {number}, step {step} (this worker: {loss.item()}), input {self.version}"
            raise TrainingError(
                f"{self.name}: loss is not finite at {where}; lower the learning rates of the {self.name} section"
            )
        self.lap("forward")
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.workers.average_gradients(self.model.parameters())
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.steps += 1
        if self.averaged:
            decay = min(self.average, self.steps / (self.steps + 9))  # forget the initial weights fast
            pairs = [(self.averaged[name], p.detach()) for name, p in self.model.named_parameters()]
            get_ema_multi_avg_fn(decay)(*map(list, zip(*pairs)), self.steps)
        self.lap("backward")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Use the averaged weights in the model within the context."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters() if self.averaged}
        self.model.load_state_dict(self.averaged, strict=False)
        yield
        self.model.load_state_dict(own, strict=False)

    def _resume(self) -> tuple[int, list[dict[str, float]]]:
        found = self.checkpoints.latest(self.workers)
        if found is None:
            return 1, []
        self.model.load_state_dict(found.under("model"))
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, found.under(name))
        self.averaged, self.steps = found.under("average"), int(found.state["steps"])
        return int(found.state["epoch"]) + 1, list(found.state["rows"])

    def _stop(self, rows: list[dict[str, float]]) -> bool:
        chosen = best(rows, self.watched)
        return chosen is not None and len(rows) - 1 - chosen >= self.patience

    def _keep_best(self, rows: list[dict[str, float]]) -> None:
        """Save the model if the last row is the best so far, or if no row defines the metric; rank 0 writes."""
        if self.workers.rank == 0 and best(rows, self.watched) in (None, len(rows) - 1):
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / "best.draft"
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}, draft
            )
            draft.replace(self.folder / "best.safetensors")

    def _keep(self, number: int, rows: list[dict[str, float]]) -> None:
        """Save the checkpoint, which commits the epoch; rank 0 writes, all wait."""
        if self.workers.rank == 0:
            tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()} | {
                f"average.{k}": v for k, v in self.averaged.items()
            }
            for name, optimizer in self.optimizers.items():
                tensors |= {f"{name}.{k}": v for k, v in optimizer_tensors(optimizer).items()}
            self.checkpoints.save(number, tensors, {"epoch": number, "steps": self.steps, "rows": rows})
        self.workers.agree(True, self.device)
