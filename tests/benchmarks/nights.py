"""What nights cost and what they keep, on a copy of a run that has published a generation.

    python tests/benchmarks/nights.py stability --config conf/beauty.yaml    # SIDs kept after 2 % embedding noise, under each policy
    python tests/benchmarks/nights.py days      --config conf/demo.yaml      # thirty days: 1 % new, 2 % changed, 0.2 % removed a day
    python tests/benchmarks/nights.py cost      --config conf/beauty.yaml    # 1,000,000 items: nights of 1 % against encoding all

Each row is printed and kept, as it comes, in ``<run>/nights-<part>.jsonl``; a part that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from adasid.config import Config, load
from adasid.tokenizers import artifact
from adasid.training.shards import batch_of
from pipelines import generations, sids, train
from pipelines.engines import spark as engine
from pipelines.engines import tracking
from pipelines.engines.lake import Lake
from pipelines.nightly import retokenize
from tests.end_to_end.nights import VECTORS, next_day, noisy, put

TABLES = ("item_features", "item_stats", "sids", "generations", "live", "catalog_stats")
OPEN = ["retokenize.gates.max_churn=1.0", "retokenize.gates.max_weighted_churn=1.0", "retokenize.gates.max_error_ratio=1000.0"]


def copied(path: str, folder: Path, *overrides: str) -> tuple[Config, Lake]:
    """A run that reads and writes copies of the tables."""
    cfg = load(path)
    shutil.rmtree(folder, ignore_errors=True)
    for table in TABLES:
        shutil.copytree(cfg.run_dir / "lake" / table, folder / cfg.name / "lake" / table)
    there = load(path, [f"runs_dir={folder}", *OPEN, *overrides])
    return there, tracking.open_lake(there)


def night(cfg: Config, day: date) -> float:
    """Seconds of a night in this process."""
    started = time.perf_counter()
    with tracking.stage(cfg, "retokenize", journal=False) as track:
        retokenize.run(cfg, track, day)
    return time.perf_counter() - started


def encoded(lake: Lake, folder: Path) -> tuple[list[str], NDArray[np.int32], dict[str, float]]:
    """Items, their codes by the artifact in ``folder``, and the mean squared error of each modality."""
    tokenizer, _ = artifact.read(folder)
    items, codes, errors = list[str](), [], dict[str, list[float]]()
    for rows in lake.batches("item_features"):
        batch = batch_of(rows, tokenizer.widths)
        items += rows.column("item_id").to_pylist()
        codes.append(tokenizer.encode(batch).codes.numpy())
        for m, decoded in tokenizer.reconstruct(batch).items():
            errors.setdefault(m, []).extend((decoded - batch.vectors[m]).square().sum(1)[batch.present[m]].tolist())
    return items, np.concatenate(codes), {m: float(np.mean(values)) for m, values in errors.items()}


def stability(path: str, log: Path) -> None:
    """Share of SIDs, and of codes, that stay when every vector moves by noise of 2 % of its norm."""
    scratch = log.parent / "nights"
    done = {json.loads(line)["policy"] for line in log.read_text().splitlines()} if log.exists() else set()

    def keep(policy: str, before: dict[str, list[int]], items: list[str], codes: NDArray[np.int32], error: dict[str, float], seconds: float) -> None:
        same = np.array([before[item] for item in items]) == codes
        row = {"policy": policy, "kept": float(same.all(1).mean()), "codes": float(same.mean()), "error": error, "seconds": round(seconds, 1)}
        print(json.dumps(row), flush=True)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    for policy in ("frozen", "warm", "refit", "cold"):
        if policy in done:
            continue
        cfg, lake = copied(path, scratch, f"retokenize.policy={policy if policy != 'cold' else 'frozen'}")
        live = generations.live(lake)
        before = {row["item_id"]: row["codes"] for row in lake.read("sids", live["sids_version"], ["item_id", "codes"]).to_pylist()}
        put(lake, noisy(lake.read("item_features"), 1, 0.02), "noise")
        if policy == "cold":
            other, started = cfg.model_copy(update={"seed": cfg.seed + 1}), time.perf_counter()
            with tracking.stage(other, "cold", journal=False) as track:
                train.fit_tokenizer(other, track, scratch / "cold")
            keep("cold", before, *encoded(lake, scratch / "cold" / "model"), time.perf_counter() - started)
            continue
        seconds = night(cfg, date(2026, 1, 1))
        made = Path(generations.live(lake)["artifact"])
        keep(policy, before, *encoded(lake, made), seconds)
        if policy == "refit":
            keep("refit, not matched", before, *encoded(lake, made.parents[1] / "model"), seconds)


def days(path: str, log: Path, number: int = 30) -> None:
    """``number`` days in a row; popularity drifts by a tenth a day."""
    scratch = log.parent / "nights"
    start = len(log.read_text().splitlines()) if log.exists() else 0
    cfg, lake = (
        copied(path, scratch) if not start else (load(path, [f"runs_dir={scratch}", *OPEN]), tracking.open_lake(load(path, [f"runs_dir={scratch}"])))
    )
    for day in range(start + 1, number + 1):
        table = next_day(lake.read("item_features"), seed=day, new=0.01, changed=0.02, removed=0.002)
        drifted = np.round(table["interactions"].to_numpy() * np.random.default_rng(day).lognormal(0, 0.1, table.num_rows)).astype(np.int64)
        put(lake, table.set_column(table.column_names.index("interactions"), table.schema.field("interactions"), pa.array(drifted)), f"day {day}")
        seconds = night(cfg, date(2026, 1, 1) + timedelta(days=day))
        live = generations.live(lake)
        row: dict[str, Any] = {"day": day, "seconds": round(seconds, 1), "items": live["items"], "collision": live["metrics"]["collision_items"]}
        row |= {name: live["churn"][name] for name in ("new", "changed", "removed", "churn", "weighted")}
        row["error"] = {m: ratio["all"] for m, ratio in live["drift"]["error_ratio"].items()}
        print(json.dumps(row), flush=True)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")


def many(table: pa.Table, items: int) -> Iterator[pa.RecordBatch]:
    """``items`` rows: copies of ``table``, each vector moved by noise of a tenth of its norm."""
    rng, rows = np.random.default_rng(0), table.num_rows
    for copy in range(-(-items // rows)):
        part = table.slice(0, min(rows, items - copy * rows)).combine_chunks()
        for name in part.column_names:
            column = part[name].combine_chunks()
            if name in {"item_id", "fingerprint"}:
                column = pc.binary_join_element_wise(column, str(copy), "-")
            elif name == "item_index":
                column = pc.add(column, copy * rows)
            elif pa.types.is_list(column.type):
                values = column.flatten().to_numpy()
                step = np.float32(0.1 * np.sqrt(np.mean(values**2))) * rng.standard_normal(len(values), np.float32)
                column = pa.ListArray.from_arrays(column.offsets, pa.array(values + step), type=column.type, mask=column.is_null())
            part = part.set_column(part.column_names.index(name), part.schema.field(name), column)
        yield from part.to_batches()


def work() -> float:
    """Processor seconds so far, of this process and of Spark's."""
    return sum(sum(process.cpu_times()[:4]) for process in (psutil.Process(), *psutil.Process().children(recursive=True)))


