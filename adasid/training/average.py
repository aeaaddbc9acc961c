"""Average the weights of a model over the steps of its training; rows of large tables only where they change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """``MovingAverage`` is the exponential moving average of a model's weights, with decay ``min(decay, n / (n + 9))``
    at step n: the initial weights are forgotten fast. ``weights``: name -> average; none where ``decay`` is 0.

    A row of a table with a sparse gradient is averaged when it is next used, by the product of the decays since, which
    is the same as at every step. :meth:`settle` brings all rows up to date."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()} if decay else {}
        self._log_decay = 0.0  # sum of the logarithms of the decays of all steps since the last settlement
        self._done: dict[str, Tensor] = {}  # that sum, at the last step that a row [rows] took part in

    def touched(self) -> dict[str, Tensor]:
        """Return the rows of each parameter with a sparse gradient that the next step changes. Call it before the
        step."""
        rows: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters() if self.weights else ():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce()
                rows[name] = p.grad.indices()[0]
                if name not in self._done:
                    new = torch.full((len(p),), self._log_decay, dtype=torch.float64, device=p.device)
                    self._done[name] = new
                self._catch_up(name, p.detach(), rows[name])
            elif name in self._done:
                self._settle(name, p.detach())
        return rows

    def update(self, step: int, touched: Mapping[str, Tensor]) -> None:
        """Average after step number ``step``, from 1, in which the ``touched`` rows changed."""
        if not self.weights:
            return
        decay = min(self.decay, step / (step + 9))
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        self._log_decay += math.log(decay)
        for name, rows in touched.items():
            weights, new = self.weights[name], parameters[name].index_select(0, rows)
            weights.index_copy_(0, rows, weights.index_select(0, rows).lerp(new, 1 - decay))
            self._done[name][rows] = self._log_decay
        pairs = [(self.weights[name], p) for name, p in parameters.items() if name not in touched]
        if pairs:
            get_ema_multi_avg_fn(decay)(*map(list, zip(*pairs)), step)

    def settle(self) -> None:
        """Bring the averages of all rows up to date."""
        for name, p in self.model.named_parameters():
            if name in self._done:
                self._settle(name, p.detach())
        self._log_decay = 0.0

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Use the averages as the model's weights within the context."""
        self.settle()
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self.model.named_parameters() if self.weights else ():
            p.data, self.weights[name] = self.weights[name], p.data

    def _settle(self, name: str, parameter: Tensor) -> None:
        self._catch_up(name, parameter, torch.nonzero(self._done[name] != self._log_decay).flatten())
        del self._done[name]

    def _catch_up(self, name: str, parameter: Tensor, rows: Tensor) -> None:
        """Average ``rows`` [n] with their present weights over the steps in which they did not change."""
        weights = self.weights[name]
        share = (self._log_decay - self._done[name][rows]).exp().float()[:, None]
        present = parameter.index_select(0, rows)
        weights.index_copy_(0, rows, present.lerp(weights.index_select(0, rows), share))
