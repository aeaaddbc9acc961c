"""Track runs in MLflow: one parent run for a pipeline run, a child for each stage, with configuration, lineage, metrics
and artifacts."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow.data.delta_dataset_source import DeltaDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, LifecycleStage, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from adasid.config import Config, yaml12
from adasid.config.secrets import masked_config, masked_text
from adasid.errors import InputError, first_line
from adasid.files import Location, append_line, local, write_json
from pipelines import migrate
from pipelines.engines.lake import Lake
from pipelines.run import Run


@dataclass
class StageContext:
    """A stage runs in a context: its MLflow run. ``status``: ``done``, ``up to date`` or another word for the end;
    ``journal``: whether its end is written to the run's journal; ``facts``: shown in the printed summary."""

    cfg: Config
    lake: Lake
    stage: str
    client: MlflowClient
    run_id: str
    status: str = "done"
    journal: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def note(self, text: str) -> None:
        """Print one line of progress on standard error."""
        print(f"[{self.stage} {time.monotonic() - self.started:6.1f}s] {text}", file=sys.stderr, flush=True)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers; names are restricted to MLflow's characters (``@`` becomes ``_at_``)."""
        now = int(time.time() * 1000)
        metrics = [Metric(name.replace("@", "_at_"), float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def inputs(self, versions: Mapping[str, int]) -> None:
        """Record the table versions that were read, as dataset lineage and as tags."""
        for table, version in versions.items():
            source = DeltaDatasetSource(path=self.lake.path(table), delta_table_version=version)
            dataset = MetaDataset(source, name=table, digest=f"v{version}")  # type: ignore[abstract]
            entity = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", self.stage)])
            self.client.log_inputs(self.run_id, [entity])
            self.client.set_tag(self.run_id, f"in.{table}", version)

    def outputs(self, versions: Mapping[str, int]) -> None:
        """Record the table versions that were written."""
        for table, version in versions.items():
            self.client.set_tag(self.run_id, f"out.{table}", version)

    def lineage(self, days: int) -> Iterator[tuple[str, int]]:
        """Yield tables and their versions that this pipeline's runs of the last ``days`` days read or wrote; runs
        deleted in MLflow do not count."""
        since, page = int((time.time() - 86_400 * days) * 1000), None
        experiment = self.client.get_run(self.run_id).info.experiment_id
        while True:
            runs = self.client.search_runs(
                [experiment], f"tags.run = '{self.cfg.name}' and attributes.start_time >= {since}", page_token=page
            )
            for name, value in (tag for run in runs for tag in run.data.tags.items()):
                if name.startswith(("in.", "out.")):
                    yield name.partition(".")[2], int(value)
            page = runs.token
            if not page:
                return

    def artifact(self, path: Location) -> None:
        """Log a file, or a folder with all its files."""
        with local(path) as there:
            if there.is_dir():
                self.client.log_artifacts(self.run_id, str(there), path.name)
            else:
                self.client.log_artifact(self.run_id, str(there))


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
    uri = Run(cfg).tracking_uri
    try:
        client, parent, run_id = _start(cfg, name, uri)
    except InputError:
        raise
    except Exception as error:
        raise _unusable(uri, error) from None
    context = StageContext(cfg, lake, name, client, run_id, journal=journal)
    try:
        yield context
    except BaseException as error:
        with _best_effort(context, "the failure"):
            client.set_tag(run_id, "error", masked_text(str(error))[:500])
            client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            client.set_terminated(parent, "FAILED")
        if isinstance(error, MlflowException):
            raise _unusable(uri, error) from error
        raise
    seconds = time.monotonic() - context.started
    with _best_effort(context, "the end"):  # the stage is done even if MLflow fails
        context.metrics({"wall_seconds": seconds})
        client.set_tag(run_id, "status", context.status)
        client.set_terminated(run_id)
        client.set_terminated(parent)
    row = {"stage": name, "status": context.status, "seconds": round(seconds, 1), "mlflow_run": run_id}
    row["facts"] = context.facts
    if journal:
        append_line(Run(cfg).journal, json.dumps(row, default=str))
    context.note(
        f"{context.status} in {seconds:.1f} s" + "".join(f" | {key} {value}" for key, value in context.facts.items())
    )


def _start(cfg: Config, name: str, uri: str) -> tuple[MlflowClient, str, str]:
    """Return the client, the pipeline's parent run and the new run of a stage."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")  # about one minute; MLflow's default of 7 takes six
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    experiment = _experiment(cfg, client, uri)
    parent = _parent(cfg, client, experiment)
    tags = {"mlflow.parentRunId": parent, "stage": name[:250], "run": cfg.name}
    run_id = str(client.create_run(experiment, run_name=name[:250], tags=tags).info.run_id)
    client.log_text(run_id, yaml12.write(masked_config(cfg).model_dump(mode="json")), "config.yaml")
    return client, parent, run_id


def _experiment(cfg: Config, client: MlflowClient, uri: str) -> str:
    """Return the experiment's id; create the experiment if there is none."""
    name, folder = cfg.tracking.experiment, Run(cfg).tracked_artifacts
    place = folder.as_uri() if isinstance(folder, Path) else str(folder)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=None if cfg.tracking.uri else place))
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name)  # another run may have created it concurrently
            if experiment is None:
                raise error from None
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise InputError(
            f"experiment {name!r} was deleted in MLflow ({masked_text(uri)}): restore it "
            f"(mlflow experiments restore --experiment-id {experiment.experiment_id}), or set tracking.experiment"
        )
    return str(experiment.experiment_id)


def _unusable(uri: str, error: Exception) -> InputError:
    fix = "check tracking.uri, or leave it null for a local store"
    return InputError(masked_text(f"MLflow store {uri}: {first_line(error)}; {fix}"))


@contextmanager
def _best_effort(context: StageContext, what: str) -> Iterator[None]:
    """Note MLflow's faults: they replace neither an error nor the result of a finished stage."""
    try:
        yield
    except Exception as error:
        context.note(f"MLflow has not recorded {what} of this stage ({masked_text(first_line(error))})")


def _parent(cfg: Config, client: MlflowClient, experiment_id: str) -> str:
    path = Run(cfg).pipeline
    if path.exists():
        known = str(json.loads(path.read_text(encoding="utf-8"))["parent"])
        with suppress(MlflowException):  # the store was replaced, or the run deleted: start a new parent
            if client.get_run(known).info.experiment_id == experiment_id:
                client.update_run(known, status="RUNNING")
                return known
    parent = client.create_run(experiment_id, run_name=cfg.name, tags={"run": cfg.name}).info.run_id
    flat = parameters(cfg)
    params = [Param(key, str(value)[:5000]) for key, value in flat.items()]
    for start in range(0, len(params), 100):
        client.log_batch(parent, params=params[start : start + 100])
    write_json(path, {"parent": parent})
    return str(parent)


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
