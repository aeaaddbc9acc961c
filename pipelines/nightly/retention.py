"""Decide what ``jobs/maintain.py`` keeps, and remove exports, models, MLflow's files and rejected rows beyond that.

Nothing is removed that the live generation, a generation within ``retokenize.keep``, an alias of the registered model,
the last run of a stage, a pin, or a job that is at work refers to.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Any

from deltalake.exceptions import CommitFailedError
from mlflow.entities import Run as TrackedRun
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from adasid.encoders import tfidf
from adasid.errors import first_line
from adasid.files import Location, children, location, modified, newest, remove
from adasid.tables import REJECTED_ROWS
from pipelines.engines.lake import commit_hash
from pipelines.engines.tracking import StageContext
from pipelines.publish import generations
from pipelines.publish.generations import Generation
from pipelines.publish.lease import LOG
from pipelines.run import Run
from pipelines.training.register import model_name

_REJECTING = ("items", "interactions", "content_embeddings", "item_stats")
"""Tables whose stages reject rows."""
_DAY = 86_400
_LONGEST = 14
"""MLflow shows a killed run as running for ever: after so many days it is taken for dead."""
_REMOVED = "files"
"""This tag of a run says that its files were removed."""
_HOUR = 1
"""Data files of ``leases`` stay for so many hours."""


def kept(history: list[Generation], number: int) -> list[Generation]:
    """Return the last ``number`` generations, the live one, and its parent."""
    live = [generation for generation in history if generation.live]
    wanted = {generation.generation for generation in history[-number:]}
    wanted |= {value for generation in live for value in (generation.generation, generation.parent) if value}
    return [generation for generation in history if generation.generation in wanted]


def needed(context: StageContext) -> dict[str, set[int]] | None:
    """Return table -> versions that must stay readable: ``sids`` of the last ``retokenize.keep`` generations, the
    sources of the last ``retention.sources``, the training data of models changed in the last
    ``retokenize.lineage_days``, what runs of these days and running jobs read and wrote, and the config's pins. None
    where MLflow does not answer."""
    cfg, keep = context.cfg, defaultdict[str, set[int]](set)
    settings, history = cfg.retokenize, generations.history(context.lake)
    for generation in kept(history, settings.keep):
        keep["sids"].add(generation.sids_version)
    pairs = [pair for generation in kept(history, settings.retention.sources) for pair in generation.inputs.items()]
    since = time.time() - _DAY * settings.lineage_days
    for pattern in ("manifest.json", "result.json"):
        for file in Run(cfg).artifacts.rglob(pattern):
            if modified(file) >= since:
                inputs = json.loads(file.read_text(encoding="utf-8")).get("inputs", {})
                pairs += inputs.items() if isinstance(inputs, dict) else ()
    lineage = context.lineage(settings.lineage_days)
    if lineage is None:
        return None
    at_work = _at_work(context) if Run(cfg).tracking_uri else ()
    for table, version in [*pairs, *cfg.pins.items(), *lineage, *at_work]:
        keep[table].add(version)
    return keep


def tracked_runs(context: StageContext, condition: str = "") -> Iterator[TrackedRun]:
    """Yield this pipeline's runs in MLflow that satisfy a condition."""
    experiment, page = context.recorder.server.experiment_id(), None
    while True:
        text = f"tags.run = '{context.cfg.name}'" + (f" and {condition}" if condition else "")
        runs = context.client.search_runs([experiment], text, page_token=page)
        yield from runs
        page = runs.token
        if not page:
            return


def _at_work(context: StageContext) -> Iterator[tuple[str, int]]:
    """Yield the tables and versions that running jobs have read or written."""
    since = int((time.time() - _DAY * _LONGEST) * 1000)
    for run in tracked_runs(context, f"attributes.status = 'RUNNING' and attributes.start_time >= {since}"):
        for name, value in run.data.tags.items():
            if name.startswith(("in.", "out.")):
                yield name.partition(".")[2], int(value)


def trim_exports(context: StageContext) -> None:
    """Remove the exports of generations beyond ``retention.exports``, and drafts: the lease allows no other writer."""
    folder, removed, size = Run(context.cfg).exports, 0, 0
    keep = {
        str(row.generation) for row in kept(generations.history(context.lake), context.cfg.retokenize.retention.exports)
    }
    for part in children(folder):
        number = part.name.removeprefix(".").partition(".")[0]
        if number.isdigit() and (part.name not in keep):
            (part / "manifest.json").unlink(missing_ok=True)  # first: without it the folder does not count
            removed, size = removed + 1, size + remove(part)
    _say(context, "exports", f"{removed} generations removed, {size / 1e6:.1f} MB")


