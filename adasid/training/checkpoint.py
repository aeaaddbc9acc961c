"""Write checkpoints atomically: a folder is written under a temporary name and renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adasid.distributed import Workers
from adasid.errors import InputError


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

    folder: Path

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``. Call on one worker only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target, draft = self.folder / f"step-{step:09d}", self.folder / f".draft-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            draft / "tensors.safetensors",
        )
        (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        for old in self._complete()[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self, workers: Workers) -> Checkpoint | None:
        """Return the newest complete checkpoint that rank 0 sees, the same on all workers, or None. Raises InputError
        if it cannot be read."""
        complete = self._complete()
        step = int(workers.broadcast(torch.tensor([int(complete[-1].name.removeprefix("step-")) if complete else -1])))
        if step < 0:
            return None
        folder = self.folder / f"step-{step:09d}"
        try:
            return Checkpoint(
                load_file(folder / "tensors.safetensors"),
                json.loads((folder / "state.json").read_text(encoding="utf-8")),
            )
        except Exception as error:
            raise InputError(
                f"checkpoint {folder}: cannot be read ({str(error).splitlines()[0]}); remove that folder to resume "
                "from the one before"
            ) from None

    def clear(self) -> None:
        """Remove all checkpoints, once the training's result is stored."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


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
