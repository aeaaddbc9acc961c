"""The training loop of every model: epochs from the last checkpoint to an early stop or the last epoch.

An interrupted run resumes after its last checkpoint and gives the same result, because the order of the data and all
random numbers depend only on (seed, epoch or step, rank)."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adasid.distributed import Workers
from adasid.errors import TrainingError, TransientError
from adasid.files import Location, write_json
from adasid.training.checkpoint import Checkpoint, Checkpoints, optimizer_tensors, restore_optimizer

Row = dict[str, float]
"""The logged metrics of one epoch."""
Report = Callable[[list[Row]], None]
"""A callback that gets all rows so far, on every worker."""
PROGRESS = "progress.json"
"""Rank 0 writes to this file of the training's folder how far a long loop is."""
_SECONDS = 30.0
"""It does so at intervals of so many seconds."""
T = TypeVar("T")


def silent(rows: list[Row]) -> None:
    """Report nothing."""


def best(rows: Sequence[Mapping[str, float]], metric: str) -> int | None:
    """Return the index of the row with the highest ``metric``, the first of equals, or None if no row defines it."""
    defined = [(row[metric], -index) for index, row in enumerate(rows) if np.isfinite(row.get(metric, np.nan))]
    return -max(defined)[1] if defined else None


class TrainingLoop(ABC):
    """``TrainingLoop`` trains ``model`` for at most ``epochs`` epochs, and stops early where ``monitor``, the metric
    whose highest value is best, did not improve for ``patience`` epochs. ``name``: name of the model in errors;
    ``version``: name of its input in errors.

    All workers have the same model and call the same methods."""

    name: str
    monitor: str | None = None
    log_epochs = 1
    """A row is logged every so many epochs, and at the last one."""
    checkpoint_epochs = 1
    """A checkpoint is written every so many epochs, and at the last one."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, torch.optim.Optimizer],
        epochs: int,
        folder: Location,
        workers: Workers,
        device: torch.device,
        version: str,
        patience: int = 0,
    ) -> None:
        self.model, self.optimizers, self.epochs, self.patience = model, optimizers, epochs, patience
        self.folder, self.workers, self.device, self.version = folder, workers, device, version
        self.checkpoints = Checkpoints(folder / "checkpoints")

    @abstractmethod
    def epoch(self, number: int) -> Row:
        """Train on the training data once, and evaluate; return the metrics, the same on all workers."""

    def start(self) -> None:  # noqa: B027
        """Prepare a training that has no checkpoint."""

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint beyond model and optimisers."""
        return {}

    def extra_state(self) -> dict[str, int]:
        """Return the numbers of a checkpoint beyond epoch and rows."""
        return {}

    def restore(self, checkpoint: Checkpoint) -> None:  # noqa: B027
        """Restore what :meth:`extra_tensors` and :meth:`extra_state` saved."""

    def divided_rows(self) -> dict[str, Tensor]:
        """Return this worker's rows of the tensors of a checkpoint that are divided among workers."""
        return {}

    def save_results(self, rows: list[Row]) -> None:  # noqa: B027
        """Save what the result needs of the last epoch; rank 0 only, before the checkpoint."""

    def save_divided_results(self, rows: list[Row]) -> None:  # noqa: B027
        """Save this worker's part of what is divided among workers; on all workers, before :meth:`save_results`."""

    def run_epochs(self, report: Report) -> list[Row]:
        """Train from the last checkpoint on; return the logged rows of all epochs."""
        first, rows = self._resume()
        for number in range(first, self.epochs + 1):
            if self._stops(rows):
                break
            last, row = number == self.epochs, self.epoch(number)
            logged = last or number % self.log_epochs == 0
            rows += [row] * logged
            self.save_divided_results(rows)
            if self.workers.rank == 0:
                self.save_results(rows)
            if last or number % self.checkpoint_epochs == 0:
                self._save(number, rows)
            self.workers.agree(True, self.device)  # all wait for rank 0
            if logged:
                report(rows)
        return rows

    def tracked(self, steps: Sequence[T], what: str) -> Iterator[T]:
        """Yield ``steps``, and write from time to time how many of them are done, for people alone: where that fails,
        training goes on. ``what``: name of the loop."""
        written = time.monotonic()
        for done, step in enumerate(steps):
            if self.workers.rank == 0 and time.monotonic() - written >= _SECONDS:
                with suppress(OSError, TransientError):
                    write_json(self.folder / PROGRESS, {"what": what, "done": done, "of": len(steps)})
                written = time.monotonic()
            yield step

    def best_row(self, rows: Sequence[Row]) -> tuple[Row, dict[str, str]]:
        """Return the row of the best epoch, and a note where no epoch defines :attr:`monitor`: then it is the last."""
        index = best(rows, self.monitor or "")
        if index is not None:
            return rows[index], {}
        note = f"{self.name}: {self.monitor} is defined for no epoch, so that none can be chosen: the last one is taken"
        return rows[-1], {"note": note}

    def improved(self, rows: Sequence[Row]) -> bool:
        """Return whether the last row is the best so far, or no row defines :attr:`monitor`."""
        return best(rows, self.monitor or "") in (None, len(rows) - 1)

    def backward(self, loss: Tensor, where: str, fix: str, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Compute gradients averaged over workers. Raises TrainingError, on all workers, if the loss is not finite on
        one of them. ``where``, ``fix``: text of the error; ``parameters``: by default the model's."""
        if not self.workers.agree(bool(torch.isfinite(loss)), self.device):
            where = f"{where} (this worker: {loss.item()})"
            raise TrainingError(f"{self.name}: loss is not finite at {where}, input {self.version}; {fix}")
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.workers.average_gradients(self.model.parameters() if parameters is None else parameters)

    def _stops(self, rows: list[Row]) -> bool:
        index = best(rows, self.monitor) if self.monitor else None
        return index is not None and len(rows) - 1 - index >= self.patience

    def _resume(self) -> tuple[int, list[Row]]:
        checkpoint = self.checkpoints.latest(self.workers) if self.epochs else None
        if checkpoint is None:
            self.start()
            return 1, []
        self.model.load_state_dict(checkpoint.under("model"))
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, checkpoint.under(name))
        self.restore(checkpoint)
        return int(checkpoint.state["epoch"]) + 1, list(checkpoint.state["rows"])

    def _save(self, number: int, rows: list[Row]) -> None:
        if divided := self.divided_rows():
            self.checkpoints.save_rows(number, divided, self.workers, self.device)
        if self.workers.rank:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()} | self.extra_tensors()
        for name, optimizer in self.optimizers.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in optimizer_tensors(optimizer).items()}
        self.checkpoints.save(number, tensors, {"epoch": number, "rows": rows, **self.extra_state()})
