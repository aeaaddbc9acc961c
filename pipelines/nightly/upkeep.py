"""Roll-back, and maintenance that never removes what a kept generation, a model or a lineage record points at."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from deltalake import DeltaTable

from adasid.config import Config
from pipelines import generations
from pipelines.engines.lake import Lake
from pipelines.engines.tracking import Track
from pipelines.nightly.lease import held


def rollback(cfg: Config, track: Track, number: int) -> None:
    """Make generation ``number`` live. Raises InputError where it does not exist or cannot be read any more."""
    with held(track.lake, cfg.retokenize.lease.seconds, cfg.retokenize.lease.wait):
        row = generations.go_back(track, number)
    track.facts.update({"generation": row["generation"], "items": row["items"], "run date": row["run_date"]})


def maintain(cfg: Config, track: Track) -> None:
    """Compact every table and vacuum its files, except those of the versions in :func:`needed` and those younger than ``grace_hours``."""
    lake = track.lake
    with held(lake, cfg.retokenize.lease.seconds, cfg.retokenize.lease.wait):
        keep = needed(cfg, lake)
        for path in sorted(Path(lake.root).rglob("_delta_log")):
            name = str(path.parent.relative_to(lake.root))
            if name == "leases":
                continue
            table = DeltaTable(str(path.parent))
            compacted = table.optimize.compact()
            versions = sorted({*keep[name], table.version()})
            removed = table.vacuum(cfg.retokenize.grace_hours, dry_run=False, enforce_retention_duration=False, full=True, keep_versions=versions)
            track.facts[name] = f"{compacted['numFilesRemoved']} files compacted, {len(removed)} removed, {len(versions)} versions kept"
            track.note(f"{name}: {track.facts[name]}")


def needed(cfg: Config, lake: Lake) -> dict[str, set[int]]:
    """Table -> versions that must stay readable: those of the last ``retokenize.keep`` generations and the live one, what they were made of,
    what the artifacts on disk were trained on, and the config's pins."""
    keep: dict[str, set[int]] = defaultdict(set)
    rows = generations.history(lake)
    for row in [*rows[-cfg.retokenize.keep :], *(row for row in rows if row["live"])]:
        keep["sids"].add(row["sids_version"])
        for table, version in row["inputs"].items():
            keep[table].add(version)
    for manifest in (cfg.run_dir / "artifacts").rglob("manifest.json"):
        for table, version in json.loads(manifest.read_text(encoding="utf-8")).get("inputs", {}).items():
            keep[table].add(version)
    for result in (cfg.run_dir / "artifacts").rglob("result.json"):
        found = json.loads(result.read_text(encoding="utf-8")).get("inputs", {})
        for table, version in found.items() if isinstance(found, dict) else ():
            keep[table].add(version)
    for table, version in cfg.pins.items():
        keep[table].add(version)
    return keep
