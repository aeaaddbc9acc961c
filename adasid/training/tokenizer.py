"""Train any tokenizer. This is plain torch; the workers are passed in."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adasid import config
from adasid.data.samples import shuffled
from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.files import Location
from adasid.metrics.codes import code_use
from adasid.tables import PAD
from adasid.tokenizers.base import Tokenizer
from adasid.training.loop import Report, Row, TrainingLoop, silent

_DEFAULTS = config.Training()
"""Settings of the loop for a tokenizer that is only fitted."""
_OF_SLOT = " of "
"""Between the name of a figure and that of its slot."""
_QUALITY = ("reconstruction", "utilisation", "entropy", "sparsity", "sparsity_target", "least_active")


def summary(row: Mapping[str, float], modalities: Iterable[str]) -> dict[str, Any]:
    """Select the entries of the last logged row for the manifest; ``fvu``: fraction of variance unexplained by
    modality; ``slots``: utilisation and entropy by slot."""
    fvu = {m: row[f"fvu_{m}"] for m in modalities if f"fvu_{m}" in row}
    slots: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        figure, _, slot = name.partition(_OF_SLOT)
        if slot:
            slots.setdefault(slot, {})[figure] = value
    return {**{name: row[name] for name in _QUALITY if name in row}, "fvu": fvu, "slots": slots}


class TokenizerTraining(TrainingLoop):
    """``TokenizerTraining`` is one training run, or one fit, on one worker. ``version``: name of the input in errors;
    ``warm``: whether training continues from the weights of the tokenizer."""

    name = "tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: config.TokenizerSettings,
        shard: Shard,
        folder: Location,
        seed: int,
        workers: Workers,
        version: str,
        device: torch.device | str = "cpu",
        warm: config.Warm | None = None,
    ) -> None:
        device, training = torch.device(device), settings.epochs or _DEFAULTS
        epochs = training.epochs if settings.epochs else 0
        if warm:
            limits = {"lr": warm.lr, "epochs": warm.epochs, "warmup_epochs": 0}
            training, epochs = training.model_copy(update=limits), warm.epochs if epochs else 0
        self.tokenizer, self.settings, self.shard, self.seed = tokenizer.to(device), training, shard, seed
        self.pairs, self.warm = settings.pairs, warm
        own = "tokenizer.training.lr" if "training" in type(settings).model_fields else "tokenizer.aligner.training.lr"
        self.lr_key = "retokenize.warm.lr" if warm else own
        fifth = max(1, epochs // 5)
        self.log_epochs, self.checkpoint_epochs = (
            min(wanted, fifth) for wanted in (training.log_epochs, training.checkpoint_epochs)
        )
        optimizers = {"optimizer": self._optimizer()} if epochs else {}
        super().__init__(tokenizer, optimizers, epochs, folder, workers, device, version)
        rows = max(1, training.batch // workers.world)
        largest = int(workers.gather(torch.tensor([len(shard)], device=device)).max())
        self.steps = -(-largest // rows)
        # half of a batch of pairs are partners; steps and rows per epoch are as without pairs
        self.share = max(1, rows // 2) if self.pairs else rows
        previous = shard.previous(max(slot.size for slot in tokenizer.slots))
        if previous is not None:
            tokenizer.keep_codes(workers.sum(previous.to(device)) > 0)

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW, with weight decay for the parameters that take it, and a ``factor`` of the learning rate for
        each group."""
        plain, factors = self.tokenizer.no_decay(), self.tokenizer.learning_rates()
        groups = dict[tuple[bool, float], list[nn.Parameter]]()
        for p in self.tokenizer.parameters():
            groups.setdefault((p in plain, factors.get(p, 1.0)), []).append(p)
        return torch.optim.AdamW(
            [
                {"params": params, "weight_decay": 0.0 if bare else self.settings.weight_decay, "factor": factor}
                for (bare, factor), params in sorted(groups.items(), key=lambda group: group[0])
            ],
            lr=self.settings.lr,
            fused=True,
        )

    def run(self, report: Report = silent) -> list[Row]:
        """Train all epochs, then fit; return the logged rows."""
        rows = self.run_epochs(lambda rows: report(rows) if rows[-1]["epoch"] < self.epochs else None)
        started = time.monotonic()
        if self.warm:
            self.tokenizer.refine(self.shard, self.workers, self.warm.epochs, self._generator(0))
        else:
            self.tokenizer.fit(self.shard, self.workers, self._generator(0))
        last = rows.pop() if self.epochs else {"epoch": 1.0, "step": 1.0, "seconds": time.monotonic() - started}
        rows.append(last | self.quality())
        report(rows)
        self.tokenizer.eval()
        return rows

    def start(self) -> None:
        """Set the constants that depend on the data, unless training continues."""
        if not self.warm:
            self.tokenizer.prepare(self.shard, self.workers)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def epoch(self, number: int) -> Row:
        """Train on the items once; before the first epoch after the warm-up initialise the codebooks. The quality of a
        logged epoch is measured; that of the last one is left to the end of :meth:`run`."""
        if number == self.settings.warmup_epochs + 1 and not self.warm:
            self.tokenizer.start_quantizing(self.shard, self.workers, self._generator(0))
        row = self._train_epoch(number)
        logged = number < self.epochs and number % self.log_epochs == 0
        return row | self.quality() if logged else row

    def _train_epoch(self, epoch: int) -> Row:
        started, waited = time.monotonic(), 0.0
        random = np.random.default_rng([self.seed, epoch, self.workers.rank])
        order = shuffled(random, len(self.shard), self.steps * self.share)  # with pairs, an epoch visits half of them
        self.tokenizer.train()
        self.tokenizer.start_epoch(self._generator(-epoch))
        sums: dict[str, float] = {}
        for index in self.tracked(range(self.steps), f"epoch {epoch}/{self.epochs}"):
            before = time.monotonic()
            rows = order[index * self.share : (index + 1) * self.share].astype(np.int64)
            batch = (self.shard.take_pairs(rows, random) if self.pairs else self.shard.take(rows)).to(self.device)
            waited += time.monotonic() - before
            for name, value in self._step((epoch - 1) * self.steps + index, batch, epoch).items():
                sums[name] = sums.get(name, 0.0) + value
        seconds = time.monotonic() - started
        shares = torch.tensor([*sums.values(), waited / seconds], dtype=torch.float64, device=self.device)
        means = self.workers.sum(shares) / self.workers.world
        row = {name: float(value) / self.steps for name, value in zip(sums, means)}
        times = {"wait_share": float(means[-1]), "seconds": seconds}
        return {"epoch": float(epoch), "step": float(epoch * self.steps), **row, **times}

    def _step(self, step: int, batch: Batch, epoch: int) -> dict[str, float]:
        optimizer, total = self.optimizers["optimizer"], self.steps * self.epochs
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr * group["factor"] * 0.5 * (1 + np.cos(np.pi * step / total))
        if batch.previous:
            batch = replace(batch, previous=batch.previous.at(step / total))
        progress = 1.0 if self.warm else step / total  # a warm run goes on where the schedules ended
        losses = self.tokenizer.losses(batch, self.workers, progress)
        where = f"step {step} (epoch {epoch}, {losses.parts})"
        self.backward(losses.total, where, f"lower {self.lr_key}, or look at the features")
        optimizer.step()
        if not self.warm:  # a published code is not replaced by another
            replaced = self.tokenizer.after_step(step + 1, (step + 1) / total, self.workers, self._generator(step + 1))
            for parameter, mask in replaced.items():
                self._forget(parameter, mask)
        return losses.parts

    def _forget(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Clear the optimiser's moments at the replaced entries of a parameter."""
        for value in self.optimizers["optimizer"].state.get(parameter, {}).values():
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
                present = batch.present[m][:, None]
                x = batch.vectors[m] * present
                error = (((decoded - x) * present) ** 2).sum().double()
                errors[m] += torch.cat(
                    [x.double().sum(0), torch.stack([(x**2).sum().double(), error, present.sum().double()])]
                )
        row = {}
        for m, width in tokenizer.widths.items():
            total = self.workers.sum(errors[m])
            spread = total[width] - (total[:width] ** 2).sum() / total[-1].clamp(min=1)
            if float(spread) > 1e-12 * float(total[width]):  # else all items are equal, or none has the modality
                row[f"fvu_{m}"] = float(total[width + 1] / spread)
        use = [code_use(counts[: slot.size]) for slot, counts in zip(slots, self.workers.sum(used).cpu().numpy())]
        for slot, found in zip(slots, use):
            row[f"utilisation{_OF_SLOT}{slot.name}"] = found.utilisation
            row |= {} if found.entropy is None else {f"entropy{_OF_SLOT}{slot.name}": found.entropy}
        entropy = [u.entropy for u in use if u.entropy is not None]
        row["utilisation"] = float(np.mean([u.utilisation for u in use]))
        return {**row, "entropy": float(np.mean(entropy))} if entropy else row