def trim_artifacts(context: StageContext) -> None:
    """Remove models that have not changed for ``retention.artifact_days`` and that nothing uses."""
    cfg, folder, removed, size = context.cfg, Run(context.cfg).artifacts, 0, 0
    other = Run(cfg).tracked_artifacts.name
    history = kept(generations.history(context.lake), cfg.retokenize.keep)
    used = {Run(cfg).of_name(row.artifact).resolve() for row in history}
    if cfg.sids.artifact:
        used |= {location(cfg.sids.artifact).resolve(), Run(cfg).of_name(cfg.sids.artifact).resolve()}
    aliased = _aliased(context) if Run(cfg).tracking_uri else set()
    tokenizers, hashes = {row.tokenizer for row in history} | aliased, _last_hashes(context)
    since = time.time() - _DAY * context.cfg.retokenize.retention.artifact_days
    for model in (model for kind in children(folder) for model in children(kind)):
        lasting = model.parent.name == other or (model / tfidf.FILE).exists()
        if lasting or model.name in hashes or newest(model) >= since:
            continue
        if any(f"{path}/".startswith(f"{model.resolve()}/") for path in used) or tokenizers & set(_digests(model)):
            continue
        removed, size = removed + 1, size + remove(model)
    _say(context, "artifacts", f"{removed} models removed, {size / 1e6:.1f} MB")


def _last_hashes(context: StageContext) -> set[str]:
    """Return the input hashes of the last run of each stage: its model is found by it."""
    records = Run(context.cfg).record("any").parent.glob("*.json")
    return {str(json.loads(record.read_text(encoding="utf-8")).get("hash")) for record in records}


def _digests(model: Location) -> Iterator[str]:
    for file in model.rglob("manifest.json"):
        yield str(json.loads(file.read_text(encoding="utf-8")).get("digest"))


def _aliased(context: StageContext) -> set[str]:
    """Return the digests of the tokenizers that an alias of the registered model names."""
    name, client = model_name(context.cfg), context.client
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return set()  # no model is registered yet
    versions = [client.get_model_version(name, str(number)) for number in aliases.values()]
    return {str(version.tags.get("digest")) for version in versions}


def trim_tracking(context: StageContext) -> None:
    """Remove the files of MLflow's runs that are older than ``retention.tracking_days``, and the model versions that
    consist of them, unless an alias or a kept generation needs these; metrics, parameters and tags stay."""
    client, name, now = context.client, model_name(context.cfg), time.time()
    history = kept(generations.history(context.lake), context.cfg.retokenize.keep)
    tokenizers = {row.tokenizer for row in history} | _aliased(context)
    versions = defaultdict[str, list[Any]](list)
    for version in client.search_model_versions(f"name = '{name}'"):
        versions[str(version.run_id)].append(version)
    before, dead = (
        int((now - _DAY * days) * 1000) for days in (context.cfg.retokenize.retention.tracking_days, _LONGEST)
    )
    removed = 0
    for run in list(tracked_runs(context, f"attributes.start_time < {before}")):
        number, mine = run.info.run_id, versions[run.info.run_id]
        at_work = run.info.status == "RUNNING" and run.info.start_time >= dead
        if at_work or _REMOVED in run.data.tags or any(version.tags.get("digest") in tokenizers for version in mine):
            continue
        try:
            for version in mine:
                client.delete_model_version(name, version.version)
            get_artifact_repository(run.info.artifact_uri).delete_artifacts()
            client.set_tag(number, _REMOVED, "removed by jobs/maintain.py")
        except Exception as error:  # the store may forbid it; tables are maintained all the same
            context.note(f"files of run {number} in MLflow could not be removed: {first_line(error)}")
            return
        removed += 1
    _say(context, "tracking", f"files of {removed} runs removed")


def trim_rejected(context: StageContext) -> None:
    """Delete rejected rows of all but the last ``retention.rejected`` runs, and those of the current tables."""
    lake, table = context.lake, "rejected_rows"
    if not lake.exists(table):
        return
    current = {lake.input_hash(name) for name in _REJECTING if lake.exists(name)}
    marks = dict.fromkeys(commit_hash(entry) for entry in lake.writes(table))
    keep = {*islice(marks, context.cfg.retokenize.retention.rejected), *current}
    there = {mark for batch in lake.batches(table, None, ["input_hash"]) for mark in batch[0].unique().to_pylist()}
    if old := sorted(there - keep):
        where = "input_hash IN (" + ", ".join(quoted(mark) for mark in old) + ")"
        lake.put(table, REJECTED_ROWS.empty_table(), where, str(lake.input_hash(table)))
        context.note(f"{table}: rows of {len(old)} earlier runs deleted")


def trim_leases(context: StageContext) -> None:
    """Vacuum the data files of ``leases`` and bound its log: every renewal is a commit with a file."""
    lake, table = context.lake, "leases"
    try:
        if lake.delta(table).metadata().configuration.items() < LOG.items():  # of an earlier version of adasid
            lake.delta(table).alter.set_table_properties(LOG)
        removed = lake.delta(table).vacuum(_HOUR, dry_run=False, enforce_retention_duration=False, full=True)
    except CommitFailedError:
        context.note("leases: renewed meanwhile; the next run of jobs/maintain.py removes its files")
        return
    lake.delta(table).create_checkpoint()
    lake.delta(table).cleanup_metadata()
    _say(context, "leases", f"{len(removed)} files removed")


def quoted(text: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _say(context: StageContext, what: str, done: str) -> None:
    context.facts[what] = done
    context.note(f"{what}: {done}")
