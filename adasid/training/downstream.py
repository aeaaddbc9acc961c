"""Train a downstream model: early stopping on validation, a moving average of the weights, and the test of the best
epoch's model."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from adasid.distributed import Workers
from adasid.errors import TrainingError
from adasid.files import Location
from adasid.training.checkpoint import Checkpoint, read_tensors, write_tensors
from adasid.training.loop import Report, Row, TrainingLoop, silent

_PREFIX = "validation_"


class DownstreamTraining(TrainingLoop):
    """``DownstreamTraining`` is the training of a retriever or ranker on one worker. ``average``: decay per step of the
    exponential moving average of the weights that is validated, saved and tested (0: the weights themselves)."""

    monitor: str

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        limits: tuple[int, int],
        folder: Location,
        seed: int,
        workers: Workers,
        device: torch.device,
        version: str,
        average: float = 0.0,
    ) -> None:
        epochs, patience = limits
        super().__init__(model, optimizers, epochs, folder, workers, device, version, patience)
        self.seed, self.average, self.steps = seed, average, 0
        self.averaged = {name: p.detach().clone() for name, p in model.named_parameters()} if average else {}
        self._clock, self._seconds = 0.0, dict.fromkeys(("data", "forward", "backward"), 0.0)

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

    def run(self, report: Report = silent) -> dict[str, Any]:
        """Train, then test the best epoch's model. Returns JSON data, the same on all workers."""
        self.check()
        rows = self.run_epochs(report)
        chosen, note = self.best_row(rows)
        self.model.load_state_dict(read_tensors(self.folder / "best.safetensors"))
        self.model.eval()
        validation = {name: value for name, value in chosen.items() if name.startswith(_PREFIX)}
        validation.pop("validation_seconds")
        return {
            "best_epoch": int(chosen["epoch"]),
            **note,
            "epochs": len(rows),
            "validation": {name.removeprefix(_PREFIX): value for name, value in validation.items()},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epoch_seconds": float(np.mean([row["seconds"] for row in rows])),
            "parts": {part: float(np.mean([row[f"{part}_seconds"] for row in rows])) for part in self._seconds},
            **self.test(),
        }

    def epoch(self, number: int) -> Row:
        """Train and validate. Raises TrainingError if a parameter is not finite."""
        torch.manual_seed(self.seed + 1_000_003 * number + 7919 * self.workers.rank)
        self.model.train()
        self._clock, self._seconds = time.monotonic(), dict.fromkeys(self._seconds, 0.0)
        row = {"epoch": float(number), "loss": self.train_epoch(number), "seconds": sum(self._seconds.values())}
        if not self.workers.agree(all(bool(p.isfinite().all()) for p in self.model.parameters()), self.device):
            where = f"after epoch {number}, input {self.version}"
            raise TrainingError(f"{self.name}: parameters are not finite {where}; lower the learning rates")
        row |= {f"{part}_seconds": value for part, value in self._seconds.items()}
        started = time.monotonic()
        self.model.eval()
        with self._averaged_weights():
            row |= {f"{_PREFIX}{name}": value for name, value in self.validate().items()}
        return {**row, "validation_seconds": time.monotonic() - started}

    def lap(self, part: str) -> None:
        """Add the time since the last call to ``part`` of the epoch: data, forward or backward."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.monotonic()
        self._seconds[part] += now - self._clock
        self._clock = now

    def step(self, loss: Tensor, number: int, step: int) -> None:
        """Run the backward pass and step each optimiser. Raises TrainingError, on all workers, if the loss is not
        finite on one of them."""
        self.lap("forward")
        where = f"epoch {number}, step {step} (this worker: {loss.item()})"
        self.backward(loss, where, f"lower the learning rates of the {self.name} section")
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.steps += 1
        if self.averaged:
            decay = min(self.average, self.steps / (self.steps + 9))  # forget the initial weights fast
            pairs = [(self.averaged[name], p.detach()) for name, p in self.model.named_parameters()]
            get_ema_multi_avg_fn(decay)(*map(list, zip(*pairs)), self.steps)
        self.lap("backward")

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the averaged weights."""
        return {f"average.{name}": tensor for name, tensor in self.averaged.items()}

    def extra_state(self) -> dict[str, int]:
        """Return the number of steps."""
        return {"steps": self.steps}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore both, on the model's device."""
        self.averaged = {name: tensor.to(self.device) for name, tensor in checkpoint.under("average").items()}
        self.steps = int(checkpoint.state["steps"])

    def save_results(self, rows: list[Row]) -> None:
        """Save the model if the last epoch is the best so far."""
        if self.improved(rows):
            with self._averaged_weights():
                write_tensors(self.folder / "best.safetensors", self.model.state_dict())

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Use the averaged weights in the model within the context."""
        current = {name: p.detach().clone() for name, p in self.model.named_parameters() if self.averaged}
        self.model.load_state_dict(self.averaged, strict=False)
        yield
        self.model.load_state_dict(current, strict=False)
