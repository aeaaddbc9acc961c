"""Roll back and maintain: files that a retained generation, a model or the lineage of a recent run refers to are never
removed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from adasid.config import Config
from adasid.errors import InputError
from pipelines import migrate as formats
from pipelines.engines.lake import properties
from pipelines.engines.tracking import StageContext
from pipelines.publish import exports, generations
from pipelines.publish.lease import leased
from pipelines.run import Run
from pipelines.training.register import register


def rollback(cfg: Config, context: StageContext, number: int | None, hold: bool = False) -> None:
    """Make generation ``number`` live, on ``hold`` if asked for; None: end the hold of the live one. Raises InputError
    where it does not exist or cannot be read any more."""
    with leased(context, cfg.retokenize.lease):
        live = generations.release(context) if number is None else generations.go_back(context, number, hold)
        context.facts["on hold"] = f"since {since}" if (since := generations.on_hold(context.lake)) else "no"
    exports.point(cfg, context.lake)
    register(cfg, context, Path(live.artifact), live.tokenizer, "champion")
    context.facts.update({"generation": live.generation, "items": live.items, "run date": live.run_date})


def migrate(cfg: Config, context: StageContext) -> None:
    """Bring the lake up to this version's format. Raises InputError for a newer one."""
    lake = context.lake
    lake.writable()
    with leased(context, cfg.retokenize.lease):
        steps = formats.migrate(lake)
    for line in steps:
        context.note(line)
    context.status = "done" if steps else "up to date"
    context.facts["format"] = formats.FORMAT


def maintain(cfg: Config, context: StageContext) -> None:
    """Compact every table and vacuum its files, except those of the versions in :func:`needed` and those younger than
    ``grace_hours``. A table retains its input hash, its lineage, and the log of all its versions."""
    lake, grace = context.lake, cfg.retokenize.grace_hours
    with leased(context, cfg.retokenize.lease) as lease:
        keep = needed(context)
        if keep is None:
            context.status = "removed no file"
            context.note("MLflow does not answer: what recent runs read is unknown, so no file is removed", "WARN")
        for log in sorted(Path(lake.root).rglob("_delta_log")):
            name, table = str(log.parent.relative_to(lake.root)), DeltaTable(str(log.parent))
            if name == "leases":
                continue
            lease.check()
            input_hash, compacted = properties(lake.input_hash(name), sources=lake.lineage(name)), 0
            if table.metadata().configuration.get("delta.enableExpiredLogCleanup") != "false":
                table.alter.set_table_properties(
                    {"delta.enableExpiredLogCleanup": "false"}, commit_properties=input_hash
                )
            if name not in {"sids", "live"}:  # their readers open a fixed version, which compaction does not change
                compacted = table.optimize.compact(commit_properties=input_hash)["numFilesRemoved"]
            if keep is None:
                context.facts[name] = f"{compacted} files compacted"
                context.note(f"{name}: {context.facts[name]}")
                continue
            retained = sorted({*keep[name], table.version()})
            retained = [version for version in retained if _readable(context, name, version)]
            options: dict[str, Any] = {"enforce_retention_duration": False, "full": True, "keep_versions": retained}
            unused = [file for file in table.vacuum(grace, dry_run=True, **options) if (log.parent / file).exists()]
            if unused:
                lease.check()
                table.vacuum(grace, dry_run=False, commit_properties=input_hash, **options)
            context.facts[name] = f"{compacted} files compacted, {len(unused)} removed, {len(retained)} versions kept"
            context.note(f"{name}: {context.facts[name]}")


def _readable(context: StageContext, name: str, version: int) -> bool:
    """Return whether the log still has a version; note one that is gone."""
    try:
        context.lake.open(name, version)
    except InputError:
        context.note(f"{name} version {version} is needed but its log is gone: it cannot be retained")
        return False
    return True


def needed(context: StageContext) -> dict[str, set[int]] | None:
    """Return table -> versions that must stay readable: those of the last ``retokenize.keep`` generations and the live
    one, their sources, the training data of the artifacts on disk, the versions that the runs of the last
    ``retokenize.lineage_days`` read and wrote, and the config's pins. None where MLflow does not answer."""
    cfg, keep = context.cfg, defaultdict[str, set[int]](set)
    history = generations.history(context.lake)
    live = [generation for generation in history if generation.live]
    for generation in [*history[-cfg.retokenize.keep :], *live]:
        keep["sids"].add(generation.sids_version)
        for table, version in generation.inputs.items():
            keep[table].add(version)
    for manifest in Run(cfg).artifacts.rglob("manifest.json"):
        for table, version in json.loads(manifest.read_text(encoding="utf-8")).get("inputs", {}).items():
            keep[table].add(version)
    for result in Run(cfg).artifacts.rglob("result.json"):
        inputs = json.loads(result.read_text(encoding="utf-8")).get("inputs", {})
        for table, version in inputs.items() if isinstance(inputs, dict) else ():
            keep[table].add(version)
    lineage = context.lineage(cfg.retokenize.lineage_days)
    if lineage is None:
        return None
    for table, version in [*cfg.pins.items(), *lineage]:
        keep[table].add(version)
    return keep
