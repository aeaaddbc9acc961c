"""Train any tokenizer. This is plain torch; the workers are passed in.

Data order, initialisation and revival depend only on (seed, epoch or step, rank), so an interrupted run resumes at its
last checkpoint and gives the same result, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adasid import config
from adasid.errors import TrainingError
from adasid.metrics.codes import code_use
from adasid.tables import PAD
from adasid.tokenizers.base import Tokenizer
from adasid.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizer
from adasid.training.shards import Shard
from adasid.training.workers import Workers

_NOTHING = config.Training()
"""Settings of the loop for a tokenizer that is only fitted."""
_QUALITY = ("reconstruction", "utilisation", "entropy", "sparsity", "sparsity_target", "least_active")


def summary(row: Mapping[str, float], modalities: Iterable[str]) -> dict[str, Any]:
    """Select the entries of the last logged row for the manifest; ``fvu``: fraction of variance unexplained by
    modality."""
    fvu = {m: row[f"fvu_{m}"] for m in modalities if f"fvu_{m}" in row}
    return {**{name: row[name] for name in _QUALITY if name in row}, "fvu": fvu}


class TokenizerTraining:
    """``TokenizerTraining`` is one training run, or one fit, on one worker; all workers have the same tokenizer.
    ``data_version``: name of the input in errors; ``warm``: whether training continues from the weights of the
    tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: config.TokenizerSettings,
        shard: Shard,
        folder: Path,
        seed: int,
        workers: Workers,
        data_version: str,
        device: torch.device | str = "cpu",
        warm: config.Warm | None = None,
    ) -> None:
        self.tokenizer, self.settings, self.shard, self.seed = (
            tokenizer.to(device),
            settings.epochs or _NOTHING,
            shard,
            seed,
        )
        self.epochs, self.pairs, self.warm = settings.epochs.epochs if settings.epochs else 0, settings.pairs, warm
        if warm:
            limits = {"lr": warm.lr, "epochs": warm.epochs, "warmup_epochs": 0}
            self.settings, self.epochs = self.settings.model_copy(update=limits), warm.epochs if self.epochs else 0
        self.workers, self.data_version, self.device = workers, data_version, torch.device(device)
        self.checkpoints = Checkpoints(folder / "checkpoints")
        plain = tokenizer.no_decay()
        decayed = [p for p in tokenizer.parameters() if p not in plain]
        kept = [p for p in tokenizer.parameters() if p in plain]
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.lr, fused=True) if self.epochs else None
        rows = max(1, self.settings.batch // workers.world)
        largest = int(workers.gather(torch.tensor([len(shard)], device=self.device)).max())
        self.steps = -(-largest // rows)
        self.share = (
            max(1, rows // 2) if self.pairs else rows
        )  # half of a batch of pairs are partners; steps and rows per epoch are as without pairs
        self.waited = 0.0
        previous = shard.previous(max(slot.size for slot in tokenizer.slots))
        if previous is not None:
            tokenizer.keep_codes(workers.sum(previous.to(self.device)) > 0)

    def run(self, report: Callable[[list[dict[str, float]]], None] = lambda rows: None) -> list[dict[str, float]]:
        """Train all epochs, then fit; return the logged rows. ``report`` gets all rows so far, on every worker."""
        first, rows = self._resume()
        for epoch in range(first, self.epochs + 1):
            if epoch == self.settings.warmup_epochs + 1 and not self.warm:
                self.tokenizer.start_quantizing(self.shard, self.workers, self._generator(0))
            row = self._epoch(epoch)
            last = epoch == self.epochs
            if not last and epoch % self.settings.log_epochs == 0:
                rows.append(row | self.quality())
                report(rows)
            if last:
                rows.append(row)
            if (last or epoch % self.settings.checkpoint_epochs == 0) and self.workers.rank == 0:
                self._save(epoch, rows)
        started = time.monotonic()
        if self.warm:
            self.tokenizer.refine(self.shard, self.workers, self.warm.epochs, self._generator(0))
        else:
            self.tokenizer.fit(self.shard, self.workers, self._generator(0))
        end = rows.pop() if self.epochs else {"epoch": 1.0, "step": 1.0, "seconds": time.monotonic() - started}
        rows.append(end | self.quality())
        report(rows)
        self.tokenizer.eval()
        return rows

    def _resume(self) -> tuple[int, list[dict[str, float]]]:
        found = self.checkpoints.latest(self.workers) if self.optimizer else None
        if found is None or self.optimizer is None:
            if not self.warm:
                self.tokenizer.prepare(self.shard, self.workers)
            return 1, []
        self.tokenizer.load_state_dict(found.under("model"))
        restore_optimizer(self.optimizer, found.under("optimizer"))
        return int(found.state["epoch"]) + 1, list(found.state["rows"])

    def _save(self, epoch: int, rows: list[dict[str, float]]) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.tokenizer.state_dict().items()}
        assert self.optimizer is not None
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        self.checkpoints.save(epoch, tensors, {"epoch": epoch, "rows": rows})

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def _epoch(self, epoch: int) -> dict[str, float]:
        started, waited = time.monotonic(), 0.0
        random = np.random.default_rng([self.seed, epoch, self.workers.rank])
        order = random.permutation(len(self.shard))
        order = np.resize(order, self.steps * self.share)  # with pairs, an epoch visits half of the items
        self.tokenizer.train()
        self.tokenizer.start_epoch(self._generator(-epoch))
        sums: dict[str, float] = {}
        for index in range(self.steps):
            before = time.monotonic()
            rows = order[index * self.share : (index + 1) * self.share]
            batch = (self.shard.take_pairs(rows, random) if self.pairs else self.shard.take(rows)).to(self.device)
            waited += time.monotonic() - before
            for name, value in self._step((epoch - 1) * self.steps + index, batch, epoch).items():
                sums[name] = sums.get(name, 0.0) + value
        seconds = time.monotonic() - started
        means = (
            self.workers.sum(torch.tensor([*sums.values(), waited / seconds], dtype=torch.float64, device=self.device))
            / self.workers.world
        )
        row = {name: float(value) / self.steps for name, value in zip(sums, means)}
        return {
            "epoch": float(epoch),
            "step": float(epoch * self.steps),
            **row,
            "wait_share": float(means[-1]),
            "seconds": seconds,
        }

    def _step(self, step: int, batch: Any, epoch: int) -> dict[str, float]:
        assert self.optimizer is not None
        total = self.steps * self.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * 0.5 * (1 + np.cos(np.pi * step / total))
        if batch.previous:
            batch = replace(batch, previous=batch.previous.at(step / total))
        losses = self.tokenizer.losses(batch, self.workers, step / total)
        if not self.workers.agree(bool(torch.isfinite(losses.total)), self.device):
            raise TrainingError(
                f"tokenizer: loss is not finite at step {step} (epoch {epoch}), input {self.data_version}, on this "
                f"worker {losses.parts}; "
                "lower tokenizer.training.lr, or look at the features"
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.workers.average_gradients(self.tokenizer.parameters())
        self.optimizer.step()
        replaced = self.tokenizer.after_step(step + 1, (step + 1) / total, self.workers, self._generator(step + 1))
        for parameter, mask in replaced.items():
            self._forget(parameter, mask)
        return losses.parts

    def _forget(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Clear the optimiser's moments at the replaced entries of a parameter."""
        assert self.optimizer is not None
        for value in self.optimizer.state.get(parameter, {}).values():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                value.masked_fill_(mask, 0.0)

    @torch.no_grad()
    def quality(self) -> dict[str, float]:
        """Compute, over all workers' items, the fraction of variance unexplained by modality (methods 8.1), mean
        utilisation and mean entropy of the codebooks."""
        self.tokenizer.eval()
        tokenizer, slots = self.tokenizer, self.tokenizer.slots
        used = torch.zeros(len(slots), max(slot.size for slot in slots), dtype=torch.float64, device=self.device)
        errors = {
            m: torch.zeros(width + 3, dtype=torch.float64, device=self.device) for m, width in tokenizer.widths.items()
        }
        for part in self.shard.scan():
            batch = replace(part, previous=None).to(self.device)
            codes = tokenizer.encode(batch).codes.long()
            used.scatter_add_(1, codes.T.clamp(min=0), (codes.T != PAD).double())
            for m, decoded in tokenizer.reconstruct(batch).items():
                there = batch.present[m][:, None]
                x = batch.vectors[m] * there
                error = (((decoded - x) * there) ** 2).sum().double()
                errors[m] += torch.cat(
                    [x.double().sum(0), torch.stack([(x**2).sum().double(), error, there.sum().double()])]
                )
        row = {}
        for m, width in tokenizer.widths.items():
            total = self.workers.sum(errors[m])
            spread = total[width] - (total[:width] ** 2).sum() / total[-1].clamp(min=1)
            if float(spread) > 1e-12 * float(total[width]):  # else all items are equal, or none has the modality
                row[f"fvu_{m}"] = float(total[width + 1] / spread)
        use = [code_use(counts[: slot.size]) for slot, counts in zip(slots, self.workers.sum(used).cpu().numpy())]
        entropy = [u.entropy for u in use if u.entropy is not None]
        row["utilisation"] = float(np.mean([u.utilisation for u in use]))
        return {**row, "entropy": float(np.mean(entropy))} if entropy else row
