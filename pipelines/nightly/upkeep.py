"""Roll back and maintain: what a retained generation, a model in use or a recent run refers to is never removed
(:mod:`pipelines.nightly.retention`)."""

from __future__ import annotations

from typing import Any

from mlflow.exceptions import MlflowException

from adasid.config import Config
from adasid.errors import InputError, first_line
from pipelines import migrate as formats
from pipelines.engines.lake import properties
from pipelines.engines.tracking import StageContext
from pipelines.nightly import retention
from pipelines.publish import exports, generations, registration
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
    registration.register(cfg, context)
    register(cfg, context, Run(cfg).of_name(live.artifact), live.tokenizer, "champion")
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
    """Remove exports, models, MLflow's files and rejected rows beyond ``retokenize.retention``; then compact every
    table and vacuum its files, except those of the versions in :func:`retention.needed` and those younger than
    ``grace_hours``. A table retains its input hash, its lineage, and the log of all its versions (but ``leases``)."""
    lake, grace = context.lake, cfg.retokenize.grace_hours
    with leased(context, cfg.retokenize.lease) as lease:
        for trim in (retention.trim_exports, retention.trim_rejected, retention.trim_leases):
            lease.check()
            trim(context)
        tracked, server = (retention.trim_artifacts, retention.trim_tracking), Run(cfg).tracking_uri
        for trim in tracked if server and not context.recorder.away else () if server else tracked[:1]:
            lease.check()
            try:
                trim(context)
            except MlflowException as error:
                context.note(f"{trim.__name__} was not finished: MLflow does not answer ({first_line(error)})", "WARN")
        try:
            keep = retention.needed(context)
        except MlflowException:
            keep = None
        if keep is None:
            context.status = "removed no file"
            context.note("MLflow does not answer: what recent runs read is unknown, so no file is removed", "WARN")
        for name in lake.tables():
            table = lake.delta(name)
            if name == "leases":
                continue
            lease.check()
            input_hash, compacted = properties(lake.input_hash(name), sources=lake.lineage(name)), 0
            if table.metadata().configuration.get("delta.enableExpiredLogCleanup") != "false":
                table.alter.set_table_properties(
                    {"delta.enableExpiredLogCleanup": "false"}, commit_properties=input_hash
                )
            # readers of sids and live open a fixed version; compaction would lose the order by item_index
            if name not in {"sids", "live", "item_features", "item_pairs"}:
                compacted = table.optimize.compact(commit_properties=input_hash)["numFilesRemoved"]
            if keep is None:
                context.facts[name] = f"{compacted} files compacted"
                context.note(f"{name}: {context.facts[name]}")
                continue
            retained = sorted({*keep[name], table.version()})
            retained = [version for version in retained if _readable(context, name, version)]
            exists = lake.existing(name)
            options: dict[str, Any] = {"enforce_retention_duration": False, "full": True, "keep_versions": retained}
            unused = [file for file in table.vacuum(grace, dry_run=True, **options) if exists(file)]
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
        if context.lake.existing(name)(f"_delta_log/{version:020}.json"):
            raise  # it cannot be read now, which is no reason to remove its files
        context.note(f"{name} version {version} is needed but its log is gone: it cannot be retained")
        return False
    return True
