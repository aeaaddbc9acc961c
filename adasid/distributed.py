"""This module is a thin layer over ``torch.distributed`` for data-parallel training; for one worker every operation is
the identity.

The caller (Ray Train, torchrun, a test) starts the processes and initialises the process group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def settle(threads: int) -> None:
    """Make results independent of the process: fix the number of threads, and disable nondeterministic kernels."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.sparse.check_sparse_tensor_invariants.disable()  # else torch warns that it does not check
    # mypy does not know this property; filling memory costs time
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


class _Gather(torch.autograd.Function):
    """This function gathers all ranks' rows in rank order; the gradient of a row is the sum of its gradients on all
    ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        workers: Workers = ctx.workers
        total = workers.sum(gradient.contiguous())
        return total.chunk(workers.world)[workers.rank].contiguous(), None


@dataclass(frozen=True)
class Workers:
    """``Workers`` has this process's rank and the number of workers."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def current() -> Workers:
        """Return the workers of the initialised process group, or one worker if there is none."""
        return (
            Workers(dist.get_rank(), dist.get_world_size())
            if dist.is_available() and dist.is_initialized()
            else Workers()
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise sum over workers, a new tensor."""
        tensor = tensor.detach().clone()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate ``rows`` of all workers along the first dimension in rank order; all workers pass the same
        shape."""
        if self.world == 1:
            return rows.detach()
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.detach().contiguous())
        return torch.cat(parts)

    def gather_ragged(self, rows: Tensor) -> Tensor:
        """Gather as :meth:`gather` does, for a different number of rows on each worker."""
        if self.world == 1:
            return rows.detach()
        sizes = [int(n) for n in self.gather(torch.tensor([rows.shape[0]], device=rows.device))]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows.detach()
        parts = self.gather(padded).chunk(self.world)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """Gather as :meth:`gather` does, with gradients."""
        return rows if self.world == 1 else _Gather.apply(rows, self)

    def exchange(self, rows: Tensor, sizes: list[int], incoming: list[int]) -> Tensor:
        """Send the first ``sizes[0]`` of ``rows`` to worker 0, the next ``sizes[1]`` to worker 1, and so on; return
        the ``incoming[r]`` rows that each worker r sent, in rank order."""
        if self.world == 1:
            return rows
        received = rows.new_empty((sum(incoming), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), incoming, sizes)
        return received

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Write rank 0's values into ``tensor`` on every worker, and return it."""
        if self.world > 1:
            on_device = tensor.to("cuda") if dist.get_backend() == "nccl" else tensor
            dist.broadcast(on_device, 0)
            tensor.copy_(on_device)
        return tensor

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their mean over workers: dense ones in one message, where a missing gradient counts as
        zero; of sparse ones, only the rows that any worker has are sent. A gradient is sparse on all workers or on
        none. One that no worker has stays missing, so that the optimiser does not step."""
        if self.world == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
        dense = [p for p in parameters if all(p is not other for other in sparse)]
        if dense:
            present = [p.grad is not None for p in dense]
            flags = dense[0].new_tensor(present)
            flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in dense), flags])
            dist.all_reduce(flat)
            flat /= self.world
            *means, flags = flat.split([*(p.numel() for p in dense), len(dense)])
            found = present if all(present) else flags.tolist()  # a GPU is waited for only where a gradient is missing
            for parameter, mean, there in zip(dense, means, found):
                parameter.grad = mean.view_as(parameter) if there else None
        for parameter in sparse:
            assert parameter.grad is not None
            parameter.grad = self._mean_of_rows(parameter.grad)

    def _mean_of_rows(self, gradient: Tensor) -> Tensor:
        """Return the mean over workers of a sparse gradient; only its rows are sent."""
        gradient = gradient.coalesce()
        rows, values = self.gather_ragged(gradient.indices()[0]), self.gather_ragged(gradient.values())
        mean = torch.sparse_coo_tensor(rows[None], values / self.world, gradient.shape, check_invariants=False)
        return mean.coalesce()

    def agree(self, ok: bool, device: torch.device | str = "cpu") -> bool:
        """Return whether ``ok`` is true on every worker, so that all workers stop together."""
        return ok if self.world == 1 else bool(self.sum(torch.tensor([0.0 if ok else 1.0], device=device)).item() == 0)
