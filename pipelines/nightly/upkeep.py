"""Roll-back, and maintenance that never removes what a kept generation, a model or the lineage of a run that is not too old points at."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from adasid.config import Config
from adasid.errors import InputError
from pipelines import generations, train
from pipelines import migrate as formats
from pipelines.engines.lake import properties
from pipelines.engines.tracking import Track
from pipelines.nightly import exports
from pipelines.nightly.lease import held
from pipelines.run import Run


def rollback(cfg: Config, track: Track, number: int | None, hold: bool = False) -> None:
    """Make generation ``number`` live, on ``hold`` if asked for; None: end the hold of the live one. Raises InputError
    where it does not exist or cannot be read any more."""
    with held(track, cfg.retokenize.lease):
        row = generations.release(track) if number is None else generations.go_back(track, number, hold)
        track.facts["on hold"] = f"since {since}" if (since := generations.on_hold(track.lake)) else "no"
    exports.point(cfg, track.lake)
    train.register(cfg, track, Path(row["artifact"]), row["tokenizer"], "champion")
    track.facts.update({"generation": row["generation"], "items": row["items"], "run date": row["run_date"]})


def migrate(cfg: Config, track: Track) -> None:
    """Bring the lake up to this version's format. Raises InputError for a newer one."""
    lake = track.lake
    lake.writable()
    with held(track, cfg.retokenize.lease):
        done = formats.migrate(lake)
    for line in done:
        track.note(line)
    track.status = "done" if done else "up to date"
    track.facts["format"] = formats.FORMAT


def maintain(cfg: Config, track: Track) -> None:
    """Compact every table and vacuum its files, except those of the versions in :func:`needed` and those younger than ``grace_hours``. A table keeps
    the digest and the versions of what it was made of, and the log of all its versions."""
    lake, grace = track.lake, cfg.retokenize.grace_hours
    with held(track, cfg.retokenize.lease) as lease:
        keep = needed(track)
        for log in sorted(Path(lake.root).rglob("_delta_log")):
            name, table = str(log.parent.relative_to(lake.root)), DeltaTable(str(log.parent))
            if name == "leases":
                continue
            lease.check()
            stamp, compacted = properties(lake.stamp(name), sources=lake.lineage(name)), 0
            if table.metadata().configuration.get("delta.enableExpiredLogCleanup") != "false":
                table.alter.set_table_properties({"delta.enableExpiredLogCleanup": "false"}, commit_properties=stamp)
            if name not in {"sids", "live"}:  # readers of these go to one version, which compaction does not change
                compacted = table.optimize.compact(commit_properties=stamp)["numFilesRemoved"]
            kept = [version for version in sorted({*keep[name], table.version()}) if _readable(track, name, version)]
            options: dict[str, Any] = {"enforce_retention_duration": False, "full": True, "keep_versions": kept}
            unused = [file for file in table.vacuum(grace, dry_run=True, **options) if (log.parent / file).exists()]
            if unused:
                lease.check()
                table.vacuum(grace, dry_run=False, commit_properties=stamp, **options)
            track.facts[name] = f"{compacted} files compacted, {len(unused)} removed, {len(kept)} versions kept"
            track.note(f"{name}: {track.facts[name]}")


def _readable(track: Track, name: str, version: int) -> bool:
    """Whether the log still knows a version; one that is gone is named, and cannot be kept."""
    try:
        track.lake.open(name, version)
    except InputError:
        track.note(f"{name} version {version} is needed but its log is gone: it cannot be kept")
        return False
    return True


def needed(track: Track) -> dict[str, set[int]]:
    """Table -> versions that must stay readable: those of the last ``retokenize.keep`` generations and the live one, what they were made of,
    what the artifacts on disk were trained on, what the runs of the last ``retokenize.lineage_days`` read and wrote, and the config's pins."""
    cfg, keep = track.cfg, defaultdict[str, set[int]](set)
    rows = generations.history(track.lake)
    for row in [*rows[-cfg.retokenize.keep :], *(row for row in rows if row["live"])]:
        keep["sids"].add(row["sids_version"])
        for table, version in row["inputs"].items():
            keep[table].add(version)
    for manifest in Run(cfg).artifacts.rglob("manifest.json"):
        for table, version in json.loads(manifest.read_text(encoding="utf-8")).get("inputs", {}).items():
            keep[table].add(version)
    for result in Run(cfg).artifacts.rglob("result.json"):
        found = json.loads(result.read_text(encoding="utf-8")).get("inputs", {})
        for table, version in found.items() if isinstance(found, dict) else ():
            keep[table].add(version)
    for table, version in [*cfg.pins.items(), *track.lineage(cfg.retokenize.lineage_days)]:
        keep[table].add(version)
    return keep
