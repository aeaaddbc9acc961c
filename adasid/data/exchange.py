"""Fetch rows that other workers have. A worker keeps its own rows alone, whatever rows its batches need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adasid.distributed import Workers


def fetch(
    wanted: NDArray[np.int64],
    own: NDArray[np.int64],
    take: Callable[[NDArray[np.int64]], Sequence[Tensor]],
    workers: Workers,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Return the rows of the keys ``wanted`` [n], each of which one worker has, as ``take`` returns them: a list of
    tensors [n, ...]. All workers call this together.

    ``own`` [rows]: this worker's keys, ascending; ``take(positions)`` returns the tensors of positions in ``own``, on
    the CPU. They are sent through tensors on ``device``: every worker gets the rows that all of them want, as bytes."""
    keys = workers.gather_ragged(torch.from_numpy(wanted).to(device)).cpu().numpy()
    place = np.searchsorted(own, keys)
    mine = np.flatnonzero(own[np.minimum(place, len(own) - 1)] == keys)
    tensors = [tensor.contiguous() for tensor in take(place[mine])]
    sent = torch.cat([_bytes(tensor) for tensor in tensors], dim=1)
    order = workers.gather_ragged(torch.from_numpy(mine).to(device)).argsort()
    first = int(workers.gather_ragged(torch.tensor([len(wanted)], device=device))[: workers.rank].sum())
    found = workers.gather_ragged(sent.to(device))[order[first : first + len(wanted)]].cpu()
    parts = found.split([tensor.element_size() * tensor.shape[1:].numel() for tensor in tensors], dim=1)
    return [
        part.reshape(-1).clone().view(tensor.dtype).view(len(wanted), *tensor.shape[1:])
        for part, tensor in zip(parts, tensors)
    ]


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of the rows of a tensor [n, ...], [n, bytes]."""
    return tensor.view(len(tensor), tensor.shape[1:].numel()).view(torch.uint8)
