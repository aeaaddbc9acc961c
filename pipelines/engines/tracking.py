"""Track runs in MLflow: one parent run for a pipeline run, a child for each stage, with configuration, lineage, metrics
and artifacts."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from adasid.config import Config, yaml12
from adasid.config.secrets import hidden, masked_config, masked_text
from adasid.errors import InputError, first_line
from adasid.files import Location, append_line, write_json
from adasid.storage import translated
from pipelines import log, migrate
from pipelines.engines import records
from pipelines.engines.lake import Lake
from pipelines.engines.recorder import UPLOAD, Recorder, within
from pipelines.engines.records import Server
from pipelines.engines.spool import Spool
from pipelines.run import Run

_DAY = 86_400


@dataclass
class StageContext:
    """A stage runs in a context: its MLflow run. ``key``: names the run, also before MLflow has created it;
    ``status``: ``done``, ``up to date`` or another word for the end; ``journal``: whether its end is written to the
    run's journal; ``facts``: shown in the printed summary. No fault of MLflow is raised (:class:`Recorder`)."""

    cfg: Config
    lake: Lake
    stage: str
    recorder: Recorder
    key: str
    status: str = "done"
    journal: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def client(self) -> MlflowClient:
        """Return MLflow's client."""
        return self.recorder.server.client

    @property
    def run_id(self) -> str:
        """Return the id of the MLflow run; its key, which is its tag ``adasid.key``, before MLflow has created it."""
        return self.recorder.server.ids.get(self.key, self.key)

    def note(self, text: str, level: log.Level = "INFO") -> None:
        """Print one line of progress on standard error."""
        log.line(text, level, self.stage)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers; names are restricted to MLflow's characters (``@`` becomes ``_at_``)."""
        numbers = {name.replace("@", "_at_"): float(value) for name, value in values.items()}
        self.recorder.put(records.batch(self.key, numbers, step=step))

    def inputs(self, versions: Mapping[str, int]) -> None:
        """Record the table versions that were read, as dataset lineage and as tags."""
        self._tags("in", versions)
        for table, version in versions.items():
            row = {"do": "input", "run": self.key, "table": table, "version": version}
            self.recorder.put({**row, "path": self.lake.path(table), "context": self.stage})

    def outputs(self, versions: Mapping[str, int]) -> None:
        """Record the table versions that were written."""
        self._tags("out", versions)

    def _tags(self, prefix: str, versions: Mapping[str, int]) -> None:
        if versions:
            tags = {f"{prefix}.{table}": version for table, version in versions.items()}
            self.recorder.put(records.batch(self.key, tags=tags))

    def lineage(self, days: int) -> list[tuple[str, int]] | None:
        """Return tables and their versions that this pipeline's runs of the last ``days`` days read or wrote; runs
        deleted in MLflow do not count. None where MLflow does not answer or has not got all records: no version is
        known to be unused."""
        since = time.time() - _DAY * days
        if self.recorder.spool.lost(since):
            return None
        try:
            found, page = list(self.recorder.spool.versions(since)), None
        except ValueError:
            return None
        if not Run(self.cfg).tracking_uri:
            return found
        where = f"tags.run = '{self.cfg.name}' and attributes.start_time >= {int(since * 1000)}"
        while True:
            runs = self.recorder.ask(lambda: self._search(where, page))  # noqa: B023
            if runs is None:
                return None
            for name, value in (tag for run in runs for tag in run.data.tags.items()):
                if name.startswith(("in.", "out.")):
                    found.append((name.partition(".")[2], int(value)))
            page = runs.token
            if not page:
                return found

    def _search(self, where: str, page: str | None) -> Any:
        return self.client.search_runs([self.recorder.server.experiment_id()], where, page_token=page)

    def artifact(self, path: Location) -> None:
        """Log a file, or a folder with all its files."""
        self.recorder.put({"do": "artifact", "run": self.key, "path": str(path)})

    def document(self, name: str, values: Mapping[str, Any]) -> None:
        """Log plain values as the JSON file ``name``."""
        text = json.dumps(values, indent=2, default=str)
        self.recorder.put({"do": "text", "run": self.key, "file": name, "text": text})


def open_lake(cfg: Config) -> Lake:
    """Return the run's lake. Raises InputError unless it is writable and of this version's format."""
    lake = Run(cfg).lake
    lake.writable()
    migrate.check(lake)
    return lake


def new_pipeline(cfg: Config) -> None:
    """Make the next stages children of a new parent run."""
    Run(cfg).pipeline.unlink(missing_ok=True)


