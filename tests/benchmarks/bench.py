"""Speed and memory as ratios: encoding against this machine's own matrix-product peak, the training step of RQ-VAE against
vector-quantize-pytorch's, the share of an epoch spent waiting for data, and memory against the size of the catalogue.

    python tests/benchmarks/bench.py

Both sides of every ratio are measured in the same run, alternating, so that a slow or busy machine slows both.
"""

from __future__ import annotations

import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as nnf
from torch import nn
from vector_quantize_pytorch import ResidualVQ

from adasid import config
from adasid.tables import BEHAVIOR
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Tokenizer
from adasid.training.shards import Batch, Shard
from adasid.training.tokenizer import TokenizerTraining
from adasid.training.workers import Workers

WIDTHS = {"text": 1024, "visual": 512, BEHAVIOR: 64}
SETTINGS = config.AdcSid(
    codebook_size=300,
    shared_experts=2,
    content_experts={"text": 2, "visual": 2},
    behavior_experts=4,
    training=config.Training(epochs=3, log_epochs=1, checkpoint_epochs=3),
)
RESIDUAL = config.RqVae(content=("text",))
ROUNDS = 7


def seconds(function: Callable[[], object], least: float = 0.4) -> float:
    """Seconds a call, over as many calls as fill ``least`` seconds."""
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < least:
        function()
        calls += 1
    return elapsed / calls


def products(tokenizer: Tokenizer, batch: Batch) -> float:
    """Floating-point operations an item of the matrix products that ``encode`` runs, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        tokenizer.encode(batch)
    return counter.get_total_flops() / len(batch)


def encoding() -> None:
    """Print items/s and the fraction of the peak."""
    size = config.Sids().batch
    tokenizer = artifact.build(SETTINGS, WIDTHS).eval()
    vectors = {m: torch.randn(size, width) for m, width in WIDTHS.items()}
    batch = Batch(vectors, {m: torch.ones(size, dtype=torch.bool) for m in WIDTHS}, torch.rand(size), torch.arange(size))
    flops = products(tokenizer, batch)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    out = torch.empty(2048, 2048)
    peaks, rates = [], []
    for _ in range(ROUNDS):
        peaks.append(2 * 2048**3 / seconds(lambda: torch.mm(a, b, out=out)))
        rates.append(size / seconds(lambda: tokenizer.encode(batch)))
    fractions = sorted(rate * flops / peak for rate, peak in zip(rates, peaks))
    print(f"threads {torch.get_num_threads()}   batch {size}   {flops / 1e6:.2f} MFLOP an item   {len(tokenizer.slots)} experts")
    print(f"matrix-product peak      median {statistics.median(peaks) / 1e9:8.1f} GFLOP/s   ({min(peaks) / 1e9:.1f} to {max(peaks) / 1e9:.1f})")
    print(f"encoding                 median {statistics.median(rates):8.0f} items/s    ({min(rates):.0f} to {max(rates):.0f})")
    print(f"fraction of the peak     median {statistics.median(fractions):8.2f}            ({fractions[0]:.2f} to {fractions[-1]:.2f})   target 0.60")


class Theirs(nn.Module):
    """RQ-VAE's own encoder and decoder around ResidualVQ."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.quantizer = ResidualVQ(
            dim=RESIDUAL.latent_width, num_quantizers=RESIDUAL.levels, codebook_size=RESIDUAL.codebook_size, commitment_weight=RESIDUAL.commitment
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of a batch [B, D]."""
        quantized, _, commitment = self.quantizer(self.encoder(x)[:, None, :])
        return nnf.mse_loss(self.decoder(quantized[:, 0]), x) + commitment.sum()


def residual() -> None:
    """Print the seconds of a training step of RQ-VAE and of the same model with vector-quantize-pytorch's ResidualVQ."""
    size = RESIDUAL.training.batch
    ours = artifact.build(RESIDUAL, {"text": WIDTHS["text"]}).train()
    ours.get_buffer("quantizing").fill_(True)
    tower = copy.deepcopy(ours.get_submodule("towers.shared"))
    theirs = Theirs(tower.get_submodule("encoder"), tower.get_submodule("decoder")).train()
    x = torch.randn(size, WIDTHS["text"])
    batch = Batch({"text": x}, {"text": torch.ones(size, dtype=torch.bool)}, torch.rand(size), torch.arange(size))

    def step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            total = loss()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()

        return run

    mine, other = step(ours, lambda: ours.losses(batch, Workers(), 0.5).total), step(theirs, lambda: theirs(x))
    ratios, times = [], []
    for _ in range(ROUNDS):
        times.append((seconds(mine), seconds(other)))
        ratios.append(times[-1][0] / times[-1][1])
    print(f"RQ-VAE training step     median {1e3 * statistics.median(t[0] for t in times):8.1f} ms")
    print(f"with ResidualVQ          median {1e3 * statistics.median(t[1] for t in times):8.1f} ms")
    print(f"ours / theirs            median {statistics.median(ratios):8.2f}            ({min(ratios):.2f} to {max(ratios):.2f})   target at most 1")


def memory() -> None:
    """Print the peak memory of a training process beyond its shard, for a catalogue and for one four times as large."""
    beyond = []
    for items in (15_000, 60_000):
        found = subprocess.run([sys.executable, __file__, str(items)], capture_output=True, text=True, check=True).stdout.split()
        beyond.append((int(found[-2]) - int(found[-1])) / 2**20)
    print(f"memory beyond the shard  {beyond[0]:10.0f} MiB for 15,000 items, {beyond[1]:.0f} MiB for 60,000")


def waiting(items: int = 20_000) -> None:
    """Print the share of an epoch that a worker waits for its batches."""
    shard, rows = train(items)
    last = rows[-1]
    print(f"training                 {len(shard) / last['seconds']:15.0f} items/s    {last['seconds']:.1f} s an epoch of {items} items")
    print(f"waiting for data         {last['wait_share']:15.2%}                            target at most 5 %")


def train(items: int) -> tuple[Shard, list[dict[str, float]]]:
    """Three epochs on random vectors, which are made as they are read."""

    def read(names: list[str]) -> Iterator[pa.RecordBatch]:
        for start in range(0, items, 4096):
            rng, index = np.random.default_rng(start), np.arange(start, min(start + 4096, items))
            made = {"item_index": pa.array(index), "richness": pa.array(rng.random(len(index), np.float32))}
            for m in set(names) & set(WIDTHS):
                values = pa.array(rng.standard_normal(len(index) * WIDTHS[m], np.float32))
                made[m] = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, WIDTHS[m], dtype=np.int32), values)
            yield pa.RecordBatch.from_pydict({name: made[name] for name in names})

    shard = Shard(read, tuple(WIDTHS))
    with TemporaryDirectory() as folder:
        training = TokenizerTraining(artifact.build(SETTINGS, shard.widths), SETTINGS, shard, Path(folder), 0, Workers(), "bench")
        return shard, training.run()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        held = len(train(int(sys.argv[1]))[0]) * sum(WIDTHS.values()) * 4
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, held)
    else:
        encoding()
        residual()
        waiting()
        memory()
