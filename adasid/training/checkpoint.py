"""Write checkpoints whole or not at all: a checkpoint without ``state.json``, which is written last, does not count."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adasid import files
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location

_STATE = "state.json"
_ROWS = 1 << 16
"""Rows that are read at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint has ``tensors`` by name, ``state`` as plain JSON data, and the number of its ``step``."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    step: int

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with ``prefix.``, with the prefix removed."""
        return {
            name.removeprefix(prefix + "."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix + ".")
        }


@dataclass(frozen=True)
class Checkpoints:
    """``Checkpoints`` stores the checkpoints of one training in ``folder`` and retains the newest two."""

    folder: Location

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``. Call on one worker only, after :meth:`save_rows` if there are such."""
        target = self._of(step)
        (target / _STATE).unlink(missing_ok=True)
        write_tensors(target / "tensors.safetensors", tensors)
        files.write_text(target / _STATE, json.dumps(state))
        for old in self._complete()[:-2]:
            self._remove(old)

    def save_rows(self, step: int, rows: Mapping[str, Tensor], workers: Workers, device: torch.device) -> None:
        """Write this worker's rows of tensors that are divided among workers. All workers call it together."""
        if workers.rank == 0:
            self._remove(step)
        workers.agree(True, device)  # all wait for rank 0
        write_rows(self._of(step), rows, workers)
        workers.agree(True, device)

    def restore_rows(self, step: int, rows: Mapping[str, Tensor], workers: Workers) -> None:
        """Read this worker's rows of the checkpoint of ``step`` into ``rows``, whatever number of workers wrote it.
        Raises InputError if they cannot be read."""
        with _reading(self._of(step)):
            restore_rows(self._of(step), rows, workers)

    def latest(self, workers: Workers) -> Checkpoint | None:
        """Return the newest complete checkpoint that rank 0 sees, the same on all workers, or None. Raises InputError
        if it cannot be read."""
        complete = self._complete()
        step = int(workers.broadcast(torch.tensor([complete[-1] if complete else -1])))
        if step < 0:
            return None
        folder = self._of(step)
        with _reading(folder):
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            return Checkpoint(read_tensors(folder / "tensors.safetensors"), state, step)

    def clear(self) -> None:
        """Remove all checkpoints, once the training's result is stored."""
        files.remove(self.folder)

    def _of(self, step: int) -> Location:
        return self.folder / f"step-{step:09d}"

    def _remove(self, step: int) -> None:
        (self._of(step) / _STATE).unlink(missing_ok=True)
        files.remove(self._of(step))

    def _complete(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order."""
        return sorted(int(path.parent.name.removeprefix("step-")) for path in self.folder.glob(f"step-*/{_STATE}"))


@contextmanager
def _reading(folder: Location) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise InputError(
            f"checkpoint {folder}: cannot be read ({str(error).splitlines()[0]}); remove that folder to resume from "
            "the one before"
        ) from None


def write_tensors(path: Location, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with files.replacing(path) as draft:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft)


def read_tensors(path: Location) -> dict[str, Tensor]:
    """Read a safetensors file."""
    with files.local(path) as file:
        return load_file(file)


def write_rows(folder: Location, rows: Mapping[str, Tensor], workers: Workers) -> None:
    """Write this worker's part of tensors whose row r belongs to worker r modulo their number, to a file of its own."""
    write_tensors(folder / f"rows-{workers.rank}-of-{workers.world}.safetensors", rows)


def read_rows(folder: Location, workers: Workers) -> dict[str, Tensor]:
    """Read this worker's rows of what :func:`write_rows` wrote on all workers, however many these were. Raises
    FileNotFoundError where a file is missing."""
    names = (path.name.removesuffix(".safetensors") for path in folder.glob("rows-*-of-*.safetensors"))
    written = {int(name.rpartition("-")[2]) for name in names}
    if workers.world in written:
        return read_tensors(folder / f"rows-{workers.rank}-of-{workers.world}.safetensors")
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for world in written:
        for rank in range(world):
            for name, tensor in read_tensors(folder / f"rows-{rank}-of-{world}.safetensors").items():
                index = rank + world * torch.arange(len(tensor))
                mine = index % workers.world == workers.rank
                parts.setdefault(name, []).append((index[mine], tensor[mine]))
    if not parts:
        raise FileNotFoundError(f"{folder} has no file rows-*-of-*.safetensors")
    return {name: _in_order(*map(torch.cat, zip(*found))) for name, found in parts.items()}


def restore_rows(folder: Location, rows: Mapping[str, Tensor], workers: Workers) -> None:
    """Read what :func:`read_rows` returns into the tensors ``rows``, a block at a time where as many workers wrote it:
    memory that is there already is all that is needed."""
    path = folder / f"rows-{workers.rank}-of-{workers.world}.safetensors"
    if not path.exists():
        found = read_rows(folder, workers)
        for name, tensor in rows.items():
            tensor.copy_(found[name])
        return
    with files.local(path) as file, safe_open(file, "pt") as written:
        for name, tensor in rows.items():
            part = written.get_slice(name)
            for first in range(0, len(tensor), _ROWS):
                tensor[first : first + _ROWS].copy_(part[first : first + _ROWS])


def _in_order(index: Tensor, rows: Tensor) -> Tensor:
    return rows[index.argsort()]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as named tensors (its hyperparameters come from the config)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{i}.{name}": torch.as_tensor(value)
        for i, p in enumerate(parameters)
        for name, value in optimizer.state.get(p, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state from :func:`optimizer_tensors`."""
    owners = [(p, group.get("fused")) for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        parameter, fused = owners[int(index)]
        optimizer.state[parameter][name] = tensor.clone().to(parameter.device if tensor.dim() or fused else "cpu")
