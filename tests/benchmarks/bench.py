"""Measure speed and memory as ratios to this machine's peak or to libraries that compute the same result.

    python tests/benchmarks/bench.py [encoding single residual repulsion clusters product decoding ngrams ...]

The parts are encoding against the matrix-product peak, training and fitting against libraries, the cost of repulsion
in a step, decoding, n-grams of ten million items, the share of an epoch spent waiting for data, memory against the
size of the catalogue, and the time to encode one item through the Python API. Both sides of every ratio are measured
in the same run, alternating, so that a slow or busy machine slows both.
"""

from __future__ import annotations

import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as nnf
from torch import nn
from vector_quantize_pytorch import ResidualVQ

import adasid
from adasid import config
from adasid.data.shards import Batch, Shard
from adasid.distributed import Workers
from adasid.quantizers.product import ProductQuantizer, fit_opq, fit_opq_faiss
from adasid.recommenders import heads, retriever
from adasid.recommenders.autoregressive import AutoregressiveRetriever
from adasid.recommenders.ngrams import choose
from adasid.recommenders.tokens import ItemTokens, Prefixes
from adasid.sid import Slot
from adasid.tables import BEHAVIOR
from adasid.tokenizers import artifact
from adasid.tokenizers.base import Tokenizer
from adasid.tokenizers.rq_kmeans.model import ResidualCentroids
from adasid.tokenizers.rq_vae.model import RqVae
from adasid.training.tokenizer import TokenizerTraining

WIDTHS = {"text": 1024, "visual": 512, BEHAVIOR: 64}
SETTINGS = config.AdcSidSettings.model_validate(
    {
        "codebook_size": 300,
        "shared_experts": 2,
        "content_experts": {"text": 2, "visual": 2},
        "behavior_experts": 4,
        "training": {"epochs": 2, "log_epochs": 1, "checkpoint_epochs": 2},
    }
)
RESIDUAL = config.RqVaeSettings(content=("text",))
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
    batch = Batch(
        vectors, {m: torch.ones(size, dtype=torch.bool) for m in WIDTHS}, torch.rand(size), torch.arange(size)
    )
    flops = products(tokenizer, batch)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    out = torch.empty(2048, 2048)
    peaks, rates = [], []
    for _ in range(ROUNDS):
        peaks.append(2 * 2048**3 / seconds(lambda: torch.mm(a, b, out=out)))
        rates.append(size / seconds(lambda: tokenizer.encode(batch)))
    fractions = sorted(rate * flops / peak for rate, peak in zip(rates, peaks))
    print(
        f"threads {torch.get_num_threads()}   batch {size}   {flops / 1e6:.2f} MFLOP an item   {len(tokenizer.slots)} "
        "experts"
    )
    print(
        f"matrix-product peak      median {statistics.median(peaks) / 1e9:8.1f} GFLOP/s   ({min(peaks) / 1e9:.1f} to "
        f"{max(peaks) / 1e9:.1f})"
    )
    print(
        f"encoding                 median {statistics.median(rates):8.0f} items/s    ({min(rates):.0f} to "
        f"{max(rates):.0f})"
    )
    print(
        f"fraction of the peak     median {statistics.median(fractions):8.2f}            ({fractions[0]:.2f} to "
        f"{fractions[-1]:.2f})   target 0.60"
    )


def single(items: int = 1000) -> None:
    """Print the milliseconds to encode one item through the Python API, on one core."""
    with TemporaryDirectory() as folder:
        facts = {"richness": {"source": "norm", "low": 6.0, "high": 10.0, "spearman": None, "mean": 0.5}}
        artifact.write(Path(folder), artifact.build(SETTINGS, WIDTHS), SETTINGS, facts)
        tokenizer = adasid.load(folder)
    vectors = {m: np.random.default_rng(0).standard_normal((items, width), np.float32) for m, width in WIDTHS.items()}
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for row in range(items):
        started = time.perf_counter()
        tokenizer.encode({m: values[row : row + 1] for m, values in vectors.items()}).tokens  # noqa: B018
        times.append(1e3 * (time.perf_counter() - started))
    torch.set_num_threads(threads)
    worst = sorted(times)[round(0.99 * items)]
    print(f"one item, one core       median {statistics.median(times):8.2f} ms         (p99 {worst:.2f})   target 5")


