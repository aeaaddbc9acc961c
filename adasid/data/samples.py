"""Choose a fixed random sample of users, the same for every run and however many workers share them, and the order of
an epoch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adasid.distributed import Workers


def mixed(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output function of SplitMix64 (Steele, Lea and Flood 2014), which is one-to-one."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


class Sample(NamedTuple):
    """``Sample`` is a sample of ``number`` users of all ``workers``: those of the smallest hashes; all, if there are
    fewer. The workers exchange tensors on ``device``."""

    number: int
    workers: Workers
    device: torch.device | str = "cpu"

    def possible(self, users: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of ``users`` [n] (distinct user_index), some of this worker's, can belong to it [n]: at most
        ``number``."""
        hashes = _hashes(users)
        if len(users) <= self.number:
            return np.ones(len(users), bool)
        possible: NDArray[np.bool_] = hashes <= np.partition(hashes, self.number - 1)[self.number - 1]
        return possible

    def chosen(self, users: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of this worker's ``users`` [n] (distinct user_index) belong to it [n]. All workers call it
        together; each sends at most ``number`` integers."""
        hashes = _hashes(users)
        least = hashes[self.possible(users)]
        every = self.workers.gather_ragged(torch.from_numpy(least).to(self.device)).cpu().numpy()
        if len(every) < self.number:
            return np.ones(len(users), bool)
        chosen: NDArray[np.bool_] = hashes <= np.partition(every, self.number - 1)[self.number - 1]
        return chosen


def _hashes(users: NDArray[np.int64]) -> NDArray[np.int64]:
    return mixed(users.astype(np.uint64)).view(np.int64)


def shuffled(random: np.random.Generator, rows: int, number: int) -> NDArray[np.int32]:
    """Return the indices of ``rows`` rows in a random order, from the first again until they are ``number``,
    [number]."""
    order = random.permutation(np.arange(rows, dtype=np.int32))
    times, rest = divmod(number, max(1, rows))
    return np.concatenate([*[order] * times, order[:rest]])
