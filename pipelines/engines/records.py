"""Send records to MLflow. A record is plain data that can be kept in a file, and sent twice without harm.

Every run has a key, which its tag :data:`KEY` holds, so that a record can name a run that MLflow has not created yet.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from mlflow.data.delta_dataset_source import DeltaDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from adasid.errors import InputError
from adasid.files import local, location
from pipelines.engines.spool import Record

KEY = "adasid.key"
_PREFIX = "key-"
_DESCRIPTION = 5000
"""MLflow takes so many characters of a model version's description."""


def now() -> int:
    """Return the time in milliseconds."""
    return int(time.time() * 1000)


def new_key() -> str:
    """Return the key of a new run."""
    return f"{_PREFIX}{uuid.uuid4().hex}"


def create(key: str, name: str, tags: Mapping[str, str], parent: str | None = None) -> Record:
    """Return the record that creates a run, below ``parent`` if given."""
    return {"do": "create", "run": key, "name": name[:250], "tags": dict(tags), "parent": parent, "time": now()}


def batch(
    run: str, metrics: Mapping[str, float] | None = None, tags: Mapping[str, Any] | None = None, step: int = 0
) -> Record:
    """Return the record of metrics at a step, and of tags."""
    return {"do": "batch", "run": run, "metrics": metrics or {}, "tags": tags or {}, "step": step, "time": now()}


def upload(record: Record) -> bool:
    """Return whether a record sends a file, which takes longer."""
    return record["do"] in {"artifact", "register"}


class Server:
    """A tracking server, or a local store. ``experiment``: the one in which runs are created; ``ids``: key of a run ->
    its id in MLflow."""

    def __init__(self, client: MlflowClient | None, experiment: str, location: str | None, uri: str) -> None:
        self._client, self.experiment, self.location, self.uri = client, experiment, location, uri
        self.ids: dict[str, str] = {}
        self._experiments: dict[str, str] = {}

    @property
    def client(self) -> MlflowClient:
        """Return MLflow's client. Raises RuntimeError where there is no server, which no stage then calls."""
        if self._client is None:
            raise RuntimeError("tracking.uri is null and runs_dir a bucket: there is no MLflow server")
        return self._client

    def experiment_id(self, name: str = "") -> str:
        """Return the id of an experiment (default: that of this server); create the experiment if there is none.
        Raises InputError where it was deleted."""
        name = name or self.experiment
        if name not in self._experiments:
            found = self.found(name)
            if found is None:
                try:
                    found = str(self.client.create_experiment(name, self.location))
                except MlflowException:
                    found = self.found(name)  # another run may have created it concurrently
                    if found is None:
                        raise
            self._experiments[name] = found
        return self._experiments[name]

    def found(self, name: str = "") -> str | None:
        """Return the id of an experiment, None if there is none. Raises InputError where it was deleted."""
        found = self.client.get_experiment_by_name(name or self.experiment)
        if found is None:
            return None
        if found.lifecycle_stage == LifecycleStage.DELETED:
            raise InputError(
                f"experiment {name or self.experiment!r} was deleted in MLflow ({self.uri}): restore it (mlflow "
                f"experiments restore --experiment-id {found.experiment_id}), or set tracking.experiment"
            )
        return str(found.experiment_id)

    def run_id(self, run: str, experiment: str = "") -> str:
        """Return the id of a run that is named by its key or its id; the key itself where MLflow has no such run."""
        if not run.startswith(_PREFIX) or run in self.ids:
            return self.ids.get(run, run)
        found = self.client.search_runs([self.experiment_id(experiment)], f"tags.`{KEY}` = '{run}'", max_results=1)
        if not found:
            return run
        self.ids[run] = str(found[0].info.run_id)
        return self.ids[run]

    def send(self, record: Record, experiment: str = "", again: bool = False) -> None:
        """Send a record. ``again``: it may have been sent before."""
        if record["do"] == "create":
            if not again or self.run_id(record["run"], experiment) == record["run"]:
                self._create(record, experiment)
        else:
            _SENDERS[record["do"]](self.client, self.run_id(record["run"], experiment), record)

    def _create(self, record: Record, experiment: str) -> None:
        tags = {**record["tags"], KEY: record["run"]}
        if record["parent"]:
            tags["mlflow.parentRunId"] = self.run_id(record["parent"], experiment)
        made = self.client.create_run(self.experiment_id(experiment), record["time"], tags, record["name"])
        self.ids[record["run"]] = str(made.info.run_id)


def _batch(client: MlflowClient, run: str, record: Record) -> None:
    metrics = [Metric(name, float(value), record["time"], record["step"]) for name, value in record["metrics"].items()]
    client.log_batch(run, metrics, tags=[RunTag(name, str(value)) for name, value in record["tags"].items()])


def _params(client: MlflowClient, run: str, record: Record) -> None:
    params = [Param(name, str(value)[:5000]) for name, value in record["values"].items()]
    for start in range(0, len(params), 100):
        client.log_batch(run, params=params[start : start + 100])


def _input(client: MlflowClient, run: str, record: Record) -> None:
    source = DeltaDatasetSource(path=record["path"], delta_table_version=record["version"])
    dataset = MetaDataset(source, name=record["table"], digest=f"v{record['version']}")  # type: ignore[abstract]
    tags = [InputTag("mlflow.data.context", record["context"])]
    client.log_inputs(run, [DatasetInput(dataset._to_mlflow_entity(), tags)])


def _text(client: MlflowClient, run: str, record: Record) -> None:
    client.log_text(run, record["text"], record["file"])


def _artifact(client: MlflowClient, run: str, record: Record) -> None:
    with local(location(record["path"])) as path:
        if path.is_dir():
            client.log_artifacts(run, str(path), path.name)
        elif path.exists():  # a file of the spool may be sent after its artifact was removed
            client.log_artifact(run, str(path))


def _register(client: MlflowClient, run: str, record: Record) -> None:
    """Set an alias of a registered model to a tokenizer; a new version of the model is logged with its folder."""
    name, folder = record["model"], location(record["path"])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("digest") == record["digest"]]
    if known:
        version = known[0]
    elif record["tokenizer"] and (folder / "manifest.json").exists():
        with local(folder) as files:
            client.log_artifacts(run, str(files), folder.name)
        source = f"{client.get_run(run).info.artifact_uri}/{folder.name}"
        tags = {"digest": record["digest"], "tokenizer": record["tokenizer"]}
        version = client.create_model_version(name, source, run, tags=tags, description=_described(record))
    else:
        raise InputError(f"tokenizer {record['digest']} is neither in MLflow nor in {folder}: {record['alias']} stays")
    client.set_registered_model_alias(name, record["alias"], version.version)


def _described(record: Record) -> str | None:
    """Return the card of a model, cut to what MLflow takes; a record of an earlier version has none."""
    card = record.get("card")
    return str(card)[:_DESCRIPTION] if card else None


def _resume(client: MlflowClient, run: str, record: Record) -> None:
    client.update_run(run, status="RUNNING")


def _end(client: MlflowClient, run: str, record: Record) -> None:
    client.set_terminated(run, record["status"], record["time"])


_SENDERS: dict[str, Callable[[MlflowClient, str, Record], None]] = {
    "batch": _batch,
    "params": _params,
    "input": _input,
    "text": _text,
    "artifact": _artifact,
    "register": _register,
    "resume": _resume,
    "end": _end,
}
