"""Run every stage on a synthetic catalogue of SIZE items and 10 SIZE interactions, and measure each.

    python tests/benchmarks/scale.py 1000000

Models train for one epoch, the tokenizer for two. Then comes a day: 1 % of the items change, 0.1 % are new, 1 % more
events are there, in Delta tables that stay in place; features are built and a nightly run publishes its table. One JSON
line a stage is printed and appended to ``<runs>/scale.jsonl`` as it comes: seconds, peak memory of the driver, the JVM,
Spark's Python processes and each training worker, bytes read and written (on disks and sockets) and shuffled.
A stage that has its line is not measured again, so an interrupted command resumes; the line of a stage that was cut
off and went on says ``resumed``, and its seconds are those of the rest. ``--draw`` writes ``scale.png`` and prints the
table of all sizes with the exponent between the last two.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import yaml
from deltalake import DeltaTable, write_deltalake
from matplotlib import colormaps
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
JOBS: dict[str, tuple[str, ...]] = {
    "ingest": ("ingest",),
    "features": ("build_features",),
    "behavior": ("train", "--stage", "behavior"),
    "item features": ("build_features",),
    "tokenizer": ("train", "--stage", "tokenizer"),
    "sids": ("write_sids",),
    "report": ("report",),
    "retrieval": ("train", "--stage", "retrieval"),
    "ranking": ("train", "--stage", "ranking"),
}
DAY: dict[str, tuple[str, ...]] = {
    "day: ingest": ("ingest",),
    "day: features": ("build_features",),
    "day: SIDs": ("retokenize", "--run-date", "today"),
}
DUCKDB = "features in DuckDB"
ORDER = ("ingest", "features", DUCKDB, *[stage for stage in JOBS if stage not in {"ingest", "features"}], *DAY)
KINDS = ("driver", "jvm", "spark_python", "worker")
GB = 1e9
_LARGEST = {
    "driver_gb": "driver GB",
    "jvm_gb": "JVM GB",
    "worker_gb": "worker GB",
    "read_gb": "read GB",
    "written_gb": "written GB",
    "shuffle_gb": "shuffle GB",
}
"""These figures are shown for the largest size. Bytes read and written count those of sockets, too."""
_INTERVAL = 0.5


_ITEMS = """
WITH items AS (
    SELECT *, list_transform(text, lambda x, i: (x + 0.1 * sin(i))::FLOAT) AS moved
    FROM read_parquet({files}))