@contextmanager
def stage(cfg: Config, name: str, journal: bool = True, migrates: bool = False) -> Iterator[StageContext]:
    """Open the MLflow run of a stage below the pipeline's parent run (created if there is none), close it with the
    right status, and append its wall time and facts to ``stages.jsonl`` in the run's folder (not without ``journal``).
    ``migrates``: the lake may have an older format."""
    lake = Run(cfg).lake if migrates else open_lake(cfg)
    before = log.place(cfg.name, name)
    recorder = _recorder(cfg, name)
    parent, key = _parent(cfg, recorder), records.new_key()
    recorder.put(records.create(key, name, {"stage": name[:250], "run": cfg.name}, parent))
    text = yaml12.write(masked_config(cfg).model_dump(mode="json"))
    recorder.put({"do": "text", "run": key, "file": "config.yaml", "text": text})
    context = StageContext(cfg, lake, name, recorder, key, journal=journal)
    try:
        yield context
    except BaseException as error:
        fault = translated(error)
        recorder.put(records.batch(key, tags={"error": hidden(str(fault or error), cfg)[:500]}))
        _end(recorder, "FAILED" if isinstance(error, Exception) else "KILLED", key)
        _end(recorder, "FAILED", parent)
        if fault:
            raise fault from error
        raise
    seconds = time.monotonic() - context.started
    recorder.put(records.batch(key, {"wall_seconds": seconds}, {"status": context.status}))
    _end(recorder, "FINISHED", key, parent)
    row = {"stage": name, "status": context.status, "seconds": round(seconds, 1), "mlflow_run": context.run_id}
    row["facts"] = context.facts
    if journal:
        append_line(Run(cfg).journal, json.dumps(row, default=str))
    log.line(f"{context.status} in {seconds:.1f} s", stage=name, facts=context.facts)
    log.place(*before)


def _end(recorder: Recorder, status: str, *runs: str) -> None:
    for run in runs:
        recorder.put({"do": "end", "run": run, "status": status, "time": records.now()})


def _recorder(cfg: Config, name: str) -> Recorder:
    """Return a recorder that has called the server. Raises InputError for a deleted experiment and for a URI that
    MLflow cannot read: both need the user."""
    server, spool = _server(cfg), Spool(Run(cfg).spool, cfg.tracking.experiment, rolling=not Run(cfg).tracking_uri)
    recorder = Recorder(server, spool, cfg.tracking.timeout, name)
    if Run(cfg).tracking_uri:
        recorder.open()
    else:
        recorder.away = True
    return recorder


def _server(cfg: Config) -> Server:
    uri, settings = Run(cfg).tracking_uri, cfg.tracking
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it would name every connection that is tried again
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with user and password, where it has them
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{UPLOAD * settings.timeout:.0f}")
    if not uri:
        return Server(None, settings.experiment, None, uri)
    try:
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(uri)
    except MlflowException as error:
        fix = "correct tracking.uri, or leave it null for a local store"
        raise InputError(masked_text(f"tracking.uri {uri}: {first_line(error)}; {fix}")) from error
    place = Run(cfg).tracked_artifacts
    own = None if settings.uri or not isinstance(place, Path) else place.as_uri()
    return Server(client, settings.experiment, own, masked_text(uri))


def reach(cfg: Config) -> None:
    """Ask the tracking server for the experiment, and create nothing. Raises InputError where it was deleted, else what
    MLflow raises."""
    within(cfg.tracking.timeout, _server(cfg).found)


def _parent(cfg: Config, recorder: Recorder) -> str:
    """Return the run, by id or key, that is the parent of the next stages; create it if there is none."""
    path, server = Run(cfg).pipeline, recorder.server
    if path.exists():
        known = str(json.loads(path.read_text(encoding="utf-8"))["parent"])
        if recorder.away or recorder.ask(lambda: _usable(server, known)):
            recorder.put({"do": "resume", "run": known})
            return known
    key = records.new_key()
    recorder.put(records.create(key, cfg.name, {"run": cfg.name}))
    recorder.put({"do": "params", "run": key, "values": parameters(cfg)})
    write_json(path, {"parent": server.ids.get(key, key)})
    return key


def _usable(server: Server, run: str) -> bool:
    """Return whether a run is there, in the experiment; not where the store was replaced or the run deleted."""
    found = server.client.get_run(server.run_id(run)).info
    return bool(found.experiment_id == server.experiment_id() and found.lifecycle_stage == "active")


def parameters(cfg: Config) -> dict[str, Any]:
    """Return the config, its secrets masked, as flat keys and values, without the sections of comparisons, whose labels
    may be any text and whose values are in each cell's own config."""
    sections = masked_config(cfg).model_dump(mode="json", exclude={"compare", "evaluate"})
    flat = {key: value for section, values in sections.items() for key, value in _flatten(values, section).items()}
    return {re.sub(r"[^\w./ :-]", "_", key): value for key, value in flat.items()}  # MLflow allows no others


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in _flatten(inner, f"{prefix}.{name}").items()}
    return {prefix: value}
