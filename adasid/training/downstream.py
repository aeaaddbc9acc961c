"""Train a downstream model: early stopping on validation, a moving average of the weights, and the test of the best
epoch's model."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adasid import files
from adasid.distributed import Workers
from adasid.errors import TrainingError
from adasid.files import Location
from adasid.training.average import MovingAverage
from adasid.training.checkpoint import Checkpoint, read_tensors, write_tensors
from adasid.training.loop import Report, Row, TrainingLoop, silent

_PREFIX = "validation_"
_EVENTS = 3000
"""Events on a GPU after which their times are read."""


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
        self.seed, self.steps, self.average = seed, 0, MovingAverage(model, average)
        self._laps = Laps(device, ("data", "forward", "backward"))

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
        self.model.load_state_dict(read_tensors(self.weights(int(chosen["epoch"]))))
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
            "parts": {part: float(np.mean([row[f"{part}_seconds"] for row in rows])) for part in self._laps.seconds},
            **self.test(),
        }

    def epoch(self, number: int) -> Row:
        """Train and validate. Raises TrainingError if a parameter is not finite."""
        torch.manual_seed(self.seed + 1_000_003 * number + 7919 * self.workers.rank)
        self.model.train()
        self._laps.start()
        loss, seconds = self.train_epoch(number), self._laps.stop()
        row = {"epoch": float(number), "loss": loss, "seconds": sum(seconds.values())}
        if not self.workers.agree(all(map(_finite, self.model.parameters())), self.device):
            where = f"after epoch {number}, input {self.version}"
            raise TrainingError(f"{self.name}: parameters are not finite {where}; lower the learning rates")
        row |= {f"{part}_seconds": value for part, value in seconds.items()}
        started = time.monotonic()
        self.model.eval()
        with self.average.in_model():
            row |= {f"{_PREFIX}{name}": value for name, value in self.validate().items()}
        return {**row, "validation_seconds": time.monotonic() - started}

    def lap(self, part: str) -> None:
        """Add the time since the last call to ``part`` of the epoch: data, forward or backward."""
        self._laps.add(part)

    def step(self, loss: Tensor, number: int, step: int) -> None:
        """Run the backward pass and step each optimiser. Raises TrainingError, on all workers, if the loss is not
        finite on one of them."""
        self.lap("forward")
        self.backward(loss, f"epoch {number}, step {step}", f"lower the learning rates of the {self.name} section")
        touched = self.average.touched()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.steps += 1
        self.average.update(self.steps, touched)
        self.lap("backward")

    @property
    def averaged(self) -> dict[str, Tensor]:
        """Return the averaged weights, after :meth:`epoch`."""
        return self.average.weights

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the averaged weights."""
        return {f"average.{name}": tensor for name, tensor in self.averaged.items()}

    def extra_state(self) -> dict[str, int]:
        """Return the number of steps."""
        return {"steps": self.steps}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore both, on the model's device."""
        self.average.weights = {name: tensor.to(self.device) for name, tensor in checkpoint.under("average").items()}
        self.steps = int(checkpoint.state["steps"])

    def weights(self, epoch: int) -> Location:
        """Return the file of the weights of the best ``epoch``."""
        return self.folder / "best" / f"epoch-{epoch:06d}" / "model.safetensors"

    def save_results(self, rows: list[Row]) -> None:
        """Save the model if the last epoch is the best so far. That of the best epoch before stays: where the
        checkpoint of this one is not completed, it still counts."""
        if self.improved(rows):
            for folder in files.children(self.folder / "best"):
                if not rows[:-1] or folder != self.weights(int(self.best_row(rows[:-1])[0]["epoch"])).parent:
                    files.remove(folder)
            with self.average.in_model():
                write_tensors(self.weights(int(rows[-1]["epoch"])), self.model.state_dict())


class Laps:
    """``Laps`` measures the seconds of the parts of a training step, on a GPU by its events: no step waits for it."""

    def __init__(self, device: torch.device, parts: tuple[str, ...]) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self.seconds, self._clock = dict.fromkeys(parts, 0.0), 0.0
        self._events = list[tuple[str, torch.cuda.Event]]()

    def start(self) -> None:
        """Reset the seconds of all parts."""
        self.seconds, self._events = dict.fromkeys(self.seconds, 0.0), []
        self._clock = time.monotonic()
        self._record("")

    def add(self, part: str) -> None:
        """Add the time since the last call to ``part``."""
        if self._cuda:
            self._record(part)
            if len(self._events) > _EVENTS:
                self._read()
            return
        now = time.monotonic()
        self.seconds[part] += now - self._clock
        self._clock = now

    def stop(self) -> dict[str, float]:
        """Return the seconds of each part."""
        self._read()
        return self.seconds

    def _record(self, part: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append((part, event))

    def _read(self) -> None:
        if self._events:
            self._events[-1][1].synchronize()
        for (_, before), (part, event) in zip(self._events, self._events[1:]):
            self.seconds[part] += before.elapsed_time(event) / 1000
        self._events = self._events[-1:]


def _finite(values: Tensor) -> bool:
    """Return whether all ``values`` are finite, with no tensor of their size: a NaN is the least and the largest."""
    return not values.numel() or all(bool(end.isfinite()) for end in values.detach().aminmax())