class Theirs(nn.Module):
    """RQ-VAE's own encoder and decoder around ResidualVQ."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.quantizer = ResidualVQ(
            dim=RESIDUAL.latent_width,
            num_quantizers=RESIDUAL.levels,
            codebook_size=RESIDUAL.codebook_size,
            commitment_weight=RESIDUAL.commitment,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of a batch [B, D]."""
        quantized, _, commitment = self.quantizer(self.encoder(x)[:, None, :])
        return nnf.mse_loss(self.decoder(quantized[:, 0]), x) + commitment.sum()


def stepper(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        total = loss()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return run


def text_batch(size: int) -> Batch:
    """Random text vectors."""
    x = torch.randn(size, WIDTHS["text"])
    return Batch({"text": x}, {"text": torch.ones(size, dtype=torch.bool)}, torch.rand(size), torch.arange(size))


def rq_vae(settings: config.RqVaeSettings, batch: Batch) -> Tokenizer:
    """RQ-VAE on text, its codebooks initialised as training does it, on the latents of ``batch``."""
    tokenizer = RqVae(settings, {"text": WIDTHS["text"]}).train()
    tower = tokenizer.tower("shared")
    tower.codebooks.initialise(
        tower.encoder(batch.vectors["text"]).detach(), settings.kmeans_rounds, torch.Generator().manual_seed(0)
    )
    tokenizer.quantizing.fill_(True)
    return tokenizer


def show(ours: str, theirs: str, times: list[tuple[float, float]], target: str) -> None:
    """Both medians, and the ratio with its range."""
    ratios = sorted(mine / other for mine, other in times)
    print(f"{ours:<25}median {1e3 * statistics.median(t[0] for t in times):8.1f} ms")
    print(f"{theirs:<25}median {1e3 * statistics.median(t[1] for t in times):8.1f} ms")
    print(
        f"{'ratio':<25}median {statistics.median(ratios):8.2f}            ({ratios[0]:.2f} to {ratios[-1]:.2f})   "
        f"target {target}"
    )


def residual() -> None:
    """Print the seconds of a training step of RQ-VAE and of the same model with vector-quantize-pytorch's
    ResidualVQ."""
    batch = text_batch(RESIDUAL.training.batch)
    ours = rq_vae(RESIDUAL, batch)
    tower = copy.deepcopy(ours.get_submodule("towers.shared"))
    theirs = Theirs(tower.get_submodule("encoder"), tower.get_submodule("decoder")).train()
    mine = stepper(ours, lambda: ours.losses(batch, Workers(), 0.5).total)
    other = stepper(theirs, lambda: theirs(batch.vectors["text"]))
    show(
        "RQ-VAE training step", "with ResidualVQ", [(seconds(mine), seconds(other)) for _ in range(ROUNDS)], "at most 1"
    )


def repulsion(size: int = 4096) -> None:
    """Print the share of a training step that the repulsions take at a batch of ``size``."""
    batch = text_batch(size)
    plain = rq_vae(RESIDUAL, batch)
    without = stepper(plain, lambda: plain.losses(batch, Workers(), 0.5).total)
    for kind in ("hamr", "adaptive"):
        model = rq_vae(config.RqVaeSettings.model_validate({"content": ("text",), "repulsion": {"kind": kind}}), batch)
        step = stepper(model, lambda model=model: model.losses(batch, Workers(), 0.5).total)  # type: ignore[misc]
        shares = sorted(1 - seconds(without, 1.0) / seconds(step, 1.0) for _ in range(5))
        print(
            f"share of a step, {kind:<9}median {statistics.median(shares):8.2f}            ({shares[0]:.2f} to "
            f"{shares[-1]:.2f})   target at most 0.30"
        )


def mixture(rows: int, width: int) -> torch.Tensor:
    """Vectors around 500 centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(500, width, generator=generator)
    return centres[torch.randint(500, (rows,), generator=generator)] + 0.7 * torch.randn(
        rows, width, generator=generator
    )


def clusters(rows: int = 50_000, width: int = 128, k: int = 256, levels: int = 3, rounds: int = 20) -> None:
    """Print the seconds of fit and encoding by residual k-means, ours and faiss', and both errors."""
    x = mixture(rows, width)
    data = x.numpy()
    quantizer, left = ResidualCentroids(levels, k, width), {}

    def ours() -> None:
        quantizer.fit(x, rounds, torch.Generator().manual_seed(0), balanced=False)
        left["ours"] = float((x - quantizer(x)[1]).square().sum(1).mean())

    def theirs() -> None:
        residual = data.copy()
        for level in range(levels):
            found = faiss.Kmeans(width, k, niter=rounds, max_points_per_centroid=rows, seed=level)
            found.train(residual)
            residual -= found.centroids[found.index.search(residual, 1)[1][:, 0]]
        left["faiss"] = float((residual**2).sum(1).mean())

    show(
        "RQ-KMeans fit and encode",
        "faiss.Kmeans by level",
        [(seconds(ours), seconds(theirs)) for _ in range(5)],
        "at most 1",
    )
    print(f"squared error            ours {left['ours']:.2f}   faiss {left['faiss']:.2f}")


def product(rows: int = 20_000, width: int = 96, parts: int = 6, k: int = 256) -> None:
    """Print the seconds of an OPQ fit with our default rounds, and with faiss' 50, and both errors."""
    x, left, s = mixture(rows, width), {}, config.OpqSettings()

    def error(found: ProductQuantizer) -> float:
        return float((x - found.decode(found.codes(x))).square().sum(1).mean())

    def ours() -> None:
        left["ours"] = error(fit_opq(x, parts, k, s.rounds, s.momentum, torch.Generator().manual_seed(0))[0])

    def theirs() -> None:
        left["faiss"] = error(fit_opq_faiss(x, parts, k, 50))

    show(
        "OPQ fit, K=256", "faiss OPQMatrix and PQ", [(seconds(ours), seconds(theirs)) for _ in range(3)], "at most 0.33"
    )
    print(f"squared error            ours {left['ours']:.2f}   faiss {left['faiss']:.2f}")


def memory() -> None:
    """Print the peak memory of a training process beyond its shard, for a catalogue and for one four times as large."""
    beyond = []
    for items in (10_000, 40_000):
        found = subprocess.run(
            [sys.executable, __file__, str(items)], capture_output=True, text=True, check=True
        ).stdout.split()
        beyond.append((int(found[-2]) - int(found[-1])) / 2**20)
    print(f"memory beyond the shard  {beyond[0]:10.0f} MiB for 10,000 items, {beyond[1]:.0f} MiB for 40,000")


def catalogue(items: int, slots: int = 6, size: int = 256) -> ItemTokens:
    """Random SIDs."""
    codes = np.random.default_rng(0).integers(0, size, (items, slots)).astype(np.int32)
    return ItemTokens.of(codes, [Slot(f"s{i}", "shared", size) for i in range(slots)])


def decoding(users: int = 4096) -> None:
    """Print users/s of exact parallel scoring, and of constrained beam search over a million items in a process of its
    own."""
    exact = heads.build(config.Retrieval(head="parallel"), catalogue(12_101, size=100)).eval()
    states = torch.randn(users, exact.settings.width)
    with torch.inference_mode():
        rate = users / seconds(lambda: [exact.top(part, 100) for part in states.split(256)])
    print(f"exact scoring            {rate:15.0f} users/s    12,101 items, top 100")
    print(subprocess.run([sys.executable, __file__, "beam"], capture_output=True, text=True, check=True).stdout, end="")


def beam(items: int = 1_000_000, users: int = 128) -> None:
    """Users/s and peak memory of beam search at beam 100, and the share of answers that are items."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = catalogue(items)
    model = heads.build(config.Retrieval(head="autoregressive", beam=100), tokens).eval()
    torch.nn.init.normal_(model.table)
    assert isinstance(model, AutoregressiveRetriever)
    started = time.perf_counter()
    model.prefixes = Prefixes.of(tokens)
    built = time.perf_counter() - started
    states = torch.randn(users, model.settings.width)
    place = torch.tensor([2 ** (9 * slot) for slot in range(tokens.rows.shape[1])])
    local = tokens.rows - torch.tensor(tokens.starts)
    with torch.inference_mode():
        rate = users / seconds(lambda: [model.top(part, 100) for part in states.split(32)])
        found, _ = model.top(states[:32], 100)
    valid = torch.isin((local[found.reshape(-1)] * place).sum(1), (local * place).sum(1)).double()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(
        f"beam search              {rate:15.1f} users/s    {items:,} items, beam 100, {valid.mean():.0%} of "
        f"{len(valid)} answers are items"
    )
    print(f"prefixes                 {built:15.1f} s          peak memory above the imports {peak:.0f} MiB")


def ngrams(items: int = 10_000_000, rows: int = 1 << 20) -> None:
    """Print the time and memory of the n-grams of many items, and the time of a training step and of scoring a user
    with them over that without."""
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (items, 6)))
    slots = [Slot(f"{kind[0]}{i}", kind, 256) for kind in ("text", BEHAVIOR) for i in range(3)]
    plain = ItemTokens(
        codes + 257 * torch.arange(6), (257,) * 6, torch.ones(1, 6), (), torch.arange(items), torch.zeros(items, 0)
    )
    started = time.perf_counter()
    combined = plain.with_ngrams(choose("auto", slots, parallel=False), rows, torch.ones(items, dtype=torch.bool), 2)
    size = combined.ngrams.numel() * combined.ngrams.element_size() / 2**20
    print(f"n-grams                  {time.perf_counter() - started:15.1f} s          {items:,} items, {size:.0f} MiB")
    steps, scored, drawn = list[float](), list[float](), torch.randint(items, (256, 21))
    for tokens in (plain, combined):
        model = heads.build(config.Retrieval(), tokens)
        optimizer, log_q = torch.optim.Adagrad(model.tables, lr=0.05), torch.zeros(items)

        def step(
            model: retriever.Retriever = model,
            optimizer: torch.optim.Optimizer = optimizer,
            log_q: torch.Tensor = log_q,
        ) -> None:
            optimizer.zero_grad()
            valid = torch.ones(256, 20, dtype=torch.bool)
            states, negatives = model.outputs(drawn[:, :-1], valid), drawn.flatten()[:1024]
            model.loss(states, drawn[:, 1:].flatten(), negatives, log_q).backward()
            optimizer.step()

        steps.append(seconds(step, 3.0))
        with torch.inference_mode():
            states, targets = torch.randn(1024, model.settings.width), torch.randint(items, (1024,))
            scored.append(seconds(partial(model.ranks, states, targets, 100), 3.0) / 1024)
    text = f"with {rows:,} rows a step takes {steps[1]:.2f} s, {steps[1] / steps[0]:.2f} times that without; a user"
    print(f"{'':41}{text} {1000 * scored[1]:.0f} ms, {scored[1] / scored[0]:.2f} times")


def waiting(items: int = 20_000) -> None:
    """Print the share of an epoch that a worker waits for its batches."""
    shard, rows = train(items)
    last = rows[-1]
    print(
        f"training                 {len(shard) / last['seconds']:15.0f} items/s    {last['seconds']:.1f} s an epoch of "
        f"{items} items"
    )
    print(f"waiting for data         {last['wait_share']:15.2%}                            target at most 5 %")


def train(items: int) -> tuple[Shard, list[dict[str, float]]]:
    """Two epochs on random vectors, which are made as they are read."""

    def read(names: list[str]) -> Iterator[pa.RecordBatch]:
        for start in range(0, items, 4096):
            rng, index = np.random.default_rng(start), np.arange(start, min(start + 4096, items))
            made = {
                "item_index": pa.array(index),
                "richness": pa.array(rng.random(len(index), np.float32)),
                "interactions": pa.array(np.zeros(len(index), np.int64)),
            }
            for m in set(names) & set(WIDTHS):
                values = pa.array(rng.standard_normal(len(index) * WIDTHS[m], np.float32))
                made[m] = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, WIDTHS[m], dtype=np.int32), values)
            yield pa.RecordBatch.from_pydict({name: made[name] for name in names})

    shard = Shard(read, tuple(WIDTHS))
    with TemporaryDirectory() as folder:
        training = TokenizerTraining(
            artifact.build(SETTINGS, shard.widths), SETTINGS, shard, Path(folder), 0, Workers(), "bench"
        )
        return shard, training.run()


PARTS: tuple[Callable[[], None], ...] = (
    encoding,
    single,
    residual,
    repulsion,
    clusters,
    product,
    decoding,
    ngrams,
    waiting,
    memory,
)

if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        held = len(train(int(sys.argv[1]))[0]) * sum(WIDTHS.values()) * 4
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, held)
    elif sys.argv[1:] == ["beam"]:
        beam()
    else:
        for part in PARTS:
            if len(sys.argv) == 1 or part.__name__ in sys.argv[1:]:
                part()
