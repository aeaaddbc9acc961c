"""Throughput of encoding against this machine's own matrix-product peak, and the share of a training epoch spent waiting for data.

    python tests/benchmarks/bench.py

Both sides of every ratio are measured in the same run, alternating, so that a slow or busy machine slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch

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
    batch = Batch(vectors, {m: torch.ones(size, dtype=torch.bool) for m in WIDTHS}, torch.rand(size))
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


def waiting(items: int = 20_000) -> None:
    """Print the share of an epoch that a worker waits for its batches."""
    rng = np.random.default_rng(0)
    columns = {
        m: pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(items * w, np.float32)), w).cast(pa.list_(pa.float32()))
        for m, w in WIDTHS.items()
    }
    table = pa.table({"item_index": np.arange(items), "richness": rng.random(items, np.float32), **columns})
    shard = Shard(lambda names: table.select(names).to_batches(max_chunksize=4096), tuple(WIDTHS))
    with TemporaryDirectory() as folder:
        training = TokenizerTraining(artifact.build(SETTINGS, shard.widths), SETTINGS.training, shard, Path(folder), 0, Workers(), "bench")
        rows = training.run()
    last = rows[-1]
    print(f"training                 {items / last['seconds']:15.0f} items/s    {last['seconds']:.1f} s an epoch of {items} items")
    print(f"waiting for data         {last['wait_share']:15.2%}                            target at most 5 %")


if __name__ == "__main__":
    encoding()
    waiting()
