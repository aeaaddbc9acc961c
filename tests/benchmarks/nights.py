"""Measure the cost and the stability of nightly runs, on a copy of a run that has published a generation.

    python tests/benchmarks/nights.py stability --config conf/beauty.yaml

Parts: ``stability``: SIDs unchanged after 2 % embedding noise, under each policy; ``recall``: metrics of the previous
day's retriever on those SIDs; ``days``: thirty days of 1 % new, 2 % changed, 0.2 % removed items; ``replay``: the last
thirty weeks of the data, each a nightly run; ``cost``: 1,000,000 items, nightly runs of 1 % against encoding all.

Each row is printed and written at once to ``<run>/nights-<part>.jsonl``; an interrupted part resumes. Parts with
consecutive nightly runs also write a figure.
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
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from adasid import tables
from adasid.config import Config, load
from adasid.data.shards import batch_of
from adasid.distributed import Workers
from adasid.recommenders import ngrams
from adasid.recommenders.tokens import ItemTokens
from adasid.report import style
from adasid.tokenizers import artifact
from adasid.training.retrieval import RetrievalData, RetrievalTraining
from pipelines import sids
from pipelines.engines import spark as engine
from pipelines.engines import tracking
from pipelines.engines.lake import Lake
from pipelines.nightly import retokenize
from pipelines.publish import generations
from pipelines.training import downstream, launch, tokenizer, workers
from pipelines.training.payload import Catalogue
from pipelines.training.sids import read_catalogue
from tests.end_to_end.nights import VECTORS, next_day, noisy, put

TABLES = ("item_features", "item_stats", "sids", "generations", "live", "catalog_stats", "richness_stats")
OPEN = [
    "retokenize.gates.max_churn=1.0",
    "retokenize.gates.max_weighted_churn=1.0",
    "retokenize.gates.max_error_ratio=1000.0",
    "retokenize.gates.max_tail_collision=1.0",
]


POLICIES = ("frozen", "warm", "warm, in full", "refit", "cold")


def folder_of(log: Path, policy: str) -> Path:
    """Where the night of :func:`stability` under ``policy`` is kept."""
    return log.parent / "nights" / policy.replace(", ", "-").replace(" ", "-")


def copied(path: str, folder: Path, *overrides: str) -> tuple[Config, Lake]:
    """A run that reads and writes copies of the tables."""
    cfg = load(path)
    shutil.rmtree(folder, ignore_errors=True)
    for table in TABLES:
        shutil.copytree(cfg.run_dir / "lake" / table, folder / cfg.name / "lake" / table)
    shutil.copy(cfg.run_dir / "lake" / "format.json", folder / cfg.name / "lake")
    there = load(path, [f"runs_dir={folder}", *OPEN, *overrides])
    return there, tracking.open_lake(there)


def night(cfg: Config, day: date) -> float:
    """Seconds of a night in this process."""
    started = time.perf_counter()
    with tracking.stage(cfg, "retokenize", journal=False) as context:
        retokenize.run(cfg, context, day)
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


def published(lake: Lake) -> tuple[list[str], NDArray[np.int32], dict[str, float]]:
    """The same of the live table."""
    rows = lake.read("sids", generations.live(lake).sids_version, ["item_id", "codes", "gauges"])
    errors = dict[str, list[float]]()
    for gauges in rows["gauges"].to_pylist():
        for gauge in gauges:
            errors.setdefault(gauge["modality"], []).append(gauge["error"])
    return (
        rows["item_id"].to_pylist(),
        np.array(rows["codes"].to_pylist(), np.int32),
        {m: float(np.mean(values)) for m, values in errors.items()},
    )


def stability(path: str, log: Path) -> None:
    """Share of SIDs, and of codes, that stay when every vector moves by noise of 2 % of its norm."""
    done = {json.loads(line)["policy"] for line in log.read_text().splitlines()} if log.exists() else set()

    def keep(
        policy: str,
        before: dict[str, list[int]],
        items: list[str],
        codes: NDArray[np.int32],
        error: dict[str, float],
        seconds: float,
    ) -> None:
        same = np.array([before[item] for item in items]) == codes
        tell(
            log,
            {
                "policy": policy,
                "kept": float(same.all(1).mean()),
                "codes": float(same.mean()),
                "error": error,
                "seconds": round(seconds, 1),
            },
        )

    training = load(path).tokenizer.epochs
    in_full = [f"retokenize.warm.epochs={training.epochs}", f"retokenize.warm.lr={training.lr}"] if training else []
    for policy, overrides in {policy: in_full if policy == "warm, in full" else [] for policy in POLICIES}.items():
        if policy in done:
            continue
        scratch = folder_of(log, policy)
        cfg, lake = copied(
            path, scratch, f"retokenize.policy={'frozen' if policy == 'cold' else policy.split(',')[0]}", *overrides
        )
        live = generations.live(lake)
        before = {
            row["item_id"]: row["codes"]
            for row in lake.read("sids", live.sids_version, ["item_id", "codes"]).to_pylist()
        }
        put(lake, noisy(lake.read("item_features"), 1, 0.02), "noise")
        if policy == "cold":
            other, started = cfg.model_copy(update={"seed": cfg.seed + 1}), time.perf_counter()
            with tracking.stage(other, "cold", journal=False) as context:
                tokenizer.train(other, context, lake.versions("item_features"), scratch / "cold")
            keep("cold", before, *encoded(lake, scratch / "cold" / "model"), time.perf_counter() - started)
            continue
        seconds = night(cfg, date(2026, 1, 1))
        made = Path(generations.live(lake).artifact)
        keep(policy, before, *published(lake), seconds)
        if policy == "refit":
            keep("refit, no slack", before, *encoded(lake, made), seconds)
            keep("refit, not matched", before, *encoded(lake, made.parents[1] / "model"), seconds)


def recall(path: str, log: Path) -> None:
    """Test metrics of the config's retriever, trained on the live SIDs, when it is served the SIDs that
    :func:`stability` left under each policy."""
    log.unlink(missing_ok=True)
    cfg = load(path)
    with tracking.stage(cfg, "retrieval", journal=False) as context:
        downstream.retrieval(cfg, context)
        lake, live = context.lake, generations.live(context.lake)
        source = Catalogue.of("sids", live.sids_version, artifact.read_manifest(Path(live.artifact)))
        folder = downstream.folder_of(downstream.resolve(cfg, lake, "retrieval", source), "retrieval")
    read = lake.versions("sequences", "item_stats")
    best_epoch = json.loads((folder / "result.json").read_text())["best_epoch"]
    settings, lengths = cfg.retrieval, dict.fromkeys(tables.SPLITS)
    parts = workers._histories(lake, read, Workers(), cfg, lengths, {"test": settings.test_users})
    payload = launch.payload(cfg, lake, read, folder).model_copy(update={"catalogue": source})
    known, counts, strata = read_catalogue(lake, payload, settings)
    ids = lake.read("item_stats", read["item_stats"], ["item_id", "item_index"]).sort_by("item_index")["item_id"]

    def score(policy: str, catalogue: ItemTokens) -> None:
        data = RetrievalData(parts["train"], parts["validation"], parts["test"], strata, "sequences")
        training = RetrievalTraining(settings, catalogue, data, folder, cfg.seed, Workers())
        training.model.load_state_dict(load_file(training.weights(best_epoch)))
        training.model.eval()
        same = float((catalogue.rows == known.rows).double().mean())
        tell(
            log,
            {
                "policy": policy,
                "codes": same,
                **{name: training.test()["test"][name] for name in ("recall@10", "ndcg@10", "recall@50")},
            },
        )

    score("live", known)
    for policy in POLICIES:
        scratch = folder_of(log, policy)
        there = Lake(str(scratch / cfg.name / "lake"), {})
        items, codes, _ = encoded(there, scratch / "cold" / "model") if policy == "cold" else published(there)
        codes = codes[pc.index_in(ids, pa.array(items)).to_numpy()]
        chosen = ngrams.choose(settings.ngrams, source.slots, source.parallel)
        score(
            policy,
            ItemTokens.of(codes, source.slots).with_ngrams(
                chosen, settings.ngram_rows, torch.from_numpy(counts > 0), settings.ngram_min_items
            ),
        )


def tell(log: Path, row: dict[str, Any]) -> None:
    """Print a row, and keep it."""
    print(json.dumps(row), flush=True)
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def told(lake: Lake, day: int, seconds: float) -> dict[str, Any]:
    """What a night was like."""
    live = generations.live(lake)
    row: dict[str, Any] = {"day": day, "seconds": round(seconds, 1), "items": live.items}
    row |= {name: live.metrics[name] for name in ("collision_items", "largest_group")}
    row |= {name: live.churn[name] for name in ("new", "changed", "removed", "churn", "weighted")}
    row |= {
        "error": {m: ratio["all"] for m, ratio in live.drift["error_ratio"].items()},
        "norms": live.drift["norms"],
    }
    return row | {"cold": live.drift["cold"]}


@style.styled
def drawn(rows: list[dict[str, Any]]) -> Figure:
    """What each night took, what it touched, and what it left."""
    figure, axes = style.canvas("Nights in a row", 6.4, (1, 1, 1, 1))
    day = [row["day"] for row in rows]
    lines = [
        (0, "Seconds", {"": [row["seconds"] for row in rows]}),
        (1, "Items", {name: [row[name] for row in rows] for name in ("new", "changed", "removed")}),
        (2, "Share", {"churn": [row["churn"] for row in rows], "not unique": [row["collision_items"] for row in rows]}),
        (3, "Error, ratio", {m: [row["error"][m] for row in rows] for m in rows[-1]["error"]}),
    ]
    for place, title, curves in lines:
        for (name, values), colour, dash in zip(curves.items(), style.PALETTE, style.DASHES):
            axes[place].plot(day, values, color=colour, linestyle=dash, label=name or None)
        axes[place].set_ylabel(title)
        if title != "Error, ratio":
            axes[place].set_ylim(0, None)
        if len(curves) > 1:
            axes[place].legend(ncols=len(curves), loc="best")
    style.percent(axes[2].yaxis)
    axes[3].set_xlabel("Night")
    return figure


def days(path: str, log: Path, number: int = 30) -> None:
    """``number`` days in a row; popularity drifts by a tenth a day."""
    scratch = log.parent / "nights-days"
    start = len(log.read_text().splitlines()) if log.exists() else 0
    if not start:
        copied(path, scratch)
    cfg = load(path, [f"runs_dir={scratch}", *OPEN])
    lake = tracking.open_lake(cfg)
    for day in range(start + 1, number + 1):
        table = next_day(lake.read("item_features"), seed=day, new=0.01, changed=0.02, removed=0.002)
        drifted = np.round(
            table["interactions"].to_numpy() * np.random.default_rng(day).lognormal(0, 0.1, table.num_rows)
        ).astype(np.int64)
        put(
            lake,
            table.set_column(
                table.column_names.index("interactions"), table.schema.field("interactions"), pa.array(drifted)
            ),
            f"day {day}",
        )
        tell(log, told(lake, day, night(cfg, date(2026, 1, 1) + timedelta(days=day))))


def replay(path: str, log: Path, number: int = 30) -> None:
    """The last ``number`` weeks of a data set with times: each night sees the items and counts up to its week. The
    tokenizer is trained on the items before the first; an item that came later has no behaviour until the next tenth
    week, as if SASRec were trained then."""
    scratch, base = log.parent / "nights-replay", load(path)
    shutil.rmtree(scratch, ignore_errors=True)
    log.unlink(missing_ok=True)
    cfg, lake = copied(path, scratch, "sids.gates.max_group=1000000")
    whole = lake.read("item_features").combine_chunks()
    events = tracking.open_lake(base).read("ranking_samples", columns=["item_index", "time"])
    item = pc.index_in(events["item_index"], whole["item_index"]).to_numpy()
    time_ = events["time"].to_numpy().astype("datetime64[D]").astype(np.int64)
    first = np.full(whole.num_rows, time_.max() + 1)
    np.minimum.at(first, item, time_)

    def week(number_: int, known: int) -> pa.Table:
        """Items seen until a week's end, with their counts; behaviour of those that came until the end of week
        ``known``."""
        end, learned = (time_.max() - 7 * (number - w) for w in (number_, known))
        counts = np.bincount(item[time_ <= end], minlength=whole.num_rows)
        there = first <= end
        late = pa.array(first > learned)
        part = whole.set_column(
            whole.column_names.index("interactions"), whole.schema.field("interactions"), pa.array(counts)
        )
        for name, value in {"behavior": None, "norm": None, "richness": 0.0, "stratum": "cold"}.items():
            column = part[name].combine_chunks()
            places = pa.array(np.arange(part.num_rows), mask=late.to_numpy(zero_copy_only=False))
            column = column.take(places) if value is None else pc.if_else(late, pa.scalar(value, column.type), column)
            part = part.set_column(part.column_names.index(name), whole.schema.field(name), column)
        prints = pc.binary_join_element_wise(part["fingerprint"], pc.if_else(late, "no behaviour", ""), "")
        part = part.set_column(part.column_names.index("fingerprint"), whole.schema.field("fingerprint"), prints)
        part = part.filter(pa.array(there)).sort_by([("interactions", "descending"), ("item_id", "ascending")])
        place = part.column_names.index("item_index")
        return part.set_column(place, whole.schema.field("item_index"), pa.array(np.arange(part.num_rows))).cast(
            whole.schema
        )

    put(lake, week(0, 0), "week 0")
    for name in ("sids", "generations", "live"):
        shutil.rmtree(Path(lake.path(name)))
    with tracking.stage(cfg, "tokenizer", journal=False) as context:
        tokenizer.train(cfg, context, lake.versions("item_features"), scratch / "tokenizer")
    cfg = load(
        path, [f"runs_dir={scratch}", *OPEN, "sids.gates.max_group=1000000", f"sids.artifact={scratch}/tokenizer/model"]
    )
    with tracking.stage(cfg, "sids", journal=False) as context:
        sids.run(cfg, context)
    for at in range(1, number + 1):
        put(lake, week(at, at // 10 * 10), f"week {at}")
        tell(log, told(lake, at, night(cfg, date(2026, 1, 1) + timedelta(weeks=at))))


def many(table: pa.Table, items: int) -> Iterator[pa.RecordBatch]:
    """``items`` rows: copies of ``table``, each vector moved by noise of half its norm."""
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
                step = np.float32(0.5 * np.sqrt(np.mean(values**2))) * rng.standard_normal(len(values), np.float32)
                column = pa.ListArray.from_arrays(
                    column.offsets, pa.array(values + step), type=column.type, mask=column.is_null()
                )
            part = part.set_column(part.column_names.index(name), part.schema.field(name), column)
        yield from part.to_batches()


def work() -> float:
    """Processor seconds so far, of this process and of Spark's."""
    return sum(
        sum(process.cpu_times()[:4]) for process in (psutil.Process(), *psutil.Process().children(recursive=True))
    )