SELECT item_id, title, CASE WHEN item_id LIKE '%37' THEN moved ELSE text END AS text, visual FROM items
UNION ALL SELECT 'new-' || item_id, title, moved, visual FROM items WHERE item_id LIKE '%073'"""
_EVENTS = """
SELECT user_id, item_id, "timestamp" FROM read_parquet({files})
UNION ALL SELECT user_id, item_id, (1600000000 + hash(user_id, item_id) % 86400)::VARCHAR
FROM read_parquet({files}) WHERE hash(user_id, item_id, "timestamp") % 100 = 0"""


def config(size: int, runs: Path, workers: int) -> dict[str, Any]:
    """Return the config: three modalities with 128 floats an item in all, as few epochs as there can be."""
    events = runs / "events"
    events.mkdir(parents=True, exist_ok=True)
    conf = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": events.as_uri(),
        "spark.eventLog.rolling.enabled": "false",
        "spark.eventLog.compress": "false",
    }
    sizes = {"items": size, "users": size, "interactions": 10 * size, "topics": 200}
    return {
        "name": f"scale-{size}",
        "runs_dir": str(runs),
        "source": {"kind": "synthetic", "synthetic": {**sizes, "text_width": 32, "visual_width": 32}},
        "behavior": {"width": 64, "epochs": 1, "eval_users": 2000},
        "tokenizer": {"hidden": [128], "decoder_hidden": [128], "projector_width": 64, "training": {"epochs": 2}},
        "sids": {"gates": {"max_collision": 1.0, "max_group": 10**9, "min_utilisation": 0.0}},
        "retokenize": {"gates": {"max_churn": 1.0, "max_tail_collision": 1.0, "max_error_ratio": 1000.0}},
        "retrieval": {"epochs": 1, "eval_users": 2000},
        "ranking": {"epochs": 1},
        "spark": {"driver_memory": "6g", "conf": conf},
        "ray": {"workers": workers, "gpus": "never"},
    }


def next_day(lake: Path, source: Path) -> dict[str, Any]:
    """Write the tables of the next day as Delta tables below ``source``; return the section ``source`` of a config."""
    connection = duckdb.connect(config={"memory_limit": "6GB"})
    connection.execute("SET preserve_insertion_order = false")
    for name, query in (("items", _ITEMS), ("interactions", _EVENTS)):
        files = DeltaTable(str(lake / name)).file_uris()
        rows: pa.RecordBatchReader = connection.sql(query.format(files=files)).to_arrow_reader(100_000)
        write_deltalake(str(source / name), rows, mode="overwrite")
    places = {name: str(source / name) for name in ("items", "interactions")}
    return {"kind": "tables", "tables": {**places, "format": "delta", "in_place": list(places)}}


class Sampler:
    """A sampler follows a process and all its descendants: the peak memory of each, and the bytes that it has read and
    written."""

    def __init__(self, pid: int) -> None:
        self.root, self.peak = psutil.Process(pid), dict[int, tuple[str, int]]()
        self.bytes: dict[int, tuple[int, int]] = {}

    def look(self) -> None:
        """Sample once."""
        with suppress(psutil.Error):
            for process in (self.root, *self.root.children(recursive=True)):
                with suppress(psutil.Error):
                    kind, memory, io = self._kind(process), process.memory_info(), process.io_counters()
                    own = memory.rss - (0 if kind == "jvm" else memory.shared)
                    before, most = self.peak.get(process.pid, (kind, 0))
                    # Ray names a process after its task: a worker that ends has another name
                    self.peak[process.pid] = before if before == "worker" else kind, max(own, most)
                    self.bytes[process.pid] = io.read_chars, io.write_chars

    def row(self) -> dict[str, Any]:
        """Return the figures in 10^9 bytes: of each kind the process with the largest peak, of workers each."""
        peaks = defaultdict[str, list[int]](list)
        for kind, peak in self.peak.values():
            peaks[kind].append(peak)
        top = {f"{kind}_gb": round(max(peaks[kind], default=0) / GB, 3) for kind in KINDS}
        workers = [round(peak / GB, 3) for peak in sorted(peaks["worker"], reverse=True)]
        read, written = (round(sum(part) / GB, 3) for part in zip(*self.bytes.values())) if self.bytes else (0, 0)
        return {**top, "workers_gb": workers, "read_gb": read, "written_gb": written}

    def _kind(self, process: psutil.Process) -> str:
        if process == self.root:
            return "driver"
        name, command = process.name(), " ".join(process.cmdline()[:6])
        if name == "java":
            return "jvm"
        if "pyspark.daemon" in command or "pyspark/daemon" in command:
            return "spark_python"
        return "worker" if "RayTrainWorker" in command else "other"


def shuffled(events: Path, since: float) -> float:
    """Return 10^9 bytes that the Spark applications since a time have written to shuffles."""
    total = 0
    for file in events.glob("*"):
        if file.stat().st_mtime >= since:
            with file.open() as lines:
                for line in lines:
                    if '"SparkListenerTaskEnd"' in line:
                        metrics = json.loads(line).get("Task Metrics") or {}
                        total += metrics.get("Shuffle Write Metrics", {}).get("Shuffle Bytes Written", 0)
    return round(total / GB, 3)


def measure(stage: str, path: Path, runs: Path) -> dict[str, Any]:
    """Run a job to its end. Exits with its output where it fails."""
    name, *arguments = {**JOBS, **DAY}[stage]
    log, begun = runs / f"{path.stem}-{stage.removeprefix('day: ').replace(' ', '-')}.log", time.time()
    resumed = log.exists()  # a log without a line is that of a run that was cut off
    started = time.perf_counter()
    with log.open("w") as file:
        command = [sys.executable, f"jobs/{name}.py", "--config", str(path), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        sampler = Sampler(process.pid)
        while process.poll() is None:
            sampler.look()
            time.sleep(_INTERVAL)
    seconds = round(time.perf_counter() - started, 1)
    if process.returncode:
        sys.exit(f"{stage} ended with exit code {process.returncode}: see {log}\n{log.read_text()[-2000:]}")
    row = {"seconds": seconds, **sampler.row(), "shuffle_gb": shuffled(runs / "events", begun)}
    return {**row, **({"resumed": True} if resumed else {})}


def in_duckdb(lake: Path, runs: Path) -> dict[str, Any]:
    """Build the tables of ``features`` in DuckDB."""
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "duck.py"), str(lake), str(runs / "duckdb"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return {"seconds": float(done.stdout)}


def lines(runs: Path) -> list[dict[str, Any]]:
    """Return the lines so far."""
    log = runs / "scale.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run(size: int, runs: Path, workers: int, stages: Sequence[str] = ORDER) -> None:
    """Measure those of the stages of a size that have no line yet."""
    path, day = runs / f"scale-{size}.yaml", runs / f"scale-{size}-day.yaml"
    settings, lake, source = config(size, runs, workers), runs / f"scale-{size}" / "lake", runs / f"source-{size}"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    measured = [row for row in lines(runs) if row["items"] == size]
    if other := {row["ray_workers"] for row in measured} - {workers}:
        sys.exit(f"{runs} has lines of {size} items and {other.pop()} workers: name another folder with --runs")
    done = {row["stage"] for row in measured}
    for stage in ORDER:
        if stage in done or stage not in stages:
            continue
        if stage in DAY and not day.exists():
            settings = {**settings, "source": next_day(lake, source)}
            day.write_text(yaml.safe_dump(settings, sort_keys=False))
        row = in_duckdb(lake, runs) if stage == DUCKDB else measure(stage, day if stage in DAY else path, runs)
        text = json.dumps({"items": size, "stage": stage, "ray_workers": workers, **row})
        with (runs / "scale.jsonl").open("a") as log:
            log.write(text + "\n")
        print(text, flush=True)


def exponent(sizes: dict[int, float]) -> float | None:
    """Return b of seconds = a * items^b between the two largest sizes."""
    if len(sizes) < 2:
        return None
    (n, small), (m, large) = sorted(sizes.items())[-2:]
    return math.log(large / small) / math.log(m / n)


def draw(runs: Path) -> Path:
    """Print seconds by stage and size, and the other figures of the largest size; write the figure of the seconds."""
    stages = defaultdict[str, dict[int, dict[str, Any]]](dict)
    for row in lines(runs):
        stages[row["stage"]][row["items"]] = row
    sizes = sorted({size for known in stages.values() for size in known})
    heads = [*(f"{size:,} items" for size in sizes), "exponent", *_LARGEST.values(), "worker bytes an item"]
    print("| stage | " + " | ".join(heads) + " |")
    print("|---|" + "---|" * len(heads))
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    for stage, known in stages.items():
        seconds = {size: known[size]["seconds"] for size in sorted(known)}
        power = exponent(seconds)
        rest = {size: " (resumed)" if row.get("resumed") else "" for size, row in known.items()}
        shown = [f"{seconds[size]:,.0f} s{rest[size]}" if size in seconds else "" for size in sizes]
        last = known[max(known)]
        shown += ["" if power is None else f"{power:.2f}", *(f"{last.get(name) or '':}" for name in _LARGEST)]
        print(f"| {stage} | " + " | ".join([*shown, growth(known)]) + " |")
        label = stage if power is None else f"{stage}, exponent {power:.2f}"
        axes.loglog(list(seconds), list(seconds.values()), marker="o", label=label)
    axes.set_xlabel("items")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    target = runs / "scale.png"
    figure.savefig(target, dpi=120, bbox_inches="tight")
    return target


def growth(known: dict[int, dict[str, Any]]) -> str:
    """Return by how many bytes an item a worker's peak grows between the two largest sizes."""
    peaks = [(size, known[size].get("worker_gb", 0) * GB) for size in sorted(known)[-2:]]
    if len(peaks) < 2 or not peaks[-1][1]:
        return ""
    (n, small), (m, large) = peaks
    return f"{(large - small) / (m - n):,.0f}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int, nargs="*", help="numbers of items")
    parser.add_argument("--runs", type=Path, default=Path("runs/scale"), help="folder of the runs and the figures")
    parser.add_argument("--workers", type=int, default=2, help="ray.workers")
    parser.add_argument("--stages", nargs="+", default=ORDER, choices=ORDER, help="only these of its stages")
    parser.add_argument("--draw", action="store_true", help="write the figure and print the table of all sizes")
    options = parser.parse_args()
    runs = options.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    for size in options.size:
        run(size, runs, options.workers, options.stages)
    if options.draw:
        print(draw(runs))


if __name__ == "__main__":
    main()
