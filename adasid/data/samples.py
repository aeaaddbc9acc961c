"""Choose a fixed random sample of users: the same for every run, and however many workers share them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from adasid.distributed import Workers


def mixed(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output function of SplitMix64 (Steele, Lea and Flood 2014), which is one-to-one."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def sampled(
    users: NDArray[np.int64], number: int, workers: Workers, device: torch.device | str = "cpu"
) -> NDArray[np.bool_]:
    """Return which of this worker's ``users`` [n] (distinct user_index) belong to the sample of ``number`` users of all
    workers [n]; all do if there are fewer.

    The sample has the users of the smallest hashes. All workers call it together; each sends at most ``number``
    integers."""
    hashes = mixed(users.astype(np.uint64)).view(np.int64)
    least = np.partition(hashes, number - 1)[:number] if len(hashes) > number else hashes
    every = workers.gather_ragged(torch.from_numpy(least).to(device)).cpu().numpy()
    if len(every) < number:
        return np.ones(len(users), bool)
    chosen: NDArray[np.bool_] = hashes <= np.partition(every, number - 1)[number - 1]
    return chosen
