"""Write checkpoints whole or not at all: a checkpoint without ``state.json``, which is written last, does not count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adasid import files
from adasid.distributed import Workers
from adasid.errors import InputError
from adasid.files import Location


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint has ``tensors`` by name and ``state`` as plain JSON data."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

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
        """Write the checkpoint of ``step``. Call on one worker only."""
        target = self._of(step)
        self._remove(step)
        write_tensors(target / "tensors.safetensors", tensors)
        files.write_text(target / "state.json", json.dumps(state))
        for old in self._complete()[:-2]:
            self._remove(old)

    def latest(self, workers: Workers) -> Checkpoint | None:
        """Return the newest complete checkpoint that rank 0 sees, the same on all workers, or None. Raises InputError
        if it cannot be read."""
        complete = self._complete()
        step = int(workers.broadcast(torch.tensor([complete[-1] if complete else -1])))
        if step < 0:
            return None
        folder = self._of(step)
        try:
            return Checkpoint(
                read_tensors(folder / "tensors.safetensors"),
                json.loads((folder / "state.json").read_text(encoding="utf-8")),
            )
        except Exception as error:
            raise InputError(
                f"checkpoint {folder}: cannot be read ({str(error).splitlines()[0]}); remove that folder to resume "
                "from the one before"
            ) from None

    def clear(self) -> None:
        """Remove all checkpoints, once the training's result is stored."""
        files.remove(self.folder)

    def _of(self, step: int) -> Location:
        return self.folder / f"step-{step:09d}"

    def _remove(self, step: int) -> None:
        (self._of(step) / "state.json").unlink(missing_ok=True)
        files.remove(self._of(step))

    def _complete(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order."""
        return sorted(int(path.parent.name.removeprefix("step-")) for path in self.folder.glob("step-*/state.json"))


def write_tensors(path: Location, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with files.replacing(path) as draft:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft)


def read_tensors(path: Location) -> dict[str, Tensor]:
    """Read a safetensors file."""
    with files.local(path) as file:
        return load_file(file)


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