def cost(path: str, log: Path, items: int = 1_000_000, share: float = 0.01) -> None:
    """Encoding of ``items`` items, then nights on which a ``share`` of them changed, and none; the exports' part is told apart. The session and the
    first use of Spark are not counted."""
    scratch = log.parent / "nights"
    cfg, lake = copied(path, scratch, "retokenize.exports=[]")
    table, live = lake.read("item_features"), generations.live(lake)
    for name in ("sids", "generations", "live"):
        shutil.rmtree(Path(lake.path(name)))
    lake.write("item_features", table.schema, many(table, items), "many")
    cfg = load(path, [f"runs_dir={scratch}", *OPEN, "retokenize.exports=[]", f"sids.artifact={live['artifact']}", "sids.gates.max_group=1000000"])
    everything = cfg.model_copy(update={"retokenize": load(path).retokenize.model_copy(update={"gates": cfg.retokenize.gates})})
    spark = engine.session(cfg.spark)
    engine.read(spark, lake, "catalog_stats").collect()
    target, days = f"delta.`{lake.path('item_features')}`", iter(date(2026, 1, 1) + timedelta(days=day) for day in range(9))

    def change(number: int) -> None:
        vectors = ", ".join(f"{m} = transform({m}, x -> x * {1 + number / 100})" for m in VECTORS if m in table.column_names)
        rows = f"pmod(xxhash64(item_id), {round(1 / share)}) = {number}"
        spark.sql(f"UPDATE {target} SET {vectors}, fingerprint = concat(fingerprint, '{number}') WHERE {rows}")

    def timed(name: str, run: Callable[[], Any]) -> None:
        before, started = work(), time.perf_counter()
        run()
        row = {"what": name, "items": items, "seconds": round(time.perf_counter() - started, 1), "work": round(work() - before, 1)}
        print(json.dumps(row), flush=True)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def full() -> None:
        with tracking.stage(cfg, "sids", journal=False) as track:
            sids.run(cfg, track)

    timed("full encoding", full)
    change(1)  # rewrites the files that hold the rows, as an update without a change feed does
    timed(f"night, {share:.0%} changed, by fingerprints", lambda: night(cfg, next(days)))
    timed("night, nothing new", lambda: night(cfg, next(days)))
    spark.sql(f"ALTER TABLE {target} SET TBLPROPERTIES (delta.enableChangeDataFeed = true)")
    timed("night, another version with the same rows", lambda: night(cfg, next(days)))
    change(2)
    night(cfg, next(days))
    change(3)
    timed(f"night, {share:.0%} changed, by change feed", lambda: night(cfg, next(days)))
    change(4)
    timed(f"night, {share:.0%} changed, by change feed, with all exports", lambda: night(everything, next(days)))
    shutil.rmtree(scratch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["stability", "days", "cost"])
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    run = load(arguments.config).run_dir.resolve()
    {"stability": stability, "days": days, "cost": cost}[arguments.part](arguments.config, run / f"nights-{arguments.part}.jsonl")
