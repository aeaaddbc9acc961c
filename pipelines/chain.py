"""All stages in one process, in order, and the summary at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from adasid.config import Config
from pipelines import features, ingest, report, sids, train
from pipelines.engines import cluster, tracking
from pipelines.engines.tracking import Track, tracking_uri

STAGES: tuple[tuple[str, Callable[[Config, Track], None]], ...] = (
    ("ingest", ingest.run),
    ("features", lambda cfg, track: features.run(cfg, track, "events")),
    ("behavior", train.behavior),
    ("item features", lambda cfg, track: features.run(cfg, track, "items")),
    ("tokenizer", train.tokenizer),
    ("sids", sids.run),
    ("report", report.run),
)


def run(cfg: Config) -> None:
    """Run every stage that is not up to date; print the summary."""
    started = time.monotonic()
    tracking.open_lake(cfg)
    tracking.new_pipeline(cfg)
    try:
        for name, function in STAGES:
            with tracking.stage(cfg, name) as track:
                function(cfg, track)
            if name == "tokenizer":
                cluster.shutdown()
    finally:
        cluster.shutdown()
    print(summary(cfg, time.monotonic() - started))


def summary(cfg: Config, seconds: float) -> str:
    """What was built, the headline figures, and where to look."""
    rows = [json.loads(line) for line in (cfg.run_dir / "stages.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {row["stage"]: row for row in rows}
    told = {row["stage"]: row["facts"] for row in rows if row["facts"]}
    lines = ["", f"{cfg.name}: done in {seconds:.0f} s", ""]
    for name, _ in STAGES:
        row = last[name]
        facts = "   ".join(f"{key}: {value}" for key, value in told.get(name, {}).items())
        lines.append(f"  {name:<14}{row['seconds']:>7.1f} s  {row['status']:<11} {facts}")
    base = cfg.run_dir.resolve()
    lines += ["", f"  tables   {base}/lake/<table>   (semantic IDs: {base}/lake/sids)", f"  report   {base}/report/index.html"]
    lines += [
        f"  model    {base}/artifacts/tokenizer",
        f"  runs     {sys.executable.rsplit('/', 1)[0]}/mlflow ui --backend-store-uri {tracking_uri(cfg)}",
        "",
    ]
    return "\n".join(lines)
