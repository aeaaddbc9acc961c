"""Run all stages in order in one process, and print the summary."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from adasid.config import Config
from adasid.config.secrets import masked_text
from pipelines import content, features, ingest, migrate, report, sids, stage
from pipelines.engines import cluster, tracking
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import StageContext
from pipelines.features import events, items, pairs
from pipelines.run import Run
from pipelines.stage import Stage
from pipelines.training import behavior, tokenizer

STAGES: tuple[tuple[str, Callable[[Config, StageContext], None]], ...] = (
    ("ingest", ingest.run),
    ("content", content.run),
    ("features", lambda cfg, context: features.run(cfg, context, "events")),
    ("behavior", behavior.run),
    ("item features", lambda cfg, context: features.run(cfg, context, "items")),
    ("tokenizer", tokenizer.run),
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
            with tracking.stage(cfg, name) as context:
                function(cfg, context)
            if name == "tokenizer":
                cluster.shutdown()
    finally:
        cluster.shutdown()
    print(summary(cfg, time.monotonic() - started))


def show_plan(cfg: Config) -> None:
    """Print which stages would run, and why. Nothing is run or written."""
    print(f"{cfg.name}: the stages of jobs/run_all.py")
    for step in plan(cfg):
        print(f"  {step.stage:<14}{step.status:<12}{step.why}".rstrip())


class Step(NamedTuple):
    """A plan has one step a stage. ``status``: up to date, runs, or skipped; ``why``: the reason to run or skip it."""

    stage: str
    status: str
    why: str = ""


def plan(cfg: Config, after: str = "") -> list[Step]:
    """Return what :func:`run` would do, or only its stages ``after`` the named one. A stage whose inputs an earlier
    stage is about to replace counts as one that runs.

    Raises InputError for a source that cannot be read.
    """
    lake = Run(cfg).lake
    if migrate.current(lake) is not None:
        migrate.check(lake)
    steps, coming = list[Step](), dict[str, tuple[str, str | None]]()
    stages = list(declared(cfg, lake))
    first = next((at + 1 for at, make in enumerate(stages) if isinstance(make, Stage) and make.name == after), 0)
    for make in stages[first:]:
        if isinstance(make, Step):
            steps.append(make)
            continue
        known, produced = stage.recorded(make, cfg), dict[str, str | None]()
        before = known["input_hashes"] if known else {}
        changed = [
            f"{name}, which {writer} {'makes' if name in make.uses else 'writes'}"
            for name in (*make.reads(cfg), *make.uses)
            for writer, input_hash in [coming.get(name, ("", None))]
            if writer and (input_hash is None or input_hash != before.get(name))
        ]
        if changed:
            steps.append(Step(make.name, "runs", f"reads {' and '.join(changed)}"))
            produced = dict.fromkeys((*make.writes(cfg), *make.makes))
        else:
            inputs = stage.resolve(make, cfg, lake)
            if stage.up_to_date(make, inputs, lake):
                steps.append(Step(make.name, "up to date"))
            else:
                steps.append(Step(make.name, "runs", stage.reason(make, inputs, lake)))
                produced = dict.fromkeys(make.writes(cfg), inputs.hash) | dict.fromkeys(make.makes)
        coming |= {name: (make.name, input_hash) for name, input_hash in produced.items()}
    return steps


def declared(cfg: Config, lake: Lake) -> Iterator[Stage | Step]:
    """Yield the stages of :data:`STAGES` as they are declared; those that this config skips as steps."""
    yield ingest.INGEST
    yield content.CONTENT if cfg.content.encoders else Step(content.CONTENT.name, "skipped", content.BROUGHT)
    yield events.EVENTS
    if cfg.tokenizer.pairs:
        yield pairs.ITEM_PAIRS
    skipped = behavior.skipped(cfg, lake)
    yield Step(behavior.BEHAVIOR.name, "skipped", skipped[1]) if skipped else behavior.BEHAVIOR
    yield items.ITEM_FEATURES
    yield tokenizer.declare()
    yield sids.declare(cfg)
    yield report.REPORT


def summary(cfg: Config, seconds: float) -> str:
    """Format the status, time and facts of every stage, and the paths of the outputs."""
    rows = [json.loads(line) for line in Run(cfg).journal.read_text(encoding="utf-8").splitlines()]
    last = {row["stage"]: row for row in rows}
    facts_of = {row["stage"]: row["facts"] for row in rows if row["facts"]}
    lines = ["", f"{cfg.name}: done in {seconds:.0f} s", ""]
    for name, _ in STAGES:
        row = last[name]
        facts = "   ".join(f"{key}: {value}" for key, value in facts_of.get(name, {}).items())
        lines.append(f"  {name:<14}{row['seconds']:>7.1f} s  {row['status']:<11} {facts}")
    run = Run(cfg)
    lines += [
        "",
        f"  tables   {run.lake.path('<table>')}   (semantic IDs: {run.lake.path('sids')})",
        f"  report   {run.report()}/index.html",
    ]
    lines += [
        f"  model    {run.artifacts}/tokenizer",
        f"  runs     {_runs(run)}",
        "",
    ]
    return "\n".join(lines)


def _runs(run: Run) -> str:
    """Say where the MLflow runs are."""
    uri = run.tracking_uri
    if not uri:
        return f"{run.spool}: set tracking.uri, and the next stage sends them to MLflow"
    if uri.startswith("http"):
        return masked_text(uri)
    return f"{sys.executable.rsplit('/', 1)[0]}/mlflow ui --backend-store-uri {masked_text(uri)}"