def cost(path: str, log: Path, items: int = 1_000_000, share: float = 0.01) -> None:
    """Encoding of ``items`` items, then nights on which a ``share`` of them changed, and none; the exports' part is
    told apart. The session and the first use of Spark are not counted."""
    scratch = log.parent / "nights"
    cfg, lake = copied(path, scratch, "retokenize.exports=[]")
    table, live = lake.read("item_features"), generations.live(lake)
    for name in ("sids", "generations", "live"):
        shutil.rmtree(Path(lake.path(name)))
    lake.write("item_features", table.schema, many(table, items), "many")
    cfg = load(
        path,
        [
            f"runs_dir={scratch}",
            *OPEN,
            "retokenize.exports=[]",
            f"sids.artifact={live.artifact}",
            "sids.gates.max_group=1000000",
            "sids.gates.max_collision=1.0",
        ],
    )
    everything = cfg.model_copy(
        update={"retokenize": load(path).retokenize.model_copy(update={"gates": cfg.retokenize.gates})}
    )
    spark = engine.session(cfg.spark)
    engine.read(spark, lake, "catalog_stats").collect()
    target, days = (
        f"delta.`{lake.path('item_features')}`",
        iter(date(2026, 1, 1) + timedelta(days=day) for day in range(9)),
    )

    def change(number: int) -> None:
        vectors = ", ".join(
            f"{m} = transform({m}, x -> x * {1 + number / 100})" for m in VECTORS if m in table.column_names
        )
        rows = f"pmod(xxhash64(item_id), {round(1 / share)}) = {number}"
        spark.sql(f"UPDATE {target} SET {vectors}, fingerprint = concat(fingerprint, '{number}') WHERE {rows}")

    def timed(name: str, run: Callable[[], Any]) -> None:
        before, started = work(), time.perf_counter()
        run()
        tell(
            log,
            {
                "what": name,
                "items": items,
                "seconds": round(time.perf_counter() - started, 1),
                "work": round(work() - before, 1),
            },
        )

    def full() -> None:
        with tracking.stage(cfg, "sids", journal=False) as context:
            sids.run(cfg, context)

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
    parser.add_argument("part", choices=["stability", "recall", "days", "replay", "cost"])
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    kept = load(arguments.config).run_dir.resolve() / f"nights-{arguments.part}.jsonl"
    {"stability": stability, "recall": recall, "days": days, "replay": replay, "cost": cost}[arguments.part](
        arguments.config, kept
    )
    if arguments.part in {"days", "replay"}:
        picture = kept.with_suffix(".png")
        picture.write_bytes(style.png(drawn([json.loads(line) for line in kept.read_text().splitlines()])))
        print(picture)
