"""Index ragged sequences that are stored flat, one after another."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def runs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every element of consecutive runs of length ``counts`` [n], the index of its run and its position
    within the run, both [sum of counts]."""
    run = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return run, torch.arange(len(run), device=counts.device) - (counts.cumsum(0) - counts)[run]


def spans(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of consecutive spans: ``lengths`` [n] positions from each of ``starts`` [n] on, [sum of
    lengths]."""
    lengths = np.asarray(lengths, np.int64)
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
