"""Where everything of a run is: the only code that joins paths below ``<runs_dir>/<name>``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adasid.config import Config
from pipelines.engines.lake import Lake


@dataclass(frozen=True)
class Run:
    """The places of the run that ``cfg`` names. Nothing is created by asking."""

    cfg: Config

    @property
    def folder(self) -> Path:
        """The run's folder, absolute."""
        return self.cfg.run_dir.resolve()

    @property
    def lake(self) -> Lake:
        """The run's tables, at the versions that the config pins."""
        return Lake(str(self.folder / "lake"), self.cfg.pins)

    @property
    def artifacts(self) -> Path:
        """Folder of all models."""
        return self.folder / "artifacts"

    def artifact(self, kind: str, key: str) -> Path:
        """Folder of one model, its checkpoints and its metrics: ``kind`` such as tokenizer, ``key`` its input hash."""
        return self.artifacts / kind / key

    def report(self, page: str = "") -> Path:
        """Folder of the report's main page, or of a further ``page``."""
        return self.folder / "report" / page if page else self.folder / "report"

    @property
    def exports(self) -> Path:
        """Folder of the exported generations."""
        return self.folder / "exports"

    @property
    def journal(self) -> Path:
        """JSON lines, one for each stage that ended well."""
        return self.folder / "stages.jsonl"

    def record(self, stage: str) -> Path:
        """JSON file of what a stage's outputs were last made of (:mod:`pipelines.stage`)."""
        return self.folder / "stages" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', stage)}.json"

    @property
    def pipeline(self) -> Path:
        """JSON file with the parent run in MLflow of the stages that follow."""
        return self.folder / "pipeline.json"

    @property
    def refused(self) -> Path:
        """JSON file of the last table that the gates of a nightly run refused, while it is refused."""
        return self.folder / "refused.json"

    @property
    def error_log(self) -> Path:
        """The stack trace of the last error that was reported in one line."""
        return self.folder / "error.log"

    @property
    def tracking_uri(self) -> str:
        """The MLflow server that the config names, else an SQLite store in the run's folder."""
        return self.cfg.tracking.uri or f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def tracked_artifacts(self) -> Path:
        """Folder of MLflow's artifacts, where no server keeps them."""
        return self.artifacts / "mlflow"
