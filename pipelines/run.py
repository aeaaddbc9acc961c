"""Define the paths of a run: the only code that joins paths below ``<runs_dir>/<name>``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adasid.config import Config
from adasid.files import Location, location
from adasid.storage import is_remote
from pipelines.engines.lake import Lake


@dataclass(frozen=True)
class Run:
    """The paths of the run that ``cfg`` names are its properties. Reading one creates nothing."""

    cfg: Config

    @property
    def folder(self) -> Location:
        """Return the run's folder, absolute."""
        return location(self.cfg.runs_dir).resolve() / self.cfg.name

    @property
    def lake(self) -> Lake:
        """Return the run's tables, at the versions that the config pins."""
        return Lake(str(self.folder / "lake"), self.cfg.pins)

    @property
    def artifacts(self) -> Location:
        """Return the folder of all models."""
        return self.folder / "artifacts"

    def artifact(self, kind: str, key: str) -> Location:
        """Return the folder of one model, its checkpoints and its metrics: ``kind`` such as tokenizer, ``key`` its
        input hash."""
        return self.artifacts / kind / key

    def named(self, artifact: Location) -> str:
        """Return how tables name an artifact: relative to the run's folder where it lies there, so that a run that is
        moved or copied still names its own."""
        path, folder = str(artifact.resolve()), f"{self.folder}/"
        return path.removeprefix(folder)

    def of_name(self, name: str) -> Location:
        """Return the artifact that :meth:`named` names."""
        return location(name) if is_remote(name) or name.startswith("/") else self.folder / name

    def report(self, page: str = "") -> Location:
        """Return the folder of the report's main page, or of a further ``page``."""
        return self.folder / "report" / page if page else self.folder / "report"

    @property
    def exports(self) -> Location:
        """Return the folder of the exported generations."""
        return self.folder / "exports"

    @property
    def journal(self) -> Location:
        """Return the path of the JSON lines with one row for each stage that succeeded."""
        return self.folder / "stages.jsonl"

    def record(self, stage: str) -> Location:
        """Return the path of the JSON file with the inputs of a stage's last outputs (:mod:`pipelines.stage`)."""
        return self.folder / "stages" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', stage)}.json"

    @property
    def pipeline(self) -> Location:
        """Return the path of the JSON file with the parent MLflow run of the next stages."""
        return self.folder / "pipeline.json"

    @property
    def refused(self) -> Location:
        """Return the path of the JSON file of the last table that the gates of a nightly run refused, while it is
        refused."""
        return self.folder / "refused.json"

    @property
    def registered(self) -> Location:
        """Return the path of the JSON file of the tables that are registered in Spark's catalogue
        (:mod:`pipelines.publish.registration`)."""
        return self.folder / "registered.json"

    @property
    def error_log(self) -> Location:
        """Return the path of the stack traces of the last errors (:mod:`pipelines.traces`)."""
        return self.folder / "error.log"

    @property
    def tracking_uri(self) -> str:
        """Return the MLflow server that the config names, else an SQLite store in the run's folder; empty in object
        storage, where there can be none: then all records stay in :attr:`spool`."""
        if self.cfg.tracking.uri or not isinstance(self.folder, Path):
            return self.cfg.tracking.uri or ""
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def tracked_artifacts(self) -> Location:
        """Return the folder of MLflow's artifacts, used where no server stores them."""
        return self.artifacts / "mlflow"

    @property
    def spool(self) -> Location:
        """Return the folder of what MLflow has not taken yet (:mod:`pipelines.engines.spool`)."""
        return self.folder / "mlflow-spool"
