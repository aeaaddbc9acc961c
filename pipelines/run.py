"""Define the paths of a run: the only code that joins paths below ``<runs_dir>/<name>``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adasid.config import Config
from pipelines.engines.lake import Lake


@dataclass(frozen=True)
class Run:
    """The paths of the run that ``cfg`` names are its properties. Reading one creates nothing."""

    cfg: Config

    @property
    def folder(self) -> Path:
        """Return the run's folder, absolute."""
        return self.cfg.run_dir.resolve()

    @property
    def lake(self) -> Lake:
        """Return the run's tables, at the versions that the config pins."""
        return Lake(str(self.folder / "lake"), self.cfg.pins)

    @property
    def artifacts(self) -> Path:
        """Return the folder of all models."""
        return self.folder / "artifacts"

    def artifact(self, kind: str, key: str) -> Path:
        """Return the folder of one model, its checkpoints and its metrics: ``kind`` such as tokenizer, ``key`` its
        input hash."""
        return self.artifacts / kind / key

    def report(self, page: str = "") -> Path:
        """Return the folder of the report's main page, or of a further ``page``."""
        return self.folder / "report" / page if page else self.folder / "report"

    @property
    def exports(self) -> Path:
        """Return the folder of the exported generations."""
        return self.folder / "exports"

    @property
    def journal(self) -> Path:
        """Return the path of the JSON lines with one row for each stage that succeeded."""
        return self.folder / "stages.jsonl"

    def record(self, stage: str) -> Path:
        """Return the path of the JSON file with the inputs of a stage's last outputs (:mod:`pipelines.stage`)."""
        return self.folder / "stages" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', stage)}.json"

    @property
    def pipeline(self) -> Path:
        """Return the path of the JSON file with the parent MLflow run of the next stages."""
        return self.folder / "pipeline.json"

    @property
    def refused(self) -> Path:
        """Return the path of the JSON file of the last table that the gates of a nightly run refused, while it is
        refused."""
        return self.folder / "refused.json"

    @property
    def error_log(self) -> Path:
        """Return the path of the stack traces of the last errors (:mod:`pipelines.traces`)."""
        return self.folder / "error.log"

    @property
    def tracking_uri(self) -> str:
        """Return the MLflow server that the config names, else an SQLite store in the run's folder."""
        return self.cfg.tracking.uri or f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def tracked_artifacts(self) -> Path:
        """Return the folder of MLflow's artifacts, used where no server stores them."""
        return self.artifacts / "mlflow"

    @property
    def spool(self) -> Path:
        """Return the folder of what MLflow has not taken yet (:mod:`pipelines.engines.spool`)."""
        return self.folder / "mlflow-spool"
